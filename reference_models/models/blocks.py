"""What can stand in a stage of the study's U-Net, and how a block reads the attributes.

Shapes: B samples, D channels of a stage, H and W rows and columns, T tokens, M units of an MLP,
A attributes, V values of all attributes together, E experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_layer import DMoE


class Membership(nn.Module):
    """How much a sample belongs to each value of each attribute: (B, V), 1 or 0.

    An unknown attribute follows DMoE's policies: with "error" it raises, with "average" the sample
    belongs to all values alike, with "learned" to one more value, the attribute's last.
    """

    def __init__(self, attribute_sizes: tuple[int, ...], unknown: str) -> None:
        super().__init__()
        self.attribute_sizes, self.unknown = attribute_sizes, unknown
        self.values = sum(attribute_sizes) + len(attribute_sizes) * (unknown == "learned")

    def forward(self, attributes_BA: Tensor, batch: int) -> Tensor:
        n = len(self.attribute_sizes)
        if attributes_BA.shape != (batch, n) or attributes_BA.dtype != torch.int64:
            raise ValueError(
                f"attributes: got {attributes_BA.dtype} of shape {tuple(attributes_BA.shape)}, "
                f"expected int64 of shape ({batch}, {n}), one column an attribute."
            )
        columns = []
        for attribute_B, size in zip(attributes_BA.T, self.attribute_sizes, strict=True):
            unknown_B = attribute_B == -1
            if ((attribute_B < -1) | (attribute_B >= size)).any():
                raise ValueError(
                    f"attributes: got {attribute_B.tolist()}, expected 0 .. {size - 1}, or -1."
                )
            if self.unknown == "error" and unknown_B.any():
                raise ValueError(
                    f"attributes: got {attribute_B.tolist()}, where -1 stands for unknown, which "
                    "unknown='error' refuses: choose unknown='average' or 'learned' to allow it."
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

    def __init__(self, width: int, values: int, identity: bool) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(values, 2 * width, bias=False)
        if identity:
            nn.init.zeros_(self.scale_shift.weight)

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

    def forward(self, x_BHWD: Tensor, attributes_BA: Tensor) -> Tensor:
        layer, x_BTD = self.experts, x_BHWD.flatten(1, 2)
        told_BA = None if layer.attribute_sizes is None else attributes_BA
        routed = layer.router(x_BTD.mean(1, keepdim=True), told_BA)
        w1_BHD, b1_BH, w2_BDH, b2_BD = (
            F.embedding_bag(
                routed.expert_indices, parameter.flatten(1),
                per_sample_weights=routed.gates, mode="sum",
            ).view(-1, *parameter.shape[1:])
            for parameter in map(layer.get_parameter, ("w1_EHD", "b1_EH", "w2_EDH", "b2_ED"))
        )  # fmt: skip
        hidden_BTH = torch.baddbmm(b1_BH[:, None], x_BTD, w1_BHD.mT).relu()
        y_BTD = torch.baddbmm(b2_BD[:, None], hidden_BTH, w2_BDH.mT)
        return F.dropout(y_BTD, layer.dropout, self.training).view_as(x_BHWD)


def make_mlp(width: int, units: int, dropout: float) -> nn.Sequential:
    """What an expert is, dense."""
    return nn.Sequential(
        nn.Linear(width, units), nn.ReLU(), nn.Linear(units, width), nn.Dropout(dropout)
    )


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
    """Adds up what its modules make of the same input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([module(x) for module in self]).sum(0)
