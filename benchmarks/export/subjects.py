"""The networks that are measured, and the layer alone, with dense twins of equal active FLOPs.

Shapes: B samples, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmoe_layer import DMoE, swap_mlps
from reference_models.models.resunet3d import ResUNet3D

N_VALUES = 4


class Subject(NamedTuple):
    """A network with experts and the shape of its input; built with fixed weights, in eval mode."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval().requires_grad_(False)

    def x(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))

    def attributes(self) -> Tensor:
        return torch.arange(self.shape[0]) % N_VALUES


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(), add_pooling_layer=False)
    swap_mlps(model, "*.mlp", attribute_sizes=N_VALUES)
    return model


def _swin_unetr() -> nn.Module:
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(1, 2, feature_size=24)
    swap_mlps(model, "*.mlp", attribute_sizes=N_VALUES)
    return model


_LAYER = partial(DMoE, 768, attribute_sizes=N_VALUES)
SUBJECTS = {
    "layer-1x196x768": Subject(_LAYER, (1, 196, 768)),
    "layer-8x196x768": Subject(_LAYER, (8, 196, 768)),
    "vit-b16-1x224": Subject(_vit, (1, 3, 224, 224)),
    "swinunetr-1x64": Subject(_swin_unetr, (1, 1, 64, 64, 64)),
    "resunet3d-1x64": Subject(
        partial(ResUNet3D, n_classes=2, attribute_sizes=N_VALUES), (1, 1, 64, 64, 64)
    ),
}


_ACTIVATIONS = {"relu": nn.ReLU(), "gelu": nn.GELU()}


class DenseTwin(nn.Module):
    """An MLP in the place of a DMoE: as wide as a token's k experts together, of their kind."""

    def __init__(self, layer: DMoE) -> None:
        super().__init__()
        assert layer.dim is not None
        hidden = layer.k * layer.w2_EDH.shape[2]
        self.mlp = nn.Sequential(
            nn.Linear(layer.dim, hidden),
            _ACTIVATIONS[layer.activation],
            nn.Linear(hidden, layer.dim),
        )
        self.channel_dim, self.residual = layer.channel_dim, layer.residual

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        y = self.mlp(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return x + y if self.residual else y


def dense_twin(network: nn.Module) -> nn.Module:
    """The network with a `DenseTwin` in the place of each DMoE, in eval mode."""
    if isinstance(network, DMoE):
        return DenseTwin(network).eval().requires_grad_(False)
    for name, module in list(network.named_modules()):
        if isinstance(module, DMoE):
            network.set_submodule(name, DenseTwin(module))
    return network.eval().requires_grad_(False)
