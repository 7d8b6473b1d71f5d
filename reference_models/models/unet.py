"""A small U-Net with an MLP in every encoder stage, and the ways to tell that MLP the attribute.

The study's network: the 3D Residual U-Net's plan in 2D and small. In each stage is one place where
a dense MLP, experts or a simpler way to use the attribute can stand, all with the same
multiply-adds a token, but for what scores experts and what reads the attribute.

Shapes: B samples, C channels, D a stage's channels, H and W rows and columns, M an MLP's hidden
units, A attributes, V values of all attributes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dmoe_layer import DMoE

from .blocks import FiLM, Membership, Merged, OneForAll, PerValue, Sharp, Sum, make_mlp

BLOCKS = ("mlp", "channels", "film", "per_value", "moe")
TOLD = ("channels", "film", "per_value")  # by the network itself; experts are by the scope
PLACEMENTS = ("mlp", "after", "beside")
ROUTERS = ("own", "shared", "sharp", "blind")
UNKNOWN = ("error", "average", "learned")
GROUPS = 4  # of the group norms


class UNet(nn.Module):
    """Stages of two convolutions and an MLP, each of half the sides; and up again.

    The attributes are an argument of `forward`, since FiLM and its like need them too; experts take
    them from the open ``dmoe_layer.routing(attributes)`` scope, as everywhere.

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
        placement: of experts. "mlp": in place of the MLP. "after": half of the hidden units stay in
            an MLP, and a residual layer of experts follows it, the paper's placement. "beside":
            half of them stay in an MLP, to whose output that of the experts is added: an expert
            that is always on.
        modulate: scales and shifts what router and experts see by the attribute, as "film" does.
        film_identity: scales and shifts start as 1 and 0, instead of as `nn.Linear` does.
        merge: of experts: a sample's k are merged into one MLP of all the hidden units, chosen by
            the sample's mean token.
        router: "own": each attribute value's; "sharp": the same with scores four times as large, a
            lower temperature; "shared": all values have the same weights, and only
            the bias on the scores is a value's own; "blind": one that is told nothing, where
            `modulate` tells the experts.
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
        >>> sites = torch.tensor([[0], [2]])
        >>> with routing(sites):
        ...     model(torch.randn(2, 1, 64, 64), sites).shape
        torch.Size([2, 2, 64, 64])
    """

    takes_attributes = True

    def __init__(
        self,
        widths: Sequence[int] = (12, 24, 48),
        *,
        in_channels: int,
        n_classes: int,
        block: str = "moe",
        hidden: int = 8,
        placement: str = "mlp",
        modulate: bool = False,
        film_identity: bool = False,
        merge: bool = False,
        router: str = "own",
        attribute_sizes: tuple[int, ...] | None = None,
        n_experts: int = 8,
        k: int = 2,
        noise: str = "train",
        unknown: str = "error",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("block", block, BLOCKS),
            ("placement", placement, PLACEMENTS),
            ("router", router, ROUTERS),
            ("unknown", unknown, UNKNOWN),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}.")
        if not widths or any(width < GROUPS or width % GROUPS for width in widths):
            raise ValueError(f"widths: got {tuple(widths)}, expected multiples of {GROUPS}.")
        if (block in TOLD or modulate) and not attribute_sizes:
            raise ValueError(
                f"block: {block}, {modulate=}: has to be told attributes; mlp is not told any."
            )
        # Units that do not divide would be fewer than the other blocks', and nothing would tell.
        parts = (1 if merge else max(k, 1)) * (1 if placement == "mlp" else 2)
        if hidden < 1 or (block == "moe" and any(hidden * w % parts for w in widths)):
            raise ValueError(
                f"hidden: got {hidden}, expected 1 or more that divide among the experts of a "
                f"token: hidden times each of the widths {tuple(widths)} by {parts}."
            )
        self.block, self.in_channels = block, in_channels
        # None where there is none, since a module that stands here tells the network's policy.
        reads = block in TOLD or (modulate and block == "moe")
        self.membership = Membership(attribute_sizes or (), unknown) if reads else None
        experts: dict[str, Any] = {
            "n_experts": n_experts,
            "k": k,
            "noise": noise,
            "unknown": unknown,
            "attribute_sizes": None if router == "blind" else attribute_sizes,
            "dropout": dropout,
        }
        values = 0 if self.membership is None else self.membership.values
        inputs = in_channels + (values if block == "channels" else 0)
        stages = []
        for cin, width in pairwise([inputs, *widths]):
            film = after = None
            units = hidden * width
            mlp: nn.Module
            if block == "moe":
                moe = DMoE(
                    width, hidden_dim=units // parts, **experts,
                    residual=placement == "after",
                )  # fmt: skip
                if router == "shared":
                    one = OneForAll(len(moe.router.w_A2ED))
                    parametrize.register_parametrization(moe.router, "w_A2ED", one)
                if router == "sharp":
                    for name in ("w_A2ED", "b_A2E"):
                        parametrize.register_parametrization(moe.router, name, Sharp())
                mlp = Merged(moe) if merge else moe
                if placement != "mlp":
                    mlp = make_mlp(width, units // 2, dropout)
                if placement == "after":
                    after = moe
                elif placement == "beside":
                    mlp = Sum([mlp, moe])
                film = FiLM(width, values, film_identity) if modulate else None
            elif block == "per_value":
                mlp = PerValue(width, units, values, dropout)
            else:
                mlp = make_mlp(width, units, dropout)
                film = FiLM(width, values, film_identity) if block == "film" else None
            stages.append(Stage(cin, width, mlp, film, after))
        self.stages = nn.ModuleList(stages)
        self.decoder = nn.ModuleList(
            nn.Sequential(*_convolution(cin + cout, cout)) for cin, cout in pairwise(widths[::-1])
        )
        self.head = nn.ConvTranspose2d(widths[0], n_classes, 2, stride=2)

    def forward(self, image_BCHW: Tensor, attributes_BA: Tensor) -> Tensor:
        """Logits (B, K, H, W).

        Args:
            image_BCHW: sides multiples of two to the number of stages.
            attributes_BA: int64, -1 where unknown.

        Raises:
            ValueError: an image or attributes of another kind, an attribute value that there is
                not, or an unknown one where `unknown` is "error".
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
        member_BV = None
        if self.membership is not None:
            member_BV = self.membership(attributes_BA, len(image_BCHW)).to(image_BCHW)
        x_BCHW = image_BCHW
        if self.block == "channels" and member_BV is not None:
            planes_BVHW = member_BV[:, :, None, None].expand(-1, -1, *shape[2:])
            x_BCHW = torch.cat([x_BCHW, planes_BVHW], dim=1)
        skips = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW, member_BV, attributes_BA)
            skips.append(x_BCHW)
        skips.pop()
        for block in self.decoder:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
            x_BCHW = block(torch.cat([x_BCHW, skips.pop()], dim=1))
        logits: Tensor = self.head(x_BCHW)
        return logits


