"""The launches of the experts' kernels: what goes in, in which blocks, and what comes out.

In forward, experts up to D = NARROW never let their hidden layer out of a kernel; wider ones are
grouped GEMMs with the hidden layer between them. In backward, where the sums of the weights'
gradients need registers too, the fused kernels end sooner (``fuses_backward``); beyond, the hidden
layer is kept by forward or computed again, a segment of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dropout import in_steps
from .kernels import narrow, sums, wide
from .launch import launch, padded, precision, sum_chunks, tiles

# The widest that fits into registers without spilling.
NARROW = 128
# Programs that fill a GPU of 132 multiprocessors a few times, and rows of a segment that do.
PROGRAMS, LEAST_ROWS = 512, 16384


def fuses_backward(dim: int, dtype: torch.dtype) -> bool:
    """Whether the gradients of experts of this width fit into registers too.

    Numbers of fp32, each split into three of tf32, take more of them.
    """
    return dim <= (32 if dtype == torch.float32 else 64)


class Segment(NamedTuple):
    """Rows of the sorted order whose hidden layer is in memory at one time.

    ``offsets`` are the experts' own within the segment.
    """

    first: int
    rows: int
    offsets: Tensor


class Call:
    """One call: its tensors, weights in the dtype they are computed in, and sizes as options."""

    def __init__(
        self,
        x_TD: Tensor,
        order_R: Tensor,
        offsets: Tensor,
        gates_TK: Tensor,
        w1_EHD: Tensor,
        b1_EH: Tensor | None,
        w2_EDH: Tensor,
        b2_ED: Tensor | None,
        activation: str,
        dropout: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        def operand(parameter: Tensor) -> Tensor:
            return parameter.to(dtype).contiguous()

        self.x, self.order, self.offsets, self.gates = x_TD.contiguous(), order_R, offsets, gates_TK
        self.w1, self.w2 = operand(w1_EHD), operand(w2_EDH)
        self.b1, self.b2 = (None if b is None else operand(b) for b in (b1_EH, b2_ED))
        self.dtype, self.own = dtype, w1_EHD.dtype
        self.n_experts, self.hidden, self.dim = w1_EHD.shape
        self.rows, self.k = order_R.shape[0], gates_TK.shape[1]
        self.relu = activation == "relu"
        dropped, scale = in_steps(dropout, seed)
        self.drop = (0 if seed is None else int(seed), dropped, scale)
        # Options of the kernels, each for those that take it.
        self.dropping = {"DROP": dropped > 0}
        self.activation = {"ACTIVATION": activation}
        self.widths = {"n_experts": self.n_experts, "dim": self.dim, "hidden": self.hidden}
        self.experts = {"EXPERTS": padded(self.n_experts, 2)}
        self.gemm = {**self.experts, "PRECISION": precision()}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def nothing(self, count: int) -> list[Tensor]:
        """In place of gradients that nobody wants: an operator's outputs are always tensors."""
        return [self.x.new_empty((0,)) for _ in range(count)]

    def sum_slots(self, slots: Tensor) -> Tensor:
        """Each token's sum over its k slots, in x's dtype."""
        y = torch.empty_like(self.x)
        width = padded(min(self.dim, 128))
        rows = 2048 // width
        launch(
            sums.sum_slots_kernel, (-(-len(y) // rows), -(-self.dim // width)), y,
            slots, y, len(y), dim=self.dim, K=self.k, ROWS=rows, DIM=width,
        )  # fmt: skip
        return y

    def segments(self, at_once: bool) -> Iterator[Segment]:
        """All rows at once; or so many that their hidden layer is about as large as x."""
        if at_once or self.rows * self.hidden <= self.x.numel():
            yield Segment(0, self.rows, self.offsets)
            return
        most = max(self.x.numel() // self.hidden, LEAST_ROWS)
        for first in range(0, self.rows, most):
            rows = min(most, self.rows - first)
            yield Segment(first, rows, self.offsets.clamp(first, first + rows))


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
            "DIM": padded(dim),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def _forward_blocks(call: Call) -> _Blocks:
    if call.dtype == torch.float32:
        if call.dim <= 32:
            return _Blocks(64, 32, 4, 2)
        return _Blocks(64, 32, 8) if call.dim <= 64 else _Blocks(32, 32, 8)
    # More rows share the weights that a program reads; D = 24's hidden layer is three times 32.
    if call.dim <= 32:
        return _Blocks(128, 32, 4)
    return _Blocks(128, 64, 8, 2) if call.dim <= 64 else _Blocks(64, 32, 8)


def _backward_blocks(call: Call) -> tuple[_Blocks, _Blocks]:
    """For the gradients of rows, and of weights: these sum a slice's in registers."""
    if call.dtype == torch.float32:
        return _Blocks(64, 32, 4), _Blocks(32, 16, 8)
    return _Blocks(64, 32, 4), _Blocks(64, 64, 4) if call.dim <= 32 else _Blocks(128, 64, 8)


def narrow_forward(call: Call) -> Tensor:
    """Each pair's gated output: (R, D), pair t·k + j in row t·k + j."""
    blocks = _forward_blocks(call)
    slots = call.empty(call.rows, call.dim)
    launch(
        narrow.mlp_kernel, (tiles(call.rows, blocks.rows, call.n_experts),), call.x,
        call.x, call.order, call.offsets, call.gates, call.w1, call.b1, call.w2, call.b2, slots,
        *call.drop, K=call.k, **call.widths, **call.gemm, **call.activation, **call.dropping,
        **blocks.options(call.dim),
    )  # fmt: skip
    return slots


def narrow_backward(
    call: Call, dy: Tensor, of_rows: bool, of_weights: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Each pair's share of dx, and dgates; the gradients of w1, b1, w2 and b2."""
    slots, dgates = call.empty(call.rows, call.dim), torch.empty_like(call.gates)

    def run(blocks: _Blocks, chunk: int, slices: int, with_rows: bool, *shares: Any) -> None:
        launch(
            narrow.mlp_backward_kernel, (tiles(call.rows, chunk, call.n_experts), slices), dy,
            dy, call.x, call.order, call.offsets, call.gates, call.w1, call.b1, call.w2, call.b2,
            slots, dgates, *shares, chunk, *call.drop,
            OF_ROWS=with_rows, OF_WEIGHTS=shares[0] is not None, K=call.k, **call.widths,
            **call.gemm, **call.activation, **call.dropping, **blocks.options(call.dim),
        )  # fmt: skip

    row_blocks, blocks = _backward_blocks(call)
    at_once = of_rows and of_weights and call.hidden <= blocks.hidden
    if of_rows and not at_once:
        run(row_blocks, row_blocks.rows, 1, True, None, None, None, None)
    if not of_weights:
        return [slots, dgates], []
    slices = -(-call.hidden // blocks.hidden)
    # The shares of all chunks together are about as large as x: no more chunks than that.
    chunk = max(call.rows * slices // PROGRAMS, 2 * call.k * call.hidden, blocks.rows)
    chunk = -(-chunk // blocks.rows) * blocks.rows
    n_chunks = tiles(call.rows, chunk, call.n_experts)
    shapes = ((call.hidden, call.dim), (call.hidden,), (call.dim, call.hidden), (call.dim,))
    shares = [call.empty(n_chunks, *shape, dtype=torch.float32) for shape in shapes]
    run(blocks, chunk, slices, at_once, *shares)
    return [slots, dgates], [sum_chunks(share, call.offsets, chunk) for share in shares]


def _gemm_blocks(call: Call) -> dict[str, int]:
    """The blocks of the wide experts' GEMMs.

    In bf16 and fp16 two programs of most of these kernels fit a Hopper multiprocessor, so that one
    multiplies while the other stores; 256 columns would spill in two of the four.
    """
    if call.dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def _programs(call: Call, segment: Segment, columns: int, blocks: dict[str, int]) -> tuple[int]:
    n_tiles = tiles(segment.rows, blocks["ROWS"], call.n_experts)
    return (n_tiles * -(-columns // blocks["COLUMNS"]),)


def wide_forward(call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """Each pair's gated output, as of narrow ones; and the hidden layer, if it shall be kept."""
    slots = call.empty(call.rows, call.dim)
    kept = call.empty(0)
    for segment in call.segments(keep):
        z, h = _hidden(call, segment)
        _rows_product(call, segment, h, call.w2, (call.hidden, 1), slots, call.b2, call.gates)
        if keep:
            kept = z
    return slots, kept


def _hidden(call: Call, segment: Segment) -> tuple[Tensor, Tensor]:
    """The hidden layer of a segment before and after its activation; of ReLU twice the latter."""
    blocks = _gemm_blocks(call)
    h = call.empty(segment.rows, call.hidden)
    z = h if call.relu else torch.empty_like(h)
    launch(
        wide.hidden_kernel, _programs(call, segment, call.hidden, blocks), h,
        call.x, call.order, segment.offsets, call.w1, call.b1, None if call.relu else z, h,
        segment.first, K=call.k, **call.widths, **call.gemm, **call.activation, **blocks,
    )  # fmt: skip
    return z, h


def _rows_product(
    call: Call,
    segment: Segment,
    rows: Tensor,
    weight: Tensor,
    strides: tuple[int, int],
    slots: Tensor,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
) -> None:
    """slots[pair] = weight · row, (D, H) by H; with gates also bias, dropout and gate."""
    blocks = _gemm_blocks(call)
    launch(
        wide.output_kernel, _programs(call, segment, call.dim, blocks), rows,
        rows, call.order, segment.offsets, weight, bias, gates, slots, segment.first, *call.drop,
        stride_d=strides[0], stride_h=strides[1], DROP=gates is not None and call.dropping["DROP"],
        **call.widths, **call.gemm, **blocks,
    )  # fmt: skip


def wide_backward(
    call: Call, dy: Tensor, kept: Tensor, of_rows: bool, of_weights: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """As of narrow experts."""
    blocks = _gemm_blocks(call)
    # Half as many columns, for da, z and h stand in registers together: with all of them Triton 3.7
    # spills on compute capability 8.0, even where the activation is ReLU.
    sliced = {**blocks, "COLUMNS": 64}
    slots = call.empty(call.rows, call.dim)
    dgates = call.empty(1 + -(-call.hidden // sliced["COLUMNS"]), call.rows, dtype=torch.float32)
    totals: list[Tensor] = []
    segments = list(call.segments(len(kept) > 0))
    for segment in segments:
        do, gated = call.empty(2, segment.rows, call.dim).unbind()
        launch(
            wide.gather_gradient_kernel, (tiles(segment.rows, 32, call.n_experts),), dy,
            dy, call.order, segment.offsets, call.gates, call.b2, do, gated, dgates,
            segment.first, *call.drop, n_experts=call.n_experts, dim=call.dim, K=call.k,
            ROWS=32, COLUMNS=128, **call.experts, **call.dropping,
        )  # fmt: skip
        z = kept if len(kept) else _hidden(call, segment)[0]
        h = z if call.relu else torch.empty_like(z)
        dz = torch.empty_like(z)
        launch(
            wide.hidden_backward_kernel, _programs(call, segment, call.hidden, sliced), dy,
            do, call.order, segment.offsets, call.gates, call.w2, z, None if call.relu else h, dz,
            dgates, segment.first, call.rows, call.drop[-1],
            **call.widths, **call.gemm, **call.activation, **sliced,
        )  # fmt: skip
        if of_rows:
            _rows_product(call, segment, dz, call.w1, (1, call.dim), slots)
        if not of_weights:
            continue
        # A sum over several segments has a term for each: fp32.
        dtype = call.own if len(segments) == 1 else torch.float32
        terms = [
            *_weight_gradient(call, segment, dz, call.x, dtype, gather=True),
            *_weight_gradient(call, segment, gated, h, dtype, gather=False),
        ]
        totals = [t.add_(n) for t, n in zip(totals, terms, strict=True)] if totals else terms
    return [slots, dgates.sum(dim=0).view(call.gates.shape)], totals


def _weight_gradient(
    call: Call, segment: Segment, a: Tensor, b: Tensor, dtype: torch.dtype, gather: bool
) -> tuple[Tensor, Tensor]:
    """Σ a[row] · b[row]ᵀ and Σ a[row] of each expert: (E, a's width, b's width), (E, a's width)."""
    blocks = _gemm_blocks(call)
    columns, sides = blocks["COLUMNS"], (a.shape[1], b.shape[1])
    n_tiles = -(-sides[0] // columns) * -(-sides[1] // columns)
    # Where the weights alone are tiles enough for a GPU, an expert's rows need not be shared out.
    split = n_tiles * call.n_experts < PROGRAMS // 2
    chunk = max(segment.rows * n_tiles // PROGRAMS, 512)
    n_chunks = tiles(segment.rows, chunk, call.n_experts) if split else call.n_experts
    shares, bias = (
        call.empty(n_chunks, *shape, dtype=torch.float32 if split else dtype)
        for shape in (sides, sides[:1])
    )
    launch(
        wide.weight_backward_kernel, (n_chunks * n_tiles,), a,
        a, b, call.order, segment.offsets, shares, bias, segment.first, chunk,
        a_columns=sides[0], b_columns=sides[1], n_experts=call.n_experts, K=call.k,
        GATHER=gather, SPLIT=split, ROWS=blocks["DEPTH"], COLUMNS=columns, **call.gemm,
        num_warps=blocks["num_warps"], num_stages=blocks["num_stages"],
    )  # fmt: skip
    if not split:
        return shares, bias
    return sum_chunks(shares, segment.offsets, chunk), sum_chunks(bias, segment.offsets, chunk)
