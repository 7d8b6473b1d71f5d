"""Changes of the U-Net's experts that only the study tries; no other recipe has them.

Shapes: B samples, C channels of an image, D of a stage, H and W rows and columns, T tokens, E
experts, A all attribute values together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dmoe_layer import DMoE, routing

from ..models.blocks import FiLM, make_mlp
from ..models.unet import Stage, UNet
from ..recipes.networks import UNetSettings


class Merged(nn.Module):
    """One MLP a sample, whose weights are the sums of its experts' weighted by the gates.

    The router sees the sample's mean token (soft merging, Muqeeth et al., arXiv:2306.03745; Yang et
    al., arXiv:1904.04971). It is recorded in no scope, since no token is sent anywhere.

    Args:
        experts: parameters and router of these, a ReLU between them.
    """

    def __init__(self, experts: DMoE) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_BHWD: Tensor) -> Tensor:
        layer, x_BTD = self.experts, x_BHWD.flatten(1, 2)
        told_BA = None
        if layer.attribute_sizes is not None:
            unknown = layer.router.unknown
            told_BA = routing.attribute_values(x_BTD, layer.attribute_sizes, unknown=unknown)
        routed = layer.router(x_BTD.mean(1, keepdim=True), told_BA)
        w1_BHD, b1_BH, w2_BDH, b2_BD = (
            F.embedding_bag(
                routed.expert_indices, parameter.flatten(1),
                per_sample_weights=routed.gates, mode="sum",
            ).view(-1, *parameter.shape[1:])
            for parameter in map(layer.get_parameter, ("w1_EHD", "w1_bias", "w2_EDH", "w2_bias"))
        )  # fmt: skip
        hidden_BTH = torch.baddbmm(b1_BH[:, None], x_BTD, w1_BHD.mT).relu()
        y_BTD = torch.baddbmm(b2_BD[:, None], hidden_BTH, w2_BDH.mT)
        return layer.dropout(y_BTD).view_as(x_BHWD)


class OneForAll(nn.Module):
    """Keeps one router's weights, (1, 2, E, D), and shows them as those of all values."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values

    def forward(self, w_12ED: Tensor) -> Tensor:
        return w_12ED.expand(self.values, -1, -1, -1)

    def right_inverse(self, w_A2ED: Tensor) -> Tensor:
        return w_A2ED[:1]


class Sharp(nn.Module):
    """Makes scores four times as large."""

    def forward(self, parameter: Tensor) -> Tensor:
        return 4 * parameter


class Sum(nn.ModuleList):
    """Adds the outputs of its modules for the same input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([module(x) for module in self]).sum(0)


class StageAndExperts(Stage):
    """A stage with a residual layer of experts after its MLP."""

    def __init__(
        self, cin: int, width: int, mlp: nn.Module, film: FiLM | None, after: DMoE
    ) -> None:
        super().__init__(cin, width, mlp, film)
        self.after = after

    def residual(self, x_BHWD: Tensor) -> Tensor:
        y_BHWD: Tensor = self.after(super().residual(x_BHWD))
        return y_BHWD


class CandidateUNet(UNet):
    """A U-Net whose experts are changed as `CandidateSettings` says.

    Args:
        widths, options: as of `UNet`.
        placement, modulate, film_identity, router, merge: as of `CandidateSettings`.

    Raises:
        ValueError, TypeError: as of `UNet`.
    """

    def __init__(
        self,
        widths: Sequence[int] = (12, 24, 48),
        *,
        placement: str = "mlp",
        modulate: bool = False,
        film_identity: bool = False,
        router: str = "own",
        merge: bool = False,
        **options: Any,
    ) -> None:
        for name, value, known in (
            ("placement", placement, ("mlp", "after", "beside")),
            ("router", router, ("own", "shared", "sharp", "blind")),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(known)}.")
        if modulate and not options.get("attribute_sizes"):
            raise ValueError(
                "modulate: the network needs attribute_sizes, by whose attributes it modulates."
            )
        if merge and placement != "mlp":
            raise ValueError(f"placement: got {placement!r}, expected mlp with merge=True.")
        # Before the network, which makes its stages by them.
        self.placement, self.router, self.merge = placement, router, merge
        self.modulate, self.film_identity = modulate, film_identity
        super().__init__(widths, **options)

    @property
    def parts(self) -> int:
        experts = 1 if self.merge else super().parts
        return experts * (1 if self.placement == "mlp" else 2)

    def make_stage(self, cin: int, width: int) -> Stage:
        if self.block != "moe":
            return super().make_stage(cin, width)
        changes: dict[str, Any] = {"residual": self.placement == "after"}
        if self.router == "blind":
            changes["attribute_sizes"] = None
        experts = self.make_experts(width, **changes)
        if self.router == "shared":
            one = OneForAll(len(experts.router.w_A2ED))
            parametrize.register_parametrization(experts.router, "w_A2ED", one)
        elif self.router == "sharp":
            for name in ("w_A2ED", "bias"):
                parametrize.register_parametrization(experts.router, name, Sharp())
        mlp: nn.Module = Merged(experts) if self.merge else experts
        if self.placement != "mlp":
            mlp = make_mlp(width, self.hidden * width // 2, self.expert_options["dropout"])
        film = self.make_film(width) if self.modulate else None
        if self.placement == "after":
            return StageAndExperts(cin, width, mlp, film, experts)
        if self.placement == "beside":
            mlp = Sum([mlp, experts])
        return Stage(cin, width, mlp, film)

    def make_film(self, width: int) -> FiLM:
        film = super().make_film(width)
        if self.film_identity:
            nn.init.zeros_(film.scale_shift.weight)
        return film


@dataclass(frozen=True)
class CandidateSettings(UNetSettings):
    """The U-Net with a change that the study tried; all but `film_identity` change the experts."""

    network: ClassVar[type[UNet]] = CandidateUNet

    placement: Literal["mlp", "after", "beside"] = "mlp"
    """The place of the experts. mlp: they replace the MLP. after: half of the hidden units stay in
    the MLP and a residual layer of experts follows, which is the paper's placement. beside: half of
    the hidden units stay in the MLP, whose output is added to that of the experts, as an expert
    that is always on would do."""
    modulate: bool = False
    """Scale and shift the input of router and experts by the attribute, as film does."""
    film_identity: bool = False
    """Start with scales of 1 and shifts of 0, instead of PyTorch's initial weights."""
    router: Literal["own", "shared", "sharp", "blind"] = "own"
    """The router. own: one router for each attribute value. sharp: the same, with scores that start
    four times as large, which is a lower temperature. shared: one router for all values, with a
    bias for each value. blind: one router that receives no attribute; `modulate` then hands the
    attribute to the experts."""
    merge: bool = False
    """Merge the k experts of a sample into one MLP before they are applied. The sample's mean token
    chooses them, and the MLP has the hidden units of all of them."""

    def make(self, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
        return super().make(
            shape,
            {
                **options,
                "placement": self.placement,
                "modulate": self.modulate,
                "film_identity": self.film_identity,
                "router": self.router,
                "merge": self.merge,
            },
        )
