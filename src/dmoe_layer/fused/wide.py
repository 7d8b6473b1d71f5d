"""Launches of the wide experts' kernels: grouped matrix products, the hidden layer between them.

In backward the hidden layer is what forward has kept or, where rows are many, computed again, a
segment of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .call import PROGRAMS, BackwardOutputs, ExpertCall
from .kernels import wide
from .launch import launch, most_tiles, sum_chunks

# Rows of a segment that fill a GPU of 132 multiprocessors.
LEAST_ROWS = 16384


class Segment(NamedTuple):
    """Rows of the sorted order whose hidden layer is in memory at one time.

    ``offsets`` are the experts' own within the segment.
    """

    first: int
    rows: int
    offsets: Tensor


def segments(call: ExpertCall, at_once: bool) -> Iterator[Segment]:
    """All rows at once; or so many that their hidden layer is about as large as x."""
    if at_once or call.rows * call.first_rows <= call.x.numel():
        yield Segment(0, call.rows, call.offsets)
        return
    most = max(call.x.numel() // call.first_rows, LEAST_ROWS)
    for first in range(0, call.rows, most):
        rows = min(most, call.rows - first)
        yield Segment(first, rows, call.offsets.clamp(first, first + rows))


def _gemm_blocks(call: ExpertCall) -> dict[str, int]:
    """The blocks of the wide experts' GEMMs.

    In bf16 and fp16 two programs of most of these kernels fit a Hopper multiprocessor, so that one
    multiplies while the other stores; 256 columns would spill in two of the four.
    """
    if call.dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def _programs(
    call: ExpertCall, segment: Segment, columns: int, blocks: dict[str, int]
) -> tuple[int]:
    n_tiles = most_tiles(segment.rows, blocks["ROWS"], call.n_experts)
    return (n_tiles * -(-columns // blocks["COLUMNS"]),)


def forward(call: ExpertCall, keep: bool) -> tuple[Tensor, Tensor]:
    """Each pair's gated output, (R, D), pair t·k + j in row t·k + j; the hidden layer to keep."""
    slots = call.empty(call.rows, call.dim)
    kept = call.empty(0)
    for segment in segments(call, keep):
        z, h = _hidden(call, segment)
        _rows_product(call, segment, h, call.w2, (call.hidden, 1), slots, call.b2, call.gates)
        if keep:
            kept = z
    return slots, kept


def _hidden(call: ExpertCall, segment: Segment) -> tuple[Tensor, Tensor]:
    """The hidden layer of a segment before and after its activation; of ReLU twice the latter.

    Before a gated activation it is twice as wide.
    """
    blocks = _gemm_blocks(call)
    h = call.empty(segment.rows, call.hidden)
    z = h if call.relu else call.empty(segment.rows, call.first_rows)
    launch(
        wide.hidden_kernel, _programs(call, segment, call.first_rows, blocks), h,
        call.x, call.order, segment.offsets, call.w1, call.b1, None if call.relu else z, h,
        segment.first, K=call.k, **call.sizes, **call.gemm_opts, **call.act_opts, **blocks,
    )  # fmt: skip
    return z, h


def _rows_product(
    call: ExpertCall,
    segment: Segment,
    rows: Tensor,
    weight: Tensor,
    strides: tuple[int, int],
    slots: Tensor,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
) -> None:
    """slots[pair] = weight · row, (D, n) by n numbers; with gates also bias, dropout and gate."""
    blocks, sizes = _gemm_blocks(call), {**call.sizes, "hidden": rows.shape[1]}
    launch(
        wide.output_kernel, _programs(call, segment, call.dim, blocks), rows,
        rows, call.order, segment.offsets, weight, bias, gates, slots, segment.first,
        *call.drop_args, stride_d=strides[0], stride_h=strides[1],
        DROP=gates is not None and call.drop_opts["DROP"],
        **sizes, **call.gemm_opts, **blocks,
    )  # fmt: skip


