"""A small U-Net with an MLP in every encoder stage, and the ways to tell that MLP the attribute.

The 3D Residual U-Net's plan in 2D and small. In each stage is one place where a dense MLP, experts
or a simpler way to use the attribute can stand, all with the same multiply-adds a token, but for
what scores experts and what reads the attribute.

Shapes: B samples, C channels, K classes, D a stage's channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dmoe_layer import DMoE

from .blocks import FiLM, Membership, PerValue, Planes, make_mlp

BLOCKS = ("mlp", "channels", "film", "per_value", "moe")
TOLD = ("channels", "film", "per_value")  # blocks without experts that need attributes
GROUPS = 4  # of the group norms


class UNet(nn.Module):
    """Stages of two convolutions and an MLP, each of half the sides; and up again.

    What needs the attributes takes them from the open ``dmoe_layer.routing(attributes)`` scope.

    Args:
        widths: channels D of the stages, each of which halves the image.
        in_channels: of an image.
        n_classes: K, the background included.
        block: what the MLP of a stage is. "mlp": dense, it is told nothing. "channels": the same,
            and every attribute value is a further channel of the image, 1 or 0. "film": scaled and
            shifted by the attribute before it (Perez et al., FiLM, AAAI 2018). "per_value": one of
            its own for every attribute value; of several attributes, the mean of theirs. "moe":
            experts.
        hidden: units that a token passes through, of all its experts together, as a multiple of
            D, so that equal numbers are equal multiply-adds: 2 · hidden · D² a token. Beside them
            stand the router's, FiLM's and those of the first convolution's further channels.
        attribute_sizes: number of values of each attribute; None: no block is told any.
        n_experts, k, noise, unknown: of DMoE; `unknown` holds for the other blocks as well.
        dropout: of MLPs and experts.

    Raises:
        ValueError, TypeError: for a setting that is not there, or units that do not divide.

    Example:
        >>> import torch
        >>> from dmoe_layer import routing
        >>> from reference_models.models.unet import UNet
        >>> model = UNet(in_channels=1, n_classes=2, attribute_sizes=(3,))
        >>> with routing(torch.tensor([0, 2])):
        ...     model(torch.randn(2, 1, 64, 64)).shape
        torch.Size([2, 2, 64, 64])
    """

    def __init__(
        self,
        widths: Sequence[int] = (12, 24, 48),
        *,
        in_channels: int,
        n_classes: int,
        block: str = "moe",
        hidden: int = 8,
        attribute_sizes: tuple[int, ...] | None = None,
        n_experts: int = 8,
        k: int = 2,
        noise: str = "train",
        unknown: str = "error",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block: got {block!r}, expected one of {', '.join(BLOCKS)}.")
        if not widths or any(width < GROUPS or width % GROUPS for width in widths):
            raise ValueError(f"widths: got {tuple(widths)}, expected multiples of {GROUPS}.")
        if block in TOLD and not attribute_sizes:
            raise ValueError(f"block: {block} has to be told attributes; mlp is not told any.")
        self.block, self.in_channels, self.hidden = block, in_channels, hidden
        self.expert_options: dict[str, Any] = {
            "attribute_sizes": attribute_sizes,
            "n_experts": n_experts,
            "k": k,
            "noise": noise,
            "unknown": unknown,
            "dropout": dropout,
        }
        # Units that do not divide would be fewer than the other blocks', and nothing would tell.
        parts = self.parts
        if hidden < 1 or (block == "moe" and any(hidden * w % parts for w in widths)):
            raise ValueError(
                f"hidden: got {hidden}, expected 1 or more that divide among the experts of a "
                f"token: hidden times each of the widths {tuple(widths)} by {parts}."
            )
        self.planes: nn.Module = nn.Identity()
        inputs = in_channels
        if block == "channels":
            membership = self.make_membership()
            self.planes, inputs = Planes(membership), in_channels + membership.values
        self.stages = nn.ModuleList(
            self.make_stage(cin, width) for cin, width in pairwise([inputs, *widths])
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(*_convolution(cin + cout, cout)) for cin, cout in pairwise(widths[::-1])
        )
        self.head = nn.ConvTranspose2d(widths[0], n_classes, 2, stride=2)

    @property
    def parts(self) -> int:
        """Among how many MLPs or experts, all alike, the hidden units of a token are divided."""
        return max(self.expert_options["k"], 1)

    def make_stage(self, cin: int, width: int) -> Stage:
        """A stage with the block that was asked for; its weights are drawn in this order."""
        dropout = self.expert_options["dropout"]
        mlp: nn.Module
        if self.block == "moe":
            mlp = self.make_experts(width)
        elif self.block == "per_value":
            mlp = PerValue(width, self.hidden * width, self.make_membership(), dropout)
        else:
            mlp = make_mlp(width, self.hidden * width, dropout)
        film = self.make_film(width) if self.block == "film" else None
        return Stage(cin, width, mlp, film)

    def make_experts(self, width: int, **changes: Any) -> DMoE:
        """The experts of a stage.

        Args:
            width: channels D of the stage.
            changes: of the options that the network's experts have in common.
        """
        options = self.expert_options | changes
        return DMoE(width, hidden_dim=self.hidden * width // self.parts, **options)

    def make_film(self, width: int) -> FiLM:
        """What scales and shifts a stage's D channels, the width."""
        return FiLM(width, self.make_membership())

    def make_membership(self) -> Membership:
        """What reads the attributes for a block without experts."""
        options = self.expert_options
        return Membership(options["attribute_sizes"], options["unknown"])

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, K, H, W).

        Args:
            image_BCHW: sides multiples of two to the number of stages.

        Raises:
            ValueError: an image of another kind; or attributes that do not fit, as of
                `routing.attribute_values`, where the network is told any.
        """
        stride = 2 ** len(self.stages)
        shape = tuple(image_BCHW.shape)
        if (
            len(shape) != 4
            or shape[1] != self.in_channels
            or shape[2] % stride
            or shape[3] % stride
        ):
            raise ValueError(
                f"image: got shape {shape}, expected (batch, {self.in_channels}, rows, columns), "
                f"the latter two multiples of {stride}."
            )
        x_BCHW = self.planes(image_BCHW)
        skips = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            skips.append(x_BCHW)
        skips.pop()
        for block in self.decoder:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
            x_BCHW = block(torch.cat([x_BCHW, skips.pop()], dim=1))
        logits: Tensor = self.head(x_BCHW)
        return logits


class Stage(nn.Module):
    """Two convolutions, the first of stride 2, then the residual MLP and what modulates it."""

    def __init__(self, cin: int, width: int, mlp: nn.Module, film: FiLM | None) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(cin, width, stride=2), *_convolution(width, width)
        )
        self.mlp, self.film = mlp, film

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWD = rearrange(self.convolutions(x_BCHW), "b d h w -> b h w d")
        x_BHWD = self.residual(x_BHWD)
        return rearrange(x_BHWD, "b h w d -> b d h w").contiguous()

    def residual(self, x_BHWD: Tensor) -> Tensor:
        """What follows the convolutions, token by token."""
        inner_BHWD: Tensor = x_BHWD if self.film is None else self.film(x_BHWD)
        return x_BHWD + self.mlp(inner_BHWD)


def _convolution(cin: int, cout: int, stride: int = 1) -> tuple[nn.Module, ...]:
    # Leakier than usual: with a slope of 0.01 one initialisation in three, of any block, took a
    # hundred steps and more before it drew any of the phantom's lesion.
    return (
        nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, cout),
        nn.LeakyReLU(0.1),
    )
