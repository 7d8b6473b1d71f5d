"""Records the layer's own kernel launches, without running them.

The one file outside ``dmoe_layer`` that reaches into its kernels' launches. What needs Triton is
imported when it is called: not every system has it.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch

from ..paper import DROPOUT, HIDDEN_RATIO

_TOKENS, _VALUES = 512, 3  # of the sample; of its attribute


class Launch(NamedTuple):
    """A recorded launch: the kernel, what it was given, and how it is to be compiled."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def layer_launches(
    dim: int, dtype: torch.dtype, activation: str, n_experts: int, k: int
) -> list[Launch]:
    """The launches of one training step of the layer at this width."""
    from dmoe_layer import fused, fused_mlp, fused_router, launch

    launches: list[Launch] = []

    def note(kernel: Any, grid: Any, on: Any, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    hidden, seed = HIDDEN_RATIO * dim, torch.tensor(2**61)
    x_BTD = zeros(2, _TOKENS // 2, dim)
    router = (
        zeros(_VALUES, 2, n_experts, dim),
        zeros(_VALUES, 2, n_experts),
        torch.zeros(2, 1).long(),
        None,
    )
    weights = (
        zeros(n_experts, hidden, dim),
        zeros(n_experts, hidden),
        zeros(n_experts, dim, hidden),
        zeros(n_experts, dim),
    )
    options = (activation, DROPOUT, seed, dtype)
    with (
        mock.patch.object(fused_mlp, "launch", note),
        mock.patch.object(fused_router, "launch", note),
        mock.patch.object(launch, "launch", note),
    ):
        logits, indices, gates, order, offsets = fused_router.fused_route(x_BTD, *router, k, seed)
        experts = (x_BTD.flatten(0, 1), order, offsets, gates, *weights)
        y, kept = fused._fused_experts(*experts, *options, dim >= 128)
        fused.fused_experts_backward(y, kept, *experts, *options, True, True)
        fused_router.fused_route_backward(logits, gates, indices, gates, x_BTD, *router, seed)
    return launches