def backward(
    call: ExpertCall, dy: Tensor, kept: Tensor, of_rows: bool, of_weights: bool
) -> BackwardOutputs:
    """The gradients of x and gates if ``of_rows``, of the weights if ``of_weights``.

    ``kept`` is the hidden layer, (R, H) or, if gated, (R, 2H); or empty.
    """
    blocks = _gemm_blocks(call)
    # Half as many columns, for da, z and h stand in registers together: with all of them Triton 3.7
    # spills on compute capability 8.0, even where the activation is ReLU. With both halves of a
    # gated expert's z, half of that again.
    sliced = {**blocks, "COLUMNS": 32 if call.gated else 64}
    slots = call.empty(call.rows, call.dim)
    dgates = call.empty(1 + -(-call.hidden // sliced["COLUMNS"]), call.rows, dtype=torch.float32)
    totals: list[Tensor] = []
    parts = list(segments(call, len(kept) > 0))
    for segment in parts:
        do, gated = call.empty(2, segment.rows, call.dim).unbind()
        launch(
            wide.gather_gradient_kernel, (most_tiles(segment.rows, 32, call.n_experts),), dy,
            dy, call.order, segment.offsets, call.gates, call.b2, do, gated, dgates,
            segment.first, *call.drop_args, n_experts=call.n_experts, dim=call.dim, K=call.k,
            ROWS=32, COLUMNS=128, **call.expert_opts, **call.drop_opts,
        )  # fmt: skip
        z = kept if len(kept) else _hidden(call, segment)[0]
        h = z if call.relu else call.empty(segment.rows, call.hidden)
        dz = torch.empty_like(z)
        launch(
            wide.hidden_backward_kernel, _programs(call, segment, call.hidden, sliced), dy,
            do, call.order, segment.offsets, call.gates, call.w2, z, None if call.relu else h, dz,
            dgates, segment.first, call.rows, call.drop_args[-1],
            **call.sizes, **call.gemm_opts, **call.act_opts, **sliced,
        )  # fmt: skip
        if of_rows:
            _rows_product(call, segment, dz, call.w1, (1, call.dim), slots)
        if not of_weights:
            continue
        # A sum over several segments has a term for each: fp32.
        dtype = call.parameter_dtype if len(parts) == 1 else torch.float32
        terms = [
            *_weight_gradient(call, segment, dz, call.x, dtype, gather=True),
            *_weight_gradient(call, segment, gated, h, dtype, gather=False),
        ]
        totals = [t.add_(n) for t, n in zip(totals, terms, strict=True)] if totals else terms
    return BackwardOutputs(slots, dgates.sum(dim=0).view(call.gates.shape), totals)


def _weight_gradient(
    call: ExpertCall, segment: Segment, a: Tensor, b: Tensor, dtype: torch.dtype, gather: bool
) -> tuple[Tensor, Tensor]:
    """Σ a[row] · b[row]ᵀ and Σ a[row] of each expert: (E, a's width, b's width), (E, a's width)."""
    blocks = _gemm_blocks(call)
    columns, sides = blocks["COLUMNS"], (a.shape[1], b.shape[1])
    n_tiles = -(-sides[0] // columns) * -(-sides[1] // columns)
    # Where the weights alone are tiles enough for a GPU, an expert's rows need not be shared out.
    split = n_tiles * call.n_experts < PROGRAMS // 2
    chunk = max(segment.rows * n_tiles // PROGRAMS, 512)
    n_chunks = most_tiles(segment.rows, chunk, call.n_experts) if split else call.n_experts
    shares, bias = (
        call.empty(n_chunks, *shape, dtype=torch.float32 if split else dtype)
        for shape in (sides, sides[:1])
    )
    launch(
        wide.weight_backward_kernel, (n_chunks * n_tiles,), a,
        a, b, call.order, segment.offsets, shares, bias, segment.first, chunk,
        a_columns=sides[0], b_columns=sides[1], n_experts=call.n_experts, K=call.k,
        GATHER=gather, SPLIT=split, ROWS=blocks["DEPTH"], COLUMNS=columns, **call.gemm_opts,
        num_warps=blocks["num_warps"], num_stages=blocks["num_stages"],
    )  # fmt: skip
    if not split:
        return shares, bias
    return sum_chunks(shares, segment.offsets, chunk), sum_chunks(bias, segment.offsets, chunk)
