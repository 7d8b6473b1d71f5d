"""The layer itself, and what anybody would write without it, in plain PyTorch.

Every provider is built from the parameters of one DMoE. In training mode all of them add the
router's noise and drop a tenth of the experts' outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_layer import AttributeRouter, DMoE

from .problem import Layer, Problem
from .shapes import N_EXPERTS, K

DROPOUT = 0.1


class Unavailable(Exception):
    """Says why a provider cannot run here, or not at this shape."""


@dataclass(frozen=True)
class Provider:
    """How to build a layer, and what to know when reading its figures.

    Attributes:
        exact: it computes the layer's formula, and is checked; else it is other maths.
        bias: its experts have biases. Without, it is checked against a truth without.
        routes: it has a router, whose work counts.
        package: the distribution whose version stands beside its figures.
    """

    name: str
    build: Callable[[Problem], Layer]
    note: str = ""
    exact: bool = True
    bias: bool = True
    routes: bool = True
    package: str | None = None


class Ours(Layer):
    """DMoE with one of its backends."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__()
        if backend == "triton" and problem.device.type == "cpu":
            raise Unavailable("the kernels run on a GPU; Triton's interpreter is not timed")
        self.backend = backend
        self.layer = DMoE(
            problem.shape.dim,
            n_experts=N_EXPERTS,
            k=K,
            attribute_sizes=problem.shape.values,
            dropout=DROPOUT,
            backend=backend,
            device=problem.device,
            dtype=problem.dtype,
        )
        self.layer.load_state_dict(problem.weights)

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        y_BTD: Tensor = self.layer(x_BTD, attributes_B)
        return y_BTD

    def route(self, x_BTD: Tensor, attributes_B: Tensor) -> object:
        """The router alone, by the backend's own means."""
        fused = {"fused": True} if self.backend == "triton" else {}
        return self.layer.router(x_BTD, attributes_B, **fused)

    def w1_grad(self) -> Tensor:
        return _grad(self.layer.w1_EHD)


class MaskLoop(Layer):
    """A boolean mask for each expert and a Python loop over samples, as in the released code.

    One pair of linear layers for each attribute value's router; gates are a softmax over scores of
    which all but the k best are -inf.

    Args:
        weights: the parameters of a DMoE, by their names.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        w_A2ED, b_A2E = weights["router.w_A2ED"], weights["router.b_A2E"]
        self.clean, self.noise = (
            nn.ModuleList(
                _linear(w_2ED[i], b_2E[i]) for w_2ED, b_2E in zip(w_A2ED, b_A2E, strict=True)
            )
            for i in (0, 1)
        )
        self.experts = nn.ModuleList(
            mlp(*(weights[name][e] for name in ("w1_EHD", "b1_EH", "w2_EDH", "b2_ED")))
            for e in range(N_EXPERTS)
        )

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        gates, indices = [], []
        for x_TD, value in zip(x_BTD, attributes_B.tolist(), strict=True):
            scores_TE = self.clean[value](x_TD)
            if self.training:
                scale_TE = F.softplus(self.noise[value](x_TD))
                scores_TE = scores_TE + torch.randn_like(scores_TE) * scale_TE
            best_TK, indices_TK = scores_TE.topk(K, dim=-1)
            kept_TE = torch.full_like(scores_TE, float("-inf")).scatter(-1, indices_TK, best_TK)
            gates.append(kept_TE.softmax(dim=-1))
            indices.append(indices_TK)
        gates_TE, indices_TK = torch.cat(gates), torch.cat(indices)
        x_TD = x_BTD.flatten(0, 1)
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            mask_T = (indices_TK == e).any(dim=-1)
            if mask_T.any():
                y_TD[mask_T] += expert(x_TD[mask_T]) * gates_TE[mask_T, e, None]
        return y_TD.view_as(x_BTD)

    def w1_grad(self) -> Tensor:
        return torch.stack([_grad(expert.get_parameter("0.weight")) for expert in self.experts])


class Routed(Layer):
    """For layers that bring experts only: this package's router, and stacked parameters."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.router = AttributeRouter(
            problem.shape.dim, N_EXPERTS, K, attribute_sizes=problem.shape.values
        )
        weights = problem.weights
        self.router.to(problem.device, problem.dtype)
        self.router.load_state_dict(
            {name: weights[f"router.{name}"] for name in ("w_A2ED", "b_A2E")}
        )
        self.w1_EHD, self.b1_EH, self.w2_EDH, self.b2_ED = (
            nn.Parameter(weights[name].clone()) for name in ("w1_EHD", "b1_EH", "w2_EDH", "b2_ED")
        )

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        routing = self.router(x_BTD, attributes_B)
        gates_TK = routing.gates.to(x_BTD.dtype)
        return self.experts(x_BTD.flatten(0, 1), routing.expert_indices, gates_TK).view_as(x_BTD)

    @abstractmethod
    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """The gates' sum over the experts' outputs, (T, D)."""

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, DROPOUT, self.training)

    def w1_grad(self) -> Tensor:
        return _grad(self.w1_EHD)


