"""A provider is an implementation of the layer that is measured beside others.

Every provider is built from the parameters of one DMoE. In training mode all of them add the
router's noise and drop a tenth of the experts' outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_layer import AttributeRouter

from ..paper import DROPOUT
from .problem import Problem


class Unavailable(Exception):
    """Says why a provider cannot run here, or not at this shape."""


class Layer(nn.Module):
    """A provider's layer: it is called with (x_BTD, attributes_B), and has w1's gradient."""

    def w1_grad(self) -> Tensor:
        """(E, H, D). Layers of other maths have none: they are not checked."""
        raise Unavailable("it computes something else than the layer, so there is no such gradient")


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


class Routed(Layer):
    """For layers that bring experts only: this package's router, and stacked parameters."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        shape, weights = problem.shape, problem.weights
        self.n_experts, self.k = shape.experts, shape.k
        self.router = AttributeRouter(
            shape.dim, self.n_experts, self.k, attribute_sizes=shape.values
        )
        self.router.to(problem.device, problem.dtype)
        self.router.load_state_dict(
            {name: weights[f"router.{name}"] for name in ("w_A2ED", "bias")}
        )
        self.w1_EHD, self.w1_bias, self.w2_EDH, self.w2_bias = (
            nn.Parameter(weights[name].clone())
            for name in ("w1_EHD", "w1_bias", "w2_EDH", "w2_bias")
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
        return gradient(self.w1_EHD)


def gradient(parameter: Tensor) -> Tensor:
    """Zero where none was computed."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
