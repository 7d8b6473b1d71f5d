"""Implementations in plain PyTorch, as one would write them, and the paper's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..paper import MaskLoop, mlp
from .problem import Problem
from .provider import Layer, Provider, Routed, Unavailable, gradient


class PaperLayer(MaskLoop, Layer):
    """The paper's implementation, as a provider."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.weights, problem.shape.k)

    def w1_grad(self) -> Tensor:
        return torch.stack([gradient(expert.get_parameter("0.weight")) for expert in self.experts])


class GemmLoop(Routed):
    """Tokens sorted by expert, a Python loop of dense matrix products over the experts."""

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        expert_R, order_R = indices_TK.flatten().to(torch.uint8).sort(stable=True)
        token_R = order_R // self.k
        counts = torch.bincount(expert_R, minlength=self.n_experts).tolist()
        outs = []
        for e, x_RD in enumerate(x_TD.index_select(0, token_R).split(counts)):
            h_RH = F.linear(x_RD, self.w1_EHD[e], self.w1_bias[e]).relu_()
            outs.append(F.linear(h_RH, self.w2_EDH[e], self.w2_bias[e]))
        out_RD = self.drop(torch.cat(outs)) * gates_TK.flatten().index_select(0, order_R)[:, None]
        return torch.zeros_like(x_TD).index_add(0, token_R, out_RD)


class GroupedMm(Routed):
    """Tokens sorted by expert, torch's grouped matrix product, biases added to each row."""

    def __init__(self, problem: Problem) -> None:
        if not hasattr(F, "grouped_mm"):
            raise Unavailable(f"torch {torch.__version__} has no F.grouped_mm")
        super().__init__(problem)

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        expert_R, order_R = indices_TK.flatten().sort()
        token_R = order_R // self.k
        edges_E = torch.arange(self.n_experts, device=x_TD.device)
        offsets_E = torch.searchsorted(expert_R, edges_E, right=True).int()
        x_RD = x_TD.index_select(0, token_R)
        z_RH = F.grouped_mm(x_RD, self.w1_EHD.mT, offs=offsets_E)
        h_RH = (z_RH + bias_rows(self.w1_bias, expert_R)).relu_()
        out_RD = F.grouped_mm(h_RH, self.w2_EDH.mT, offs=offsets_E)
        out_RD = out_RD + bias_rows(self.w2_bias, expert_R)
        out_RD = self.drop(out_RD) * gates_TK.flatten().index_select(0, order_R)[:, None]
        return torch.zeros_like(x_TD).index_add(0, token_R, out_RD)


def bias_rows(table_EN: Tensor, row_R: Tensor) -> Tensor:
    """``table_EN[row_R]``, by the method that is faster on the device.

    On a GPU the gradient of an index adds the rows that have the same index one after the other,
    millions of them for each expert. That of a product with ones is a product.
    """
    if not table_EN.is_cuda:
        return table_EN[row_R]
    is_row_RE = row_R[:, None] == torch.arange(table_EN.shape[0], device=row_R.device)
    return is_row_RE.to(table_EN.dtype) @ table_EN


class Dense(Layer):
    """One MLP of hidden width k·H: the FLOPs of k experts, without a router."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        weights, k = problem.weights, problem.shape.k
        self.net = mlp(
            weights["w1_EHD"][:k].flatten(0, 1),
            weights["w1_bias"][:k].flatten(),
            weights["w2_EDH"][:k].movedim(0, 1).flatten(1),
            weights["w2_bias"][0],
        )

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        y_BTD: Tensor = self.net(x_BTD)
        return y_BTD


PLAIN = [
    Provider("mask-loop", PaperLayer, "like the paper's released code"),
    Provider("gemm-loop", GemmLoop, "our router"),
    Provider("grouped-mm", GroupedMm, "our router"),
    Provider("dense", Dense, "no experts: an MLP of equal active FLOPs", exact=False, routes=False),
]