class GemmLoop(Routed):
    """Tokens sorted by expert, a Python loop of dense matrix products over the experts."""

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        expert_R, order_R = indices_TK.flatten().to(torch.uint8).sort(stable=True)
        token_R = order_R // K
        counts = torch.bincount(expert_R, minlength=N_EXPERTS).tolist()
        outs = []
        for e, x_RD in enumerate(x_TD.index_select(0, token_R).split(counts)):
            h_RH = F.linear(x_RD, self.w1_EHD[e], self.b1_EH[e]).relu_()
            outs.append(F.linear(h_RH, self.w2_EDH[e], self.b2_ED[e]))
        out_RD = self.drop(torch.cat(outs)) * gates_TK.flatten()[order_R, None]
        return torch.zeros_like(x_TD).index_add(0, token_R, out_RD)


class GroupedMm(Routed):
    """Tokens sorted by expert, torch's grouped matrix product, biases added to each row."""

    def __init__(self, problem: Problem) -> None:
        if not hasattr(F, "grouped_mm"):
            raise Unavailable(f"torch {torch.__version__} has no F.grouped_mm")
        super().__init__(problem)

    def experts(self, x_TD: Tensor, indices_TK: Tensor, gates_TK: Tensor) -> Tensor:
        expert_R, order_R = indices_TK.flatten().sort()
        token_R = order_R // K
        edges_E = torch.arange(N_EXPERTS, device=x_TD.device)
        offsets_E = torch.searchsorted(expert_R, edges_E, right=True).int()
        x_RD = x_TD.index_select(0, token_R)
        z_RH = F.grouped_mm(x_RD, self.w1_EHD.mT, offs=offsets_E)
        h_RH = (z_RH + self.b1_EH[expert_R]).relu_()
        out_RD = F.grouped_mm(h_RH, self.w2_EDH.mT, offs=offsets_E) + self.b2_ED[expert_R]
        out_RD = self.drop(out_RD) * gates_TK.flatten()[order_R, None]
        return torch.zeros_like(x_TD).index_add(0, token_R, out_RD)


class Dense(Layer):
    """One MLP of hidden width k·H: the FLOPs of k experts, without a router."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        weights = problem.weights
        self.net = mlp(
            weights["w1_EHD"][:K].flatten(0, 1),
            weights["b1_EH"][:K].flatten(),
            weights["w2_EDH"][:K].movedim(0, 1).flatten(1),
            weights["b2_ED"][0],
        )

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        y_BTD: Tensor = self.net(x_BTD)
        return y_BTD


def mlp(w1_HD: Tensor, b1_H: Tensor, w2_DH: Tensor, b2_D: Tensor) -> nn.Sequential:
    """One expert of plain modules."""
    return nn.Sequential(_linear(w1_HD, b1_H), nn.ReLU(), _linear(w2_DH, b2_D), nn.Dropout(DROPOUT))


def _linear(w_OI: Tensor, b_O: Tensor) -> nn.Linear:
    linear = nn.Linear(w_OI.shape[1], w_OI.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(w_OI.clone()), nn.Parameter(b_O.clone())
    return linear


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


OWN = [
    Provider("eager", lambda problem: Ours(problem, "eager"), "ours"),
    Provider("triton", lambda problem: Ours(problem, "triton"), "ours"),
    Provider(
        "mask-loop", lambda problem: MaskLoop(problem.weights), "like the paper's released code"
    ),
    Provider("gemm-loop", GemmLoop, "our router"),
    Provider("grouped-mm", GroupedMm, "our router"),
    Provider("dense", Dense, "no experts: an MLP of equal active FLOPs", exact=False, routes=False),
]
