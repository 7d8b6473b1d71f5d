"""The layer itself, by each of its backends."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from torch import Tensor

from dmoe_layer import DMoE

from ..paper import DROPOUT
from .problem import Problem
from .provider import Layer, Provider, Unavailable, gradient


class Ours(Layer):
    """DMoE with one of its backends."""

    def __init__(self, problem: Problem, backend: str) -> None:
        super().__init__()
        if backend == "triton" and problem.device.type == "cpu":
            raise Unavailable("the kernels run on a GPU; Triton's interpreter is not timed")
        self.layer = DMoE(
            problem.shape.dim,
            n_experts=problem.shape.experts,
            k=problem.shape.k,
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

    def route(self, x_BTD: Tensor, attributes_B: Tensor) -> None:
        """The router alone, by the layer's own backend."""
        if self.layer.backend == "eager":  # as a router does that is called alone
            self.layer.router(x_BTD, attributes_B)
            return
        # Only the layer calls its router with the backend's own route, so the layer is called, and
        # its call is ended once the router has returned. Python's work before that is not counted:
        # of kernels their own times count.
        with self.layer.router.register_forward_hook(_end_the_call), suppress(_EndOfCall):
            self.layer(x_BTD, attributes_B)

    def w1_grad(self) -> Tensor:
        return gradient(self.layer.w1_EHD)


class _EndOfCall(Exception):
    """Ends a call of the layer behind its router."""


def _end_the_call(*_: object) -> None:
    raise _EndOfCall


OURS = [Provider(name, partial(Ours, backend=name), "ours") for name in ("eager", "triton")]
