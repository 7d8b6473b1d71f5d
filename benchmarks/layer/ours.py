"""The layer itself, by each of its backends."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dmoe_layer import DMoE

from ..paper import DROPOUT, N_EXPERTS, K
from .problem import Problem
from .provider import Layer, Provider, Unavailable, gradient


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
        if self.backend == "triton":
            return self.layer.router(x_BTD, attributes_B, fused=True)
        return self.layer.router(x_BTD, attributes_B)

    def w1_grad(self) -> Tensor:
        return gradient(self.layer.w1_EHD)


OURS = [Provider(name, partial(Ours, backend=name), "ours") for name in ("eager", "triton")]
