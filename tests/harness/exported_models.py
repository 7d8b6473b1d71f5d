"""Swapped models in little that are exported, with an example of each."""

import functools
from typing import Any, NamedTuple

import torch
from monai.networks.nets import UNETR, SwinUNETR

from dmoe_layer import swap_mlps

from .mlps import IMAGE, SWIN, VIT_2D, hugging_face, strong


class Host(NamedTuple):
    """A model, the pattern of its MLPs, and the side of its images."""

    build: Any
    pattern: str = "*.mlp"
    side: int = 16

    def make(self):
        """The model with three attribute values, in eval mode."""
        torch.manual_seed(0)
        model = strong(self.build())
        # Each expert is some operators that an exporter takes its time for.
        swap_mlps(model, self.pattern, n_experts=2, k=1, attribute_sizes=3)
        return model.eval()

    def x(self, batch=2):
        return torch.randn(batch, 1, self.side, self.side)


HOSTS = {
    "monai UNETR": Host(lambda: UNETR(1, 1, (16, 16), 4, **VIT_2D), "vit.blocks.11.mlp"),
    # It looks at its image's size by NumPy, which fixes it.
    "monai SwinUNETR": Host(functools.partial(SwinUNETR, 1, 1, spatial_dims=2, **SWIN), side=64),
    "hf ViT": Host(hugging_face("ViT", **IMAGE)),
    "hf DINOv2": Host(hugging_face("Dinov2", **IMAGE, mlp_ratio=2)),
}