class Stage(nn.Module):
    """Two convolutions, the first of stride 2, then the residual MLP and what modulates it."""

    def __init__(
        self, cin: int, width: int, mlp: nn.Module, film: nn.Module | None, after: nn.Module | None
    ) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(cin, width, stride=2), *_convolution(width, width)
        )
        self.mlp, self.film, self.after = mlp, film, after

    def forward(self, x_BCHW: Tensor, member_BV: Tensor | None, attributes_BA: Tensor) -> Tensor:
        x_BHWD = rearrange(self.convolutions(x_BCHW), "b d h w -> b h w d")
        inner_BHWD = x_BHWD if self.film is None else self.film(x_BHWD, member_BV)
        if isinstance(self.mlp, Merged):
            x_BHWD = x_BHWD + self.mlp(inner_BHWD, attributes_BA)
        elif isinstance(self.mlp, PerValue):
            x_BHWD = x_BHWD + self.mlp(inner_BHWD, member_BV)
        else:
            x_BHWD = x_BHWD + self.mlp(inner_BHWD)
        if self.after is not None:
            x_BHWD = self.after(x_BHWD)
        return rearrange(x_BHWD, "b h w d -> b d h w").contiguous()


def _convolution(cin: int, cout: int, stride: int = 1) -> tuple[nn.Module, ...]:
    # Leakier than usual: with a slope of 0.01 one initialisation in three, of any block, took a
    # hundred steps and more before it drew any of the phantom's lesion.
    return (
        nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, cout),
        nn.LeakyReLU(0.1),
    )
