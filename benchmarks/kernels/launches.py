"""Records the layer's own kernel launches, without running them.

The one file outside ``dmoe_layer`` that uses other than its public names: the kernels' backend.
What needs Triton is imported when it is called: not every system has it.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch

from dmoe_layer.activations import ACTIVATIONS
from dmoe_layer.backend import load
from dmoe_layer.tensors import ExpertOptions, ExpertWeights, RouterWeights

from ..paper import DROPOUT, HIDDEN_RATIO

_TOKENS, _VALUES = 512, 3  # of both samples together; of their attribute


class Launch(NamedTuple):
    """A recorded launch: the kernel, what it was given, and how it is to be compiled."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def layer_launches(
    dim: int, dtype: torch.dtype, activation: str, n_experts: int, k: int, capability: int = 90
) -> list[Launch]:
    """The launches of one training step of the layer at this width, for such a GPU."""
    from triton.runtime import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    # In place of what Triton does for ``kernel[grid](...)``.
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch("dmoe_layer.fused.narrow.is_hopper", return_value=capability >= 90),
    ):
        _step(dim, dtype, activation, n_experts, k)
    return launches


def _step(dim: int, dtype: torch.dtype, activation: str, n_experts: int, k: int) -> None:
    """Forward and backward of the kernels' backend, with noise and dropout, on the CPU."""

    def parameter(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    hidden, seed = HIDDEN_RATIO * dim, torch.tensor(2**61)
    first = 2 * hidden if ACTIVATIONS[activation].gated else hidden
    x_BTD, rows_BN = parameter(2, _TOKENS // 2, dim), torch.zeros(2, 1, dtype=torch.long)
    router = RouterWeights(parameter(_VALUES, 2, n_experts, dim), parameter(_VALUES, 2, n_experts))
    weights = ExpertWeights(
        w1_EHD=parameter(n_experts, first, dim),
        b1_EH=parameter(n_experts, first),
        w2_EDH=parameter(n_experts, dim, hidden),
        b2_ED=parameter(n_experts, dim),
    )
    options = ExpertOptions(activation, DROPOUT, seed, dtype)
    backend = load("triton")
    routing, plan = backend.route(x_BTD, router, rows_BN, None, k, seed)
    y_TD = backend.experts(x_BTD.flatten(0, 1), plan, routing.gates, weights, options)
    (y_TD.sum() + routing.logits.sum()).backward()
