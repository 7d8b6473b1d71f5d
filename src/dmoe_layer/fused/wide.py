"""Launches the kernels of wide experts: grouped matrix products with a hidden layer in memory.

Backward takes the hidden layer that forward saved. If there are many rows, it computes the hidden
layer again, a segment of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .call import PROGRAMS, BackwardOutputs, ExpertCall
from .kernels import wide
from .kernels.common import TILE
from .launch import (
    IS_OLD,
    Windows,
    block_size,
    compute_capability,
    launch,
    needs_int64,
    sum_chunks,
)

# Rows of a segment that fill a GPU of 132 multiprocessors.
LEAST_ROWS = 16384


class Segment(NamedTuple):
    """Rows of the sorted order whose hidden layer is in memory at one time.

    ``tiles`` are those that have rows of it, and maybe some before and after these.
    """

    first: int
    rows: int
    tiles: Tensor

    @property
    def bounds(self) -> tuple[int, int]:
        return self.first, self.first + self.rows


def segments(call: ExpertCall, at_once: bool) -> Iterator[Segment]:
    """All rows at once; or so many that their hidden layer is about as large as x."""
    if at_once or call.rows * call.first_rows <= call.x.numel():
        yield Segment(0, call.rows, call.tiles)
        return
    most = max(call.x.numel() // call.first_rows, LEAST_ROWS)
    for first in range(0, call.rows, most):
        rows = min(most, call.rows - first)
        # Where every tile is full, row r is in tile r // TILE, and each expert has one that is not.
        first_tile, last_tile = first // TILE.value, (first + rows - 1) // TILE.value
        tiles = call.tiles[first_tile : last_tile + call.n_experts + 1]
        yield Segment(first, rows, tiles)


class _Blocks(NamedTuple):
    """How a GEMM is cut: rows, columns and depth of a tile; warps; stages of the pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def grid(self, tiles: int, columns: int) -> tuple[int]:
        """A program for every tile and every block of columns."""
        return (tiles * (TILE.value // self.rows) * -(-columns // self.columns),)


def _gemm_blocks(call: ExpertCall, columns: int, most: int = 256) -> _Blocks:
    """The blocks of a product with so many columns, of which a program has ``most`` at most.

    All of them fit the 99 KiB of shared memory that GPUs of compute capability 8.6 and 8.9 have.
    """
    if call.dtype == torch.float32:
        return _Blocks(64, min(64, most, block_size(columns)), 32, 4, 2)
    if columns >= most == 256 and not (call.dim % 32 or call.hidden % 32):
        capability = compute_capability(call.x.device)
        if capability in (86, 89) or (IS_OLD and capability < 90):
            return _Blocks(128, 256, 32, 8, 4)  # Deeper ones take fewer instructions, but spill.
        return _Blocks(128, 256, 64, 8, 2)
    blocks = _Blocks(128, min(most, 128, block_size(columns)), 64, 8, 3)
    return blocks if call.has_vectors else blocks._replace(depth=32, stages=4)


def _is_unrolled(call: ExpertCall) -> bool:
    """Whether a product over D has many passes, but few enough that the assembler unrolls its loop.

    So it was seen at these widths before compute capability 9.0. Unrolled, the passes take more
    registers than a loop.
    """
    return 512 <= call.dim <= 640


def _hidden_backward_blocks(call: ExpertCall) -> _Blocks:
    # Few columns, for da, z and h stand in registers together: with all of them Triton 3.7 spills
    # on compute capability 8.0, even where the activation is ReLU. With both halves of a gated
    # expert's z, half of that again; and with an activation's registers a tile half as deep. Half
    # as many rows or columns, with a fifth more instructions, only where GPUs and compilers need
    # that.
    blocks = _gemm_blocks(call, call.hidden, 32 if call.gated else 64)
    if call.relu or call.dtype == torch.float32:
        return blocks
    capability = compute_capability(call.x.device)
    if IS_OLD or capability in (86, 89):
        blocks = blocks._replace(columns=min(blocks.columns, 32))
    if call.gated:
        few = capability >= 100 or (capability in (86, 89) and _is_unrolled(call))
    else:
        few = capability < 90
    if not (IS_OLD or few):
        return blocks._replace(depth=32, stages=4)
    # In fp16 Triton 3.9 spills GELU by tanh on 8.6 and 8.9: at some widths in few warps, at others
    # in many.
    is_tight = (
        call.act_opts["ACTIVATION"] == "gelu_tanh"
        and call.dtype == torch.float16
        and capability in (86, 89)
        and not IS_OLD
    )
    warps = 8 if capability >= 90 or (is_tight and call.dim < 512) else 4
    return blocks._replace(rows=64, depth=32, stages=4, warps=warps)


def _weight_blocks(call: ExpertCall) -> _Blocks:
    most = 128 if call.has_vectors else 64
    blocks = _gemm_blocks(call, max(call.dim, call.first_rows), most)
    if call.dtype == torch.float32:
        if not IS_OLD:
            return blocks
        # At these widths a tile half as deep spills on compute capability 10.0; at others a deeper
        # one does, on one GPU or another.
        if call.dim in (32, 64):
            return blocks._replace(depth=32, warps=8, stages=3 if call.gated else 2)
        return blocks._replace(depth=16, warps=8)
    if compute_capability(call.x.device) >= 90:
        return blocks
    # Of a deeper tile the operands, in registers, would leave too few to the sums.
    return blocks._replace(depth=32, stages=4)


def forward(call: ExpertCall, keep: bool) -> tuple[Tensor, Tensor]:
    """The tokens' outputs, (T, D), and the hidden layer to keep."""
    y, rest = call.pair_sums()
    for segment in segments(call, keep):
        z, h = _hidden(call, segment)
        _rows_product(
            call, segment, h, call.w2, (call.hidden, 1), y, rest, call.b2, call.gates, call.kept
        )
    # The hidden layer is kept only if all rows are in one segment.
    return call.sum_pairs(y, rest), z if keep else call.empty(0)


def _hidden(call: ExpertCall, segment: Segment) -> tuple[Tensor, Tensor]:
    """The hidden layer of a segment before and after its activation; of ReLU twice the latter.

    Before a gated activation it is twice as wide.
    """
    # On compute capability 10.0 both halves of a gated expert take registers that 256 columns lack.
    # Before 9.0 those of GELU do at some widths.
    capability, activation = compute_capability(call.x.device), call.act_opts["ACTIVATION"]
    if call.gated:
        is_tight = capability >= 100
    else:
        is_tight = capability < 90 and activation == "gelu" and _is_unrolled(call)
    blocks = _gemm_blocks(call, call.first_rows, 128 if is_tight else 256)
    h = call.empty(segment.rows, call.hidden)
    z = h if call.relu else call.empty(segment.rows, call.first_rows)
    launch(
        wide.hidden_kernel, blocks.grid(segment.tiles.shape[0], call.first_rows), h,
        call.x, call.order, segment.tiles, call.w1, call.b1, None if call.relu else z, h,
        *segment.bounds, **call.sizes, **call.wide_offset_opts, **call.gemm_opts, **call.act_opts,
        **blocks.options,
    )  # fmt: skip
    return z, h


def _rows_product(
    call: ExpertCall,
    segment: Segment,
    rows: Tensor,
    weight: Tensor,
    strides: tuple[int, int],
    y: Tensor,
    rest: Tensor | None,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """The pairs' weight · row, (D, n) by n numbers; with bias, dropout and gate where given."""
    # Under autocast y is in fp32: to write it takes twice the registers. So do offsets of 64 bits.
    is_tight = call.autocast or needs_int64(call.rows * call.wide_width)
    blocks = _gemm_blocks(call, call.dim, 128 if is_tight else 256)
    if IS_OLD and call.autocast:
        blocks = blocks._replace(rows=64, warps=4)
    sizes = {**call.sizes, "hidden": rows.shape[1]}
    launch(
        wide.output_kernel, blocks.grid(segment.tiles.shape[0], call.dim), rows,
        rows, call.order, segment.tiles, weight, bias, gates, kept, y, rest, *segment.bounds,
        call.scale, stride_d=strides[0], stride_h=strides[1],
        **sizes, **call.wide_offset_opts, **call.gemm_opts, **blocks.options,
    )  # fmt: skip


def backward(
    call: ExpertCall, dy: Tensor, kept: Tensor, of_rows: bool, of_weights: bool
) -> BackwardOutputs:
    """The gradients of x and gates if ``of_rows``, and of the weights if ``of_weights``.

    ``kept`` is the saved hidden layer, (R, H) or, if gated, (R, 2H), or empty.
    """
    blocks = _hidden_backward_blocks(call)
    dx, rest = call.pair_sums() if of_rows else (None, None)
    dgates = call.empty(1 + -(-call.hidden // blocks.columns), call.rows, dtype=torch.float32)
    totals: list[Tensor] = []
    parts = list(segments(call, kept.shape[0] > 0))
    for segment in parts:
        do, gated = call.empty(2, segment.rows, call.dim).unbind()
        launch(
            wide.gather_gradient_kernel, (segment.tiles.shape[0] * (TILE.value // 16),), dy,
            dy, call.order, segment.tiles, call.gates, call.b2, call.kept, do, gated, dgates,
            *segment.bounds, call.scale, dim=call.dim, K=call.k, **call.wide_offset_opts,
            ROWS=16, COLUMNS=block_size(min(call.dim, 128)),
            num_warps=4 if call.autocast else 2,
        )  # fmt: skip
        z = kept if kept.shape[0] else _hidden(call, segment)[0]
        h = z if call.relu else call.empty(segment.rows, call.hidden)
        dz = torch.empty_like(z)
        launch(
            wide.hidden_backward_kernel, blocks.grid(segment.tiles.shape[0], call.hidden), dy,
            do, call.order, segment.tiles, call.gates, call.w2, z, None if call.relu else h, dz,
            dgates, *segment.bounds, call.rows, call.scale, dim=call.dim, hidden=call.hidden,
            **call.wide_offset_opts, **call.gemm_opts, **call.act_opts, **blocks.options,
        )  # fmt: skip
        if dx is not None:
            _rows_product(call, segment, dz, call.w1, (1, call.dim), dx, rest)
        if not of_weights:
            continue
        # A sum over several segments has a term for each: fp32.
        dtype = call.parameter_dtype if len(parts) == 1 else torch.float32
        terms = _of_weights(call, segment, dz, gated, h, dtype)
        totals = [t.add_(n) for t, n in zip(totals, terms, strict=True)] if totals else terms
    if dx is None:
        return BackwardOutputs(None, None, totals)
    return BackwardOutputs(
        call.sum_pairs(dx, rest), dgates.sum(dim=0).view(call.gates.shape), totals
    )


def _of_weights(
    call: ExpertCall, segment: Segment, dz: Tensor, gated: Tensor, h: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The gradients of w1, b1, w2 and b2 by a segment's rows, in ``dtype`` or in fp32."""
    dim, hidden, first_rows = call.dim, call.hidden, call.first_rows
    blocks = _weight_blocks(call)
    of_dim, of_hidden, of_first = (-(-n // blocks.columns) for n in (dim, hidden, first_rows))
    n_tiles = of_dim * (of_first + of_hidden)
    # Where the weights alone are tiles enough for a GPU, an expert's rows need not be shared out.
    split = n_tiles * call.n_experts < PROGRAMS
    if split:
        rows = max(segment.rows * n_tiles // (2 * PROGRAMS), 512)
        first_tile = segment.first // TILE.value
        windows = Windows.of(segment.tiles.shape[0], rows, first_tile)
    else:
        windows = Windows(0, 1, 0)
    n_chunks = windows.number + call.n_experts
    shares = [
        call.empty(n_chunks, *shape, dtype=torch.float32 if split else dtype)
        for shape in ((first_rows, dim), (first_rows,), (dim, hidden), (dim,))
    ]
    launch(
        wide.weight_backward_kernel, (n_chunks * n_tiles,), dz,
        dz, call.x, gated, h, call.order, segment.tiles, call.offsets, *shares, *segment.bounds,
        *windows, n_experts=call.n_experts, first_rows=first_rows, SPLIT=split,
        ROWS=blocks.depth, COLUMNS=blocks.columns, **call.sizes, **call.wide_offset_opts,
        **call.gemm_opts, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return sum_chunks(call.offsets, windows, shares) if split else shares
