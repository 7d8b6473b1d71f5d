"""Blocks for the stages of the small U-Net; those that need attributes read the open scope.

Shapes: B samples, C channels of an image, D channels of a stage, H and W rows and columns, T
tokens, M hidden units of an MLP, A attributes, V values of all attributes together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_layer import routing

_POLICIES = ("error", "average", "learned")


class Membership(nn.Module):
    """Encodes each sample's attributes as one-hot vectors side by side: (B, V).

    The attributes are those of the open ``dmoe_layer.routing(attributes)`` scope. An unknown value
    follows DMoE's policies: "error" raises, "average" gives all values the same share, and
    "learned" adds an extra value, the attribute's last one, for unknown.

    Args:
        attribute_sizes: number of values of each attribute.
        unknown: the policy.

    Raises:
        ValueError: there is no such policy. `forward` raises what `routing.attribute_values` does.
    """

    def __init__(self, attribute_sizes: tuple[int, ...], unknown: str) -> None:
        super().__init__()
        if unknown not in _POLICIES:
            raise ValueError(f"unknown: got {unknown!r}, expected one of {', '.join(_POLICIES)}.")
        self.attribute_sizes, self.unknown = attribute_sizes, unknown
        self.values = sum(attribute_sizes) + len(attribute_sizes) * (unknown == "learned")

    def forward(self, x: Tensor) -> Tensor:
        """Encodes the attributes of the samples of x (B, ...) as (B, V), with x's device and "
        "dtype."""
        attributes_BA = routing.attribute_values(x, self.attribute_sizes, unknown=self.unknown)
        columns = []
        for attribute_B, size in zip(attributes_BA.T, self.attribute_sizes, strict=True):
            unknown_B = attribute_B == -1
            if self.unknown == "learned":
                column_BV = F.one_hot(torch.where(unknown_B, size, attribute_B), size + 1).float()
            else:
                column_BV = F.one_hot(attribute_B.clamp(min=0), size).float()
                column_BV = torch.where(unknown_B[:, None], 1 / size, column_BV)
            columns.append(column_BV)
        return torch.cat(columns, dim=1).to(x)


class Planes(nn.Module):
    """Adds a channel to the image for every attribute value, which is 1 or 0."""

    def __init__(self, membership: Membership) -> None:
        super().__init__()
        self.membership = membership

    def forward(self, image_BCHW: Tensor) -> Tensor:
        planes_BV11 = self.membership(image_BCHW)[:, :, None, None]
        planes_BVHW = planes_BV11.expand(-1, -1, *image_BCHW.shape[2:])
        return torch.cat([image_BCHW, planes_BVHW], dim=1)


class FiLM(nn.Module):
    """Scales and shifts every channel by the attribute: x · (1 + γ) + β (Perez et al., 2018)."""

    def __init__(self, width: int, membership: Membership) -> None:
        super().__init__()
        self.membership = membership
        self.scale_shift = nn.Linear(membership.values, 2 * width, bias=False)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        scale_BD, shift_BD = self.scale_shift(self.membership(x_BHWD)).chunk(2, dim=1)
        return x_BHWD * (1 + scale_BD[:, None, None]) + shift_BD[:, None, None]


class PerValue(nn.Module):
    """An MLP for every attribute value; with several attributes, a sample uses their mean.

    The weights are averaged, not the outputs. A sample that belongs to one value uses its MLP.
    """

    def __init__(self, width: int, units: int, membership: Membership, dropout: float) -> None:
        super().__init__()
        self.membership, values = membership, membership.values
        self.w1_VMD = nn.Parameter(torch.empty(values, units, width))
        self.b1_VM = nn.Parameter(torch.empty(values, units))
        self.w2_VDM = nn.Parameter(torch.empty(values, width, units))
        self.b2_VD = nn.Parameter(torch.empty(values, width))
        self.dropout = nn.Dropout(dropout)
        for weight, bias in ((self.w1_VMD, self.b1_VM), (self.w2_VDM, self.b2_VD)):
            bound = 1 / math.sqrt(weight.shape[-1])  # the same bound as in nn.Linear
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x_BHWD: Tensor) -> Tensor:
        member_BV = self.membership(x_BHWD)
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
    """Makes a dense MLP of the same form as an expert."""
    return nn.Sequential(
        nn.Linear(width, units), nn.ReLU(), nn.Linear(units, width), nn.Dropout(dropout)
    )
