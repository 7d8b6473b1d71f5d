"""Swapped models in little that are exported, with an example of each."""

import functools
from typing import Any, NamedTuple

import torch
from monai.networks.nets import UNETR, SwinUNETR

from dmoe_layer import swap_mlps

from .mlps import IMAGE, SWIN, VIT_2D, hugging_face, images, strong


class Host(NamedTuple):
    """A model, the pattern of its MLPs, the side of its images, the form of its experts."""

    build: Any
    pattern: str = "*.mlp"
    side: int = 16
    form: str = "auto"

    def make(self):
        """The model with three attribute values, in eval mode."""
        torch.manual_seed(0)
        model = strong(self.build())
        swap_mlps(model, self.pattern, n_experts=2, k=1, attribute_sizes=3)
        return model.eval()

    def x(self, batch=2):
        return images(self.side, self.side)[:1].repeat(batch, 1, 1, 1) * torch.rand(batch, 1, 1, 1)


HOSTS = {
    "monai UNETR": Host(lambda: UNETR(1, 1, (16, 16), 4, **VIT_2D), "vit.blocks.1[01].mlp"),
    # It looks at its image's size by NumPy, which fixes it.
    "monai SwinUNETR": Host(functools.partial(SwinUNETR, 1, 1, spatial_dims=2, **SWIN), side=64),
    "hf ViT": Host(hugging_face("ViT", **IMAGE)),
    "hf DINOv2": Host(hugging_face("Dinov2", **IMAGE, mlp_ratio=2), form="dense"),
}
