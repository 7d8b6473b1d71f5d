"""A small 2D U-Net with an MLP in every encoder stage, and several methods to use the attribute.

It is a small 2D version of the 3D Residual U-Net. Each stage has one place for a dense MLP, for
experts, or for a simpler method to use the attribute. All of them need the same number of
multiply-adds for each token, except for scoring experts and for reading the attribute.

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
TOLD = ("channels", "film", "per_value")  # blocks without experts that receive attributes
GROUPS = 4  # number of groups of the group norms


class UNet(nn.Module):
    """Stages of two convolutions and an MLP, each of which halves the image, and a decoder.

    Blocks that need attributes read them from the open ``dmoe_layer.routing(attributes)`` scope.

    Args:
        widths: number of channels D of each stage; each stage halves the image.
        in_channels: number of channels of an image.
        n_classes: number of classes K, the background included.
        block: what stands in each stage. "mlp": a dense MLP, which does not receive the attribute.
            "channels": the same, and every attribute value is an extra channel of the image, 1 or
            0. "film": the attribute scales and shifts the input of a dense MLP (Perez et al., FiLM,
            AAAI 2018). "per_value": an MLP of its own for every attribute value; with several
            attributes, the mean of theirs. "moe": experts.
        hidden: number of hidden units that a token passes through, in all its experts together, as
            a multiple of D. Equal numbers mean equal multiply-adds, 2 · hidden · D² for each token.
            Those of the router, of FiLM and of extra channels come in addition.
        attribute_sizes: number of values of each attribute; None: no block receives attributes.
        n_experts, k, noise, unknown: as for DMoE; the other blocks use `unknown` too.
        dropout: dropout rate of MLPs and experts.

    Raises:
        ValueError, TypeError: a setting is not valid, or hidden units do not divide among experts.

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
            raise ValueError(
                f"block: got {block}, which needs attributes, but attribute_sizes is "
                f"{attribute_sizes}; give attribute_sizes, or choose mlp."
            )
        self.block, self.in_channels, self.hidden = block, in_channels, hidden
        self.expert_options: dict[str, Any] = {
            "attribute_sizes": attribute_sizes,
            "n_experts": n_experts,
            "k": k,
            "noise": noise,
            "unknown": unknown,
            "dropout": dropout,
        }
        # Rounding would give fewer units than the other blocks have, without a notice.
        parts = self.parts
        if hidden < 1 or (block == "moe" and any(hidden * w % parts for w in widths)):
            raise ValueError(
                f"hidden: got {hidden}, expected 1 or more, such that {parts}, the number of "
                f"experts of a token, divides hidden times each of the widths {tuple(widths)}."
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
        """The number of equal MLPs or experts among which a token's hidden units are divided."""
        return max(self.expert_options["k"], 1)

    def make_stage(self, cin: int, width: int) -> Stage:
        """Makes a stage with its block; the order of this code is the order of random weights."""
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
        """Makes the experts of a stage.

        Args:
            width: number of channels D of the stage.
            changes: changes to the options that all experts of the network have.
        """
        options = self.expert_options | changes
        return DMoE(width, hidden_dim=self.hidden * width // self.parts, **options)

    def make_film(self, width: int) -> FiLM:
        """Makes the FiLM layer of a stage with `width` channels."""
        return FiLM(width, self.make_membership())

    def make_membership(self) -> Membership:
        """Makes the module that reads the attributes for a block without experts."""
        options = self.expert_options
        return Membership(options["attribute_sizes"], options["unknown"])

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Computes logits (B, K, H, W).

        Args:
            image_BCHW: the images; their sides are multiples of 2 to the power of the stages.

        Raises:
            ValueError: the image has a wrong shape, or `routing.attribute_values` refuses the
                attributes of a network that needs them.
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
    """Two convolutions, the first of stride 2, and a residual MLP, whose input FiLM may change."""

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
        """Applies FiLM and the MLP to each token."""
        inner_BHWD: Tensor = x_BHWD if self.film is None else self.film(x_BHWD)
        return x_BHWD + self.mlp(inner_BHWD)


def _convolution(cin: int, cout: int, stride: int = 1) -> tuple[nn.Module, ...]:
    # The ReLU leaks more than usual: with a slope of 0.01 and any block, one initialisation in
    # three took a hundred steps or more before it segmented any of the phantom's lesion.
    return (
        nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, cout),
        nn.LeakyReLU(0.1),
    )
