"""Launches of the narrow experts' kernels, which never let the hidden layer out of registers.

In backward, where the sums of the weights' gradients need registers too, they end sooner than in
forward; beyond, ``wide`` takes over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from .call import PROGRAMS, BackwardOutputs, ExpertCall
from .kernels import narrow
from .launch import block_size, launch, most_tiles, sum_chunks


def fuses_forward(dim: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether experts of this width fit into registers without spilling.

    Numbers of fp32, each split into three of tf32, take more of them, and so do the two halves of
    gated experts.
    """
    gated = ACTIVATIONS[activation].gated
    return dim <= (64 if gated and dtype == torch.float32 else 128)


def fuses_backward(dim: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether their gradients fit too."""
    if ACTIVATIONS[activation].gated:
        return dim <= 32 and dtype != torch.float32
    return dim <= (32 if dtype == torch.float32 else 64)


class _Blocks(NamedTuple):
    """How a kernel of narrow experts is cut: rows, slice of the hidden layer, warps, stages.

    Chosen from what Triton's compiler makes of them for compute capability 8.0 and 9.0: nothing
    spilled; then few instructions a row; then many warps to a multiprocessor. 64 rows to four warps
    are the least that a Hopper GPU's own matrix instructions take.
    """

    rows: int
    hidden: int
    warps: int
    stages: int = 1

    def options(self, dim: int) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "HIDDEN": self.hidden,
            "DIM": block_size(dim),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _forward_blocks(call: ExpertCall) -> _Blocks:
    if call.dtype == torch.float32:
        if call.dim <= 32:
            return _Blocks(64, 32, 4, 2)
        if call.dim <= 64:
            return _Blocks(64, 16 if call.gated else 32, 8)
        return _Blocks(32, 32, 8)
    # More rows share the weights that a program reads; D = 24's hidden layer is three times 32.
    if call.dim <= 32:
        return _Blocks(128, 32, 4)
    if call.dim <= 64:
        return _Blocks(128, 32 if call.gated else 64, 8, 2)
    return _Blocks(128, 16, 8) if call.gated else _Blocks(64, 32, 8)


def _backward_blocks(call: ExpertCall) -> tuple[_Blocks, _Blocks]:
    """For the gradients of rows, and of weights: these sum a slice's in registers."""
    if call.dtype == torch.float32:
        return _Blocks(64, 32, 4), _Blocks(32, 16, 8)
    if call.gated:
        return _Blocks(64, 32, 4), _Blocks(64, 32, 4)
    return _Blocks(64, 32, 4), _Blocks(64, 64, 4) if call.dim <= 32 else _Blocks(128, 64, 8)


def forward(call: ExpertCall) -> Tensor:
    """Each pair's gated output: (R, D), pair t·k + j in row t·k + j."""
    blocks = _forward_blocks(call)
    slots = call.empty(call.rows, call.dim)
    launch(
        narrow.mlp_kernel, (most_tiles(call.rows, blocks.rows, call.n_experts),), call.x,
        call.x, call.order, call.offsets, call.gates, call.w1, call.b1, call.w2, call.b2, slots,
        *call.drop_args, K=call.k, **call.sizes,
        **call.gemm_opts, **call.act_opts, **call.drop_opts, **blocks.options(call.dim),
    )  # fmt: skip
    return slots


def backward(call: ExpertCall, dy: Tensor, of_rows: bool, of_weights: bool) -> BackwardOutputs:
    """The gradients of x and gates if ``of_rows``, of the weights if ``of_weights``."""
    slots, dgates = call.empty(call.rows, call.dim), torch.empty_like(call.gates)

    def run(blocks: _Blocks, chunk: int, slices: int, with_rows: bool, *shares: Any) -> None:
        launch(
            narrow.mlp_backward_kernel, (most_tiles(call.rows, chunk, call.n_experts), slices), dy,
            dy, call.x, call.order, call.offsets, call.gates, call.w1, call.b1, call.w2, call.b2,
            slots, dgates, *shares, chunk, *call.drop_args,
            OF_ROWS=with_rows, OF_WEIGHTS=shares[0] is not None, K=call.k, **call.sizes,
            **call.gemm_opts, **call.act_opts, **call.drop_opts, **blocks.options(call.dim),
        )  # fmt: skip

    row_blocks, blocks = _backward_blocks(call)
    at_once = of_rows and of_weights and call.hidden <= blocks.hidden
    if of_rows and not at_once:
        run(row_blocks, row_blocks.rows, 1, True, None, None, None, None)
    if not of_weights:
        return BackwardOutputs(slots, dgates, [])
    slices = -(-call.hidden // blocks.hidden)
    # The shares of all chunks together are about as large as x: no more chunks than that.
    least = call.k * (call.first_rows + call.hidden)
    chunk = max(call.rows * slices // PROGRAMS, least, blocks.rows)
    chunk = -(-chunk // blocks.rows) * blocks.rows
    n_chunks = most_tiles(call.rows, chunk, call.n_experts)
    first, second = (call.first_rows, call.dim), (call.dim, call.hidden)
    shapes = (first, first[:1], second, second[:1])
    shares = [call.empty(n_chunks, *shape, dtype=torch.float32) for shape in shapes]
    run(blocks, chunk, slices, at_once, *shares)
    return BackwardOutputs(
        slots, dgates, [sum_chunks(share, call.offsets, chunk) for share in shares]
    )
