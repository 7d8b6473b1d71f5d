"""Swapped models in little that are exported, with an example of each."""

import functools
from typing import Any, NamedTuple

import torch
import transformers as hf
from monai.networks.nets import UNETR, SwinUNETR

from dmoe_layer import insert_after, routing, swap_mlps

from .mlps import IMAGE, SWIN, VIT_2D, hugging_face, strong


class Host(NamedTuple):
    """A model, the pattern of its MLPs, the side of its images, and what puts experts there."""

    build: Any
    pattern: str = "*.mlp"
    side: int = 16
    place: Any = swap_mlps

    def make(self):
        """The model with three attribute values, in eval mode."""
        torch.manual_seed(0)
        model = strong(self.build())
        # Each expert is some operators that an exporter takes its time for.
        self.place(model, self.pattern, n_experts=2, k=1, attribute_sizes=3)
        model.eval()
        with torch.no_grad(), routing(0):
            model(self.x())  # behind a module of no convolution a layer learns its width
        return model

    def x(self, batch=2):
        return torch.randn(batch, 1, self.side, self.side)


SEGFORMER = {
    "num_channels": 1, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1],
    "hidden_sizes": [8, 8], "num_attention_heads": [1, 1], "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8, "num_labels": 3,
}  # fmt: skip


def segformer():
    return hf.SegformerForSemanticSegmentation(hf.SegformerConfig(**SEGFORMER))


HOSTS = {
    "monai UNETR": Host(lambda: UNETR(1, 1, (16, 16), 4, **VIT_2D), "vit.blocks.11.mlp"),
    # It looks at its image's size by NumPy, which fixes it.
    "monai SwinUNETR": Host(functools.partial(SwinUNETR, 1, 1, spatial_dims=2, **SWIN), side=64),
    "hf ViT": Host(hugging_face("ViT", **IMAGE)),
    "hf DINOv2": Host(hugging_face("Dinov2", **IMAGE, mlp_ratio=2)),
    # Its MLPs have a convolution in their middle, and stay: experts come behind them.
    "hf SegFormer": Host(segformer, side=32, place=functools.partial(insert_after, channel_dim=-1)),
}
