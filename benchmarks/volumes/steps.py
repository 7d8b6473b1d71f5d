"""A training step of the 3D network: without experts, with a loop of masks, or with this layer.

Shapes: B samples, C channels; D, H, W the volume's axes; T voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dmoe_layer import DMoE, routing
from reference_models.models.resunet3d import ResUNet3D

from ..paper import MaskLoop
from ..profiled import Meter

N_CLASSES, N_VALUES = 2, 4  # a target and its background, four T-stages


@dataclass(frozen=True)
class Patch:
    """What a training step sees: ``batch`` samples of ``sides`` voxels."""

    batch: int
    sides: tuple[int, int, int]

    @property
    def voxels(self) -> int:
        return self.batch * self.sides[0] * self.sides[1] * self.sides[2]

    def __str__(self) -> str:
        return "×".join(map(str, (self.batch, *self.sides)))


class LoopSlot(nn.Module):
    """A residual DMoE without attributes computed by boolean masks: the paper's plain mixture."""

    def __init__(self, layer: DMoE) -> None:
        super().__init__()
        self.loop = MaskLoop(layer.state_dict())

    def forward(self, x_BCDHW: Tensor, mask: None) -> Tensor:
        x_BTC = rearrange(x_BCDHW, "b c d h w -> b (d h w) c")
        y_BTC = x_BTC + self.loop(x_BTC, torch.zeros(len(x_BTC), dtype=torch.long))
        return y_BTC.mT.reshape(x_BCDHW.shape)


def _mask_loop() -> ResUNet3D:
    network = ResUNet3D(n_classes=N_CLASSES)
    for stage in network.encoder:
        stage.moe = LoopSlot(stage.moe)  # type: ignore[arg-type]
    return network


def _network(**options: Any) -> ResUNet3D:
    return ResUNet3D(n_classes=N_CLASSES, attribute_sizes=N_VALUES, **options)


# What all others are compared with, and what sees a body mask.
COMPARED_WITH, MASKED = "dense", "ours-half-masked"
NETWORKS: dict[str, Callable[[], ResUNet3D]] = {
    COMPARED_WITH: partial(_network, moe="none"),
    "mask-loop": _mask_loop,
    "ours": _network,
    MASKED: _network,
    "dense-checkpointed": partial(_network, moe="none", gradient_checkpointing=True),
    "ours-checkpointed": partial(_network, gradient_checkpointing=True),
}


class Step:
    """A training step of a network on one random patch, without the optimizer."""

    def __init__(self, name: str, patch: Patch, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.network = NETWORKS[name]().to(device).train()
        self.device, self.dtype = device, dtype
        size = (patch.batch, *patch.sides)
        image_BCDHW = torch.randn(patch.batch, 1, *patch.sides, device=device)
        self.label_BDHW = torch.randint(N_CLASSES, size, device=device)
        self.attributes_B = torch.arange(patch.batch) % N_VALUES
        self.inputs: tuple[Tensor, ...] = (image_BCDHW,)
        if name == MASKED:
            mask_BDHW = torch.zeros(size, dtype=torch.bool, device=device)
            mask_BDHW[:, : patch.sides[0] // 2] = True
            self.inputs = (image_BCDHW, mask_BDHW)

    def forward(self) -> Tensor:
        """The loss, without gradients of an earlier step."""
        self.network.zero_grad(set_to_none=True)
        low = self.dtype != torch.float32
        with (
            routing(self.attributes_B),
            torch.autocast(self.device.type, self.dtype, enabled=low),
        ):
            return F.cross_entropy(self.network(*self.inputs), self.label_BDHW)

    def __call__(self) -> None:
        self.forward().backward()

    def memory(self) -> tuple[int, int]:
        """Bytes: the peak of the step, and what is held between forward and backward."""
        self.network.zero_grad(set_to_none=True)
        with Meter(self.device) as meter:
            loss = self.forward()
            meter.mark()
            loss.backward()
        (held, _), (_, peak) = meter.marks
        self.network.zero_grad(set_to_none=True)
        return peak, held
