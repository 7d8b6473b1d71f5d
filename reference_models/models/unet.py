"""A small U-Net with an MLP in every encoder stage, and the ways to tell that MLP the attribute.

The study's network: the 3D Residual U-Net's plan in 2D and small. In each stage is one place where
a dense MLP, experts or a simpler way to use the attribute can stand, all with the same
multiply-adds a token.

Shapes: B samples, C channels, D a stage's channels, H and W rows and columns, M an MLP's hidden
units, A attributes, V values of all attributes together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dmoe_layer import DMoE, MissingAttributesError

from .weight_files import WeightsError

BLOCKS = ("mlp", "channels", "film", "per_value", "moe")
PLACEMENTS = ("mlp", "after")
ROUTERS = ("own", "shared")
GROUPS = 4  # of the group norms


class UNet(nn.Module):
    """Stages of two convolutions and an MLP down to an eighth of the image's sides, and up again.

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
            D; so that equal numbers are equal multiply-adds, but for the router's.
        placement: of experts. "mlp": in place of the MLP. "after": half of the hidden units stay in
            an MLP, and a residual layer of experts follows it, the paper's placement.
        merge: of experts: a sample's k are merged into one MLP of all the hidden units, chosen by
            the sample's mean token (DMoE's `merge`).
        router: "own": each attribute value's; "shared": all values have the same weights, and only
            the bias on the scores is a value's own.
        attribute_sizes: number of values of each attribute; None: no block is told any.
        n_experts, k, noise, unknown: of DMoE; `unknown` holds for the other blocks as well.
        dropout: of MLPs and experts.

    Raises:
        ValueError: for a setting that is not there, or that does not divide.

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
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}.")
        if not widths or any(width < GROUPS or width % GROUPS for width in widths):
            raise ValueError(f"widths: got {tuple(widths)}, expected multiples of {GROUPS}.")
        routed = hidden // 2 if placement == "after" else hidden
        if hidden < 1 or (block == "moe" and (hidden % 2 or k < 1)):
            raise ValueError(f"hidden: got {hidden}, expected an even number of 2 or more.")
        if block in ("channels", "film", "per_value") and attribute_sizes is None:
            raise ValueError(f"block: {block} is told the attributes, but there are none.")
        self.block, self.in_channels = block, in_channels
        self.membership = Membership(attribute_sizes or (), unknown)
        experts: dict[str, Any] = {
            "n_experts": n_experts,
            "k": k,
            "merge": merge,
            "noise": noise,
            "unknown": unknown,
            "attribute_sizes": attribute_sizes,
            "dropout": dropout,
        }
        values = self.membership.values
        inputs = in_channels + (values if block == "channels" else 0)
        stages = []
        for cin, width in pairwise([inputs, *widths]):
            film = after = None
            units = hidden * width
            mlp: nn.Module
            if block == "moe":
                moe = DMoE(
                    width, hidden_dim=max(1, routed * width // (1 if merge else k)), **experts,
                    residual=placement == "after",
                )  # fmt: skip
                if router == "shared":
                    parametrize.register_parametrization(moe.router, "w_A2ED", _OneForAll())
                if placement == "after":
                    mlp, after = make_mlp(width, units // 2, dropout), moe
                else:
                    mlp = moe
            elif block == "per_value":
                mlp = PerValue(width, units, values, dropout)
            else:
                mlp = make_mlp(width, units, dropout)
                film = FiLM(width, values) if block == "film" else None
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
            ValueError: an image of another kind, or an attribute value that there is not.
            dmoe_layer.MissingAttributesError: an attribute is unknown, and `unknown` is "error".
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
        if self.block in ("channels", "film", "per_value"):
            member_BV = self.membership(attributes_BA).to(image_BCHW)
        x_BCHW = image_BCHW
        if self.block == "channels" and member_BV is not None:
            planes_BVHW = member_BV[:, :, None, None].expand(-1, -1, *shape[2:])
            x_BCHW = torch.cat([x_BCHW, planes_BVHW], dim=1)
        skips = []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW, member_BV)
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

    def forward(self, x_BCHW: Tensor, member_BV: Tensor | None) -> Tensor:
        x_BHWD = rearrange(self.convolutions(x_BCHW), "b d h w -> b h w d")
        inner_BHWD = x_BHWD if self.film is None else self.film(x_BHWD, member_BV)
        told = (member_BV,) if isinstance(self.mlp, PerValue) else ()
        x_BHWD = x_BHWD + self.mlp(inner_BHWD, *told)
        if self.after is not None:
            x_BHWD = self.after(x_BHWD)
        return rearrange(x_BHWD, "b h w d -> b d h w").contiguous()


class Membership(nn.Module):
    """How much a sample belongs to each value of each attribute: (B, V), 1 or 0.

    An unknown attribute follows DMoE's policies: "error" raises, "average" belongs to all values
    alike, "learned" is one more value.
    """

    def __init__(self, attribute_sizes: tuple[int, ...], unknown: str) -> None:
        super().__init__()
        self.attribute_sizes, self.unknown = attribute_sizes, unknown
        self.values = sum(attribute_sizes) + len(attribute_sizes) * (unknown == "learned")

    def forward(self, attributes_BA: Tensor) -> Tensor:
        columns = []
        for attribute_B, size in zip(attributes_BA.T, self.attribute_sizes, strict=True):
            if attribute_B.min() < -1 or attribute_B.max() >= size:
                raise ValueError(
                    f"attributes: got {attribute_B.tolist()}, expected -1..{size - 1}."
                )
            unknown_B = attribute_B == -1
            if self.unknown == "error" and unknown_B.any():
                raise MissingAttributesError(
                    "attributes: a value is unknown (-1); give it, or set unknown='average' or "
                    "'learned'."
                )
            if self.unknown == "learned":
                column_BV = F.one_hot(torch.where(unknown_B, size, attribute_B), size + 1).float()
            else:
                column_BV = F.one_hot(attribute_B.clamp(min=0), size).float()
                column_BV = torch.where(unknown_B[:, None], 1 / size, column_BV)
            columns.append(column_BV)
        return torch.cat(columns, dim=1)


class FiLM(nn.Module):
    """Scale and shift of every channel by the attribute, x · (1 + γ) + β (Perez et al., 2018)."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(values, 2 * width, bias=False)

    def forward(self, x_BHWD: Tensor, member_BV: Tensor) -> Tensor:
        scale_BD, shift_BD = self.scale_shift(member_BV).chunk(2, dim=1)
        return x_BHWD * (1 + scale_BD[:, None, None]) + shift_BD[:, None, None]


class PerValue(nn.Module):
    """An MLP for every attribute value; a sample's is the mean of those that it belongs to.

    The mean is of weights, which is that of outputs where a sample belongs to one value.
    """

    def __init__(self, width: int, units: int, values: int, dropout: float) -> None:
        super().__init__()
        self.w1_VMD = nn.Parameter(torch.empty(values, units, width))
        self.b1_VM = nn.Parameter(torch.empty(values, units))
        self.w2_VDM = nn.Parameter(torch.empty(values, width, units))
        self.b2_VD = nn.Parameter(torch.empty(values, width))
        self.dropout = nn.Dropout(dropout)
        for weight, bias in ((self.w1_VMD, self.b1_VM), (self.w2_VDM, self.b2_VD)):
            bound = 1 / math.sqrt(weight.shape[-1])  # as nn.Linear's
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x_BHWD: Tensor, member_BV: Tensor) -> Tensor:
        share_BV = member_BV / member_BV.sum(1, keepdim=True)
        w1_BMD, b1_BM, w2_BDM, b2_BD = (
            torch.einsum("bv,v...->b...", share_BV, parameter)
            for parameter in (self.w1_VMD, self.b1_VM, self.w2_VDM, self.b2_VD)
        )
        x_BTD = x_BHWD.flatten(1, 2)
        hidden_BTM = torch.baddbmm(b1_BM[:, None], x_BTD, w1_BMD.mT).relu()
        y_BTD = torch.baddbmm(b2_BD[:, None], hidden_BTM, w2_BDM.mT)
        return self.dropout(y_BTD).view_as(x_BHWD)


def make_mlp(width: int, units: int, dropout: float) -> nn.Sequential:
    """What an expert is, dense."""
    return nn.Sequential(
        nn.Linear(width, units), nn.ReLU(), nn.Linear(units, width), nn.Dropout(dropout)
    )


def _convolution(cin: int, cout: int, stride: int = 1) -> tuple[nn.Module, ...]:
    # Leaky, since of so few channels none can be spared to die.
    return (
        nn.Conv2d(cin, cout, 3, stride, padding=1, bias=False),
        nn.GroupNorm(GROUPS, cout),
        nn.LeakyReLU(0.01),
    )


class _OneForAll(nn.Module):
    """Gives all of a router's attribute values the same weights, the mean of theirs."""

    def forward(self, w_A2ED: Tensor) -> Tensor:
        return w_A2ED.mean(0, keepdim=True).expand_as(w_A2ED)


def load_dense(model: UNet, path: Path) -> None:
    """Starts a network of experts from a dense one: every expert of a stage becomes its MLP.

    In eval mode the network computes what the dense one does (upcycling, Komatsuzaki et al.,
    arXiv:2212.05055). The dense one's `hidden` is that of one expert, and its routers are new.

    Raises:
        WeightsError: the file is no dense U-Net's of these sizes, or the network has no experts in
            place of its MLPs. The network is unchanged.
    """
    try:
        found = load_file(path)
        for i, stage in enumerate(model.stages):
            assert isinstance(stage, Stage)
            if not isinstance(stage.mlp, DMoE) or stage.mlp.dim is None:
                raise WeightsError(f"{path}: stage {i + 1} has no experts to start from an MLP.")
            layer, names = stage.mlp, f"stages.{i}.mlp."
            mlp = make_mlp(stage.mlp.dim, layer.w1_EHD.shape[1], layer.dropout)
            mlp.load_state_dict({
                name.removeprefix(names): found.pop(name) for name in [*found] if names in name
            })  # fmt: skip
            experts = DMoE.from_mlp(mlp, layer.n_experts, layer.k).state_dict()
            kept = {n: v for n, v in layer.state_dict().items() if n.startswith("router.")}
            found |= {names + name: value for name, value in (experts | kept).items()}
        model.load_state_dict(found)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeightsError(
            f"{path}: cannot start this network: {error} Expected the model.safetensors of a run "
            "with --block mlp, of the same --widths and of the --hidden of one expert."
        ) from error
