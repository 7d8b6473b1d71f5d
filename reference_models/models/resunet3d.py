"""The paper's 3D Residual U-Net with a mixture of experts after every encoder stage."""

from __future__ import annotations

from torch import Tensor, nn


class ResUNet3D(nn.Module):
    """To come."""

    def __init__(
        self,
        features: int = 24,
        *,
        in_channels: int = 1,
        n_classes: int,
        moe: str = "per_block",
        stages: tuple[int, ...] = (1, 2, 3, 4, 5),
        attribute_sizes: int | tuple[int, ...] | None = None,
        n_experts: int = 8,
        k: int = 2,
        noise: str = "train",
        unknown: str = "error",
        gradient_checkpointing: bool = False,
    ) -> None:
        raise NotImplementedError

    def forward(self, image_BCDHW: Tensor, mask_BDHW: Tensor | None = None) -> Tensor:
        raise NotImplementedError
