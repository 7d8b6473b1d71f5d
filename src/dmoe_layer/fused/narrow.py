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
from .launch import (
    IS_OLD,
    Windows,
    block_size,
    compute_capability,
    converted,
    launch,
    sum_chunks,
)


def fuses_forward(dim: int, dtype: torch.dtype) -> bool:
    """Whether experts of this width are computed at once, without a hidden layer in memory.

    In fp32, each number of which is split into three of tf32, few rows fit into registers: from
    D = 48 on they take half as many instructions again as two matrix products.
    """
    return dim <= (32 if dtype == torch.float32 else 128)


def fuses_backward(dim: int, dtype: torch.dtype, activation: str) -> bool:
    """Whether their gradients fit too.

    Never those of fp32: at D = 24 slices of 16 hidden units are all that fits, and their weights'
    gradients take 2400 instructions a row, as each of six slices computes its rows again.
    """
    if dtype == torch.float32:
        return False
    return dim <= (32 if ACTIVATIONS[activation].gated else 64)


class _Blocks(NamedTuple):
    """How a kernel of narrow experts is cut: rows, slice of the hidden layer, warps, stages.

    Chosen from what Triton 3.4, 3.6 and 3.9 make of them for compute capability 8.0 to 10.0:
    nothing spilled; then few instructions a row; then many warps to a multiprocessor.
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
    # More rows share the weights that a program reads; D = 24's hidden layer is three times 32.
    # Activations take registers, and so do the two halves of gated experts; ReLU takes none.
    is_half = call.dtype != torch.float32
    rows = 128 if is_half else 64
    capability = compute_capability(call.x.device)
    # Programs of compute capability 10.0 get few registers, so that more of them run at a time.
    is_few = IS_OLD and capability >= 100 and not call.relu
    if is_few:
        rows //= 2
    if call.dim > 32:
        hidden = 32 if call.relu and call.dim <= 64 else 16
        return _Blocks(rows, hidden, 8, 2 if is_few else 1)
    if (IS_OLD and call.autocast) or (call.gated and is_half and capability < 90):
        rows = 64
    if call.gated or is_few or (is_half and capability >= 100):
        # With two stages Triton 3.4 spills on 8.6 and 8.9.
        return _Blocks(rows, 16, 4, 3 if IS_OLD and is_half and capability in (86, 89) else 2)
    # On 8.6 and 8.9 wider slices of so many rows, or of fp32, would spill.
    is_tight = capability in (86, 89) and not (is_half and (call.relu or rows == 64))
    return _Blocks(rows, 16 if is_tight else 32, 4)


def _row_blocks(call: ExpertCall) -> _Blocks:
    # A stage more, which reads nothing ahead, leaves more registers to a program.
    capability = compute_capability(call.x.device)
    if call.dim > 32:
        is_tight = capability >= 100
    else:
        is_tight = IS_OLD and capability in (86, 89) and call.act_opts["ACTIVATION"] == "gelu"
    return _Blocks(64, 32, _warps(call), 2 if is_tight else 1)


def _weight_blocks(call: ExpertCall) -> _Blocks:
    """A slice's sums stand in registers, and rows are read up to two tiles ahead.

    Five stages are two tiles, for a row's place in x is read before it; three or four are one. The
    two halves of gated experts leave registers for one tile, if its rows are whole vectors, and
    with Triton 3.4 or on compute capability 10.0 for one of half as many rows. So do the operands
    of D > 32 before 9.0, whose matrix products read shared memory.
    """
    capability = compute_capability(call.x.device)
    if call.gated:
        rows = 32 if IS_OLD or capability >= 100 else 64
        return _Blocks(rows, 16, 4, 3 if call.has_vectors else 1)
    if call.dim <= 32:
        return _Blocks(64, 32, 4, 3 if IS_OLD else 5)
    if capability >= 90:
        return _Blocks(32, 64, _warps(call), 4 if capability >= 100 else 5)
    # Wider slices spill with Triton 3.4 or on 8.6 and 8.9, and those of GELU with Triton 3.6.
    is_tight = IS_OLD or capability in (86, 89) or call.act_opts["ACTIVATION"] == "gelu"
    return _Blocks(32, 16 if is_tight else 32, 4, 3)


def _warps(call: ExpertCall) -> int:
    # The same rows in more threads take fewer registers of each, and more instructions.
    return 8 if IS_OLD and (call.dim > 32 or call.gated) else 4


def forward(call: ExpertCall) -> Tensor:
    """The tokens' outputs, (T, D)."""
    blocks, (y, rest) = _forward_blocks(call), call.pair_sums()
    launch(
        narrow.mlp_kernel, (call.programs(blocks.rows),), y,
        call.x, call.order, call.tiles, call.gates, call.w1, call.b1, call.w2, call.b2, call.kept,
        y, rest, call.scale, **_options(call, blocks),
    )  # fmt: skip
    return call.sum_pairs(y, rest)


def backward(call: ExpertCall, dy: Tensor, of_rows: bool, of_weights: bool) -> BackwardOutputs:
    """The gradients of x and gates if ``of_rows``, of the weights if ``of_weights``."""
    dy = converted(dy, call.dtype)  # as in ``ExpertCall``
    dx, dgates = _of_rows(call, dy) if of_rows else (None, None)
    return BackwardOutputs(dx, dgates, _of_weights(call, dy) if of_weights else [])


def _of_rows(call: ExpertCall, dy: Tensor) -> tuple[Tensor, Tensor]:
    blocks, (dx, rest) = _row_blocks(call), call.pair_sums()
    dgates = torch.empty_like(call.gates)
    launch(
        narrow.mlp_backward_kernel, (call.programs(blocks.rows),), dy,
        dy, call.x, call.order, call.tiles, call.gates, call.w1, call.b1, call.w2, call.b2,
        call.kept, dx, rest, dgates, call.scale, **_options(call, blocks),
    )  # fmt: skip
    return call.sum_pairs(dx, rest), dgates


def _of_weights(call: ExpertCall, dy: Tensor) -> list[Tensor]:
    blocks = _weight_blocks(call)
    slices = -(-call.hidden // blocks.hidden)
    # Each expert has a chunk that is not full: with these too a GPU is filled so many times.
    programs = max(PROGRAMS - slices * call.n_experts, PROGRAMS // 2)
    # The shares of all chunks together are about as large as x: no more chunks than that.
    least = call.k * (call.first_rows + call.hidden)
    windows = Windows.of(call.tiles.shape[0], max(call.rows * slices // programs, least))
    n_chunks = windows.number + call.n_experts
    first, second = (call.first_rows, call.dim), (call.dim, call.hidden)
    shapes = (first, first[:1], second, second[:1])
    w1, b1, w2, b2 = (call.empty(n_chunks, *shape, dtype=torch.float32) for shape in shapes)
    launch(
        narrow.weight_gradients_kernel, (n_chunks * slices,), dy,
        dy, call.x, call.order, call.tiles, call.offsets, call.gates, call.w1, call.b1, call.w2,
        call.kept, w1, b1, w2, b2, *windows, call.scale, n_experts=call.n_experts,
        **_options(call, blocks),
    )  # fmt: skip
    return sum_chunks(call.offsets, windows, [w1, b1, w2, b2])


def _options(call: ExpertCall, blocks: _Blocks) -> dict[str, Any]:
    return {
        **call.sizes, **call.offset_opts(call.dim), **call.act_opts, **call.gemm_opts,
        **blocks.options(call.dim),
    }  # fmt: skip
