"""The experts' Triton kernels as registered operators: launches and autograd.

Narrow experts (``is_narrow``) never let their hidden layer out of a kernel, and compute it again
in backward. Wide experts keep it between forward and backward. The time of their GEMMs grows with
D and that of their memory traffic does not: at 768 computing it again would cost a sixth of the
step, at 24 reading it back would cost more than computing it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused_router import sum_chunks
from .kernels import narrow, wide
from .launch import launch, padded, precision, tiles
from .operators import refuse_double_backward

# The widest that a kernel of narrow experts can keep in registers without spilling; numbers of
# fp32, each split into three of tf32, take three times as many.
NARROW, NARROW_FP32 = 64, 32
# Programs that fill a GPU of 132 multiprocessors a few times.
PROGRAMS = 512


def is_narrow(dim: int, dtype: torch.dtype) -> bool:
    """Whether experts of this width never let their hidden layer out of a kernel."""
    return dim <= (NARROW_FP32 if dtype == torch.float32 else NARROW)


@torch.library.custom_op("dmoe_layer::fused_experts", mutates_args=())
def fused_experts(
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
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Σ_j gates[t, j] · Expert_{indices[t, j]}(x[t]), (T, D) in x's dtype; and what is kept.

    ``order_R`` and ``offsets`` are the router's sort by expert. Expert(x) = Dropout(w2 · act(w1 ·
    x + b1) + b2), with operands in ``dtype`` and sums in fp32. Without a seed nothing is dropped.
    What is kept for backward: the hidden layer of wide experts before their activation (after it
    where that is ReLU, which says as much), if ``keep_hidden``; else an empty tensor.
    """
    x_TD = x_TD.contiguous()
    call = _Call(x_TD, order_R, gates_TK, w1_EHD, activation, dropout, seed, dtype)
    weights = _as_operands(dtype, w1_EHD, b1_EH, w2_EDH, b2_ED)
    if call.narrow:
        hidden = x_TD.new_empty(0)
        slots = _narrow_forward(call, x_TD, order_R, offsets, gates_TK, *weights)
    else:
        slots, hidden = _wide_forward(call, x_TD, order_R, offsets, gates_TK, *weights)
    return call.sum_slots(slots), hidden if keep_hidden else hidden.new_empty(0)


@fused_experts.register_fake
def _(x_TD, order_R, offsets, gates_TK, w1_EHD, *options):  # type: ignore[no-untyped-def]
    wide = not is_narrow(x_TD.shape[1], options[-2])
    keeps = options[-1] and wide
    shape = (order_R.shape[0], w1_EHD.shape[1]) if keeps else (0,)
    dtype = options[-2] if wide else x_TD.dtype
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dmoe_layer::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
    gates_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    hidden_RH: Tensor,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, w1, b1, w2, b2; an empty tensor for a bias that is not there."""
    x_TD = x_TD.contiguous()
    call = _Call(x_TD, order_R, gates_TK, w1_EHD, activation, dropout, seed, dtype)
    weights = _as_operands(dtype, w1_EHD, b1_EH, w2_EDH, b2_ED)
    inputs = (call, dy_TD.contiguous(), x_TD, order_R, offsets, gates_TK, *weights)
    if call.narrow:
        slots, dgates, *dweights = _narrow_backward(*inputs)
    else:
        slots, dgates, *dweights = _wide_backward(*inputs, hidden_RH)
    dw1, db1, dw2, db2 = (d.to(w1_EHD.dtype) for d in dweights)
    db1, db2 = (
        d.new_empty(0) if b is None else d for b, d in ((b1_EH, db1), (b2_ED, db2))
    )
    return call.sum_slots(slots), dgates, dw1, db1, dw2, db2


@fused_experts_backward.register_fake
def _(dy_TD, x_TD, order_R, offsets, gates_TK, w1, b1, w2, b2, *options):  # type: ignore[no-untyped-def]
    biases = [w1.new_empty(0) if b is None else torch.empty_like(b) for b in (b1, b2)]
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    return torch.empty_like(x_TD), torch.empty_like(gates_TK), dw1, biases[0], dw2, biases[1]


class _Call:
    """One call's sizes, and the options that all its launches share."""

    def __init__(
        self,
        x_TD: Tensor,
        order_R: Tensor,
        gates_TK: Tensor,
        w1_EHD: Tensor,
        activation: str,
        dropout: float,
        seed: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.x, self.dtype, self.own = x_TD, dtype, w1_EHD.dtype
        self.n_experts, self.hidden, self.dim = w1_EHD.shape
        self.rows, self.k = order_R.shape[0], gates_TK.shape[1]
        self.narrow = is_narrow(self.dim, dtype)
        dropped = 0 if seed is None else round(dropout * 2**16)
        # Of p = 1 nothing is left to scale.
        scale = 2**16 / (2**16 - dropped) if dropped < 2**16 else 1.0
        self.drop = (0 if seed is None else int(seed), dropped, scale)
        self.widths = {"n_experts": self.n_experts, "dim": self.dim, "hidden": self.hidden}
        self.sizes = {**self.widths, "K": self.k}
        self.activation = {"ACTIVATION": activation}
        self.dropping = {"DROP": dropped > 0}
        self.common = {"PRECISION": precision(), "EXPERTS": padded(self.n_experts, 2)}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def sum_slots(self, slots: Tensor) -> Tensor:
        """Each token's sum over its k slots, in x's dtype."""
        y = torch.empty_like(self.x)
        width = padded(min(self.dim, 128))
        rows = 2048 // width
        launch(
            narrow.sum_slots_kernel, (-(-len(y) // rows), -(-self.dim // width)), y,
            slots, y, len(y), dim=self.dim, K=self.k, ROWS=rows, DIM=width,
        )  # fmt: skip
        return y


def _as_operands(dtype: torch.dtype, *parameters: Tensor | None) -> list[Tensor | None]:
    return [None if p is None else p.to(dtype).contiguous() for p in parameters]


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


def _forward_blocks(call: _Call) -> _Blocks:
    if call.dtype == torch.float32:
        return _Blocks(64, 32, 4, 2)
    # More rows share the weights that a program reads; D = 24's hidden layer is three times 32.
    return _Blocks(128, 32, 4) if call.dim <= 32 else _Blocks(128, 64, 8, 2)


def _backward_blocks(call: _Call) -> tuple[_Blocks, _Blocks]:
    """For the gradients of rows, and of weights: these sum a slice's in registers."""
    if call.dtype == torch.float32:
        return _Blocks(64, 32, 4), _Blocks(32, 16, 4)
    return _Blocks(64, 32, 4), _Blocks(64, 64, 4) if call.dim <= 32 else _Blocks(128, 64, 8)


def _narrow_forward(
    call: _Call,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    gates: Tensor,
    *weights: Tensor | None,
) -> Tensor:
    blocks = _forward_blocks(call)
    slots = call.empty(call.rows, call.dim)
    launch(
        narrow.mlp_kernel, (tiles(call.rows, blocks.rows, call.n_experts),), x,
        x, order, offsets, gates, *weights, slots,
        *call.drop, **call.sizes, **call.activation, **call.dropping, **call.common,
        **blocks.options(call.dim),
    )  # fmt: skip
    return slots


def _narrow_backward(
    call: _Call,
    dy: Tensor,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    gates: Tensor,
    *weights: Tensor | None,
) -> tuple[Tensor, ...]:
    slots = call.empty(call.rows, call.dim)
    dgates = torch.empty_like(gates)

    def run(
        blocks: _Blocks, chunk: int, slices: int, shares: list[Tensor | None], rows: bool
    ) -> None:
        launch(
            narrow.mlp_backward_kernel, (tiles(call.rows, chunk, call.n_experts), slices), x,
            dy, x, order, offsets, gates, *weights, slots, dgates, *shares,
            chunk, *call.drop, OF_ROWS=rows, OF_WEIGHTS=shares[0] is not None, **call.sizes,
            **call.activation, **call.dropping, **call.common, **blocks.options(call.dim),
        )  # fmt: skip

    of_rows, blocks = _backward_blocks(call)
    if not (at_once := call.hidden <= blocks.hidden):
        run(of_rows, of_rows.rows, 1, [None] * 4, True)
    slices = -(-call.hidden // blocks.hidden)
    # The shares of all chunks together are about as large as x: no more chunks than that.
    chunk = max(call.rows * slices // PROGRAMS, 2 * call.k * call.hidden, blocks.rows)
    chunk = -(-chunk // blocks.rows) * blocks.rows
    n_chunks = tiles(call.rows, chunk, call.n_experts)
    shapes = ((call.hidden, call.dim), (call.hidden,), (call.dim, call.hidden), (call.dim,))
    shares = [call.empty(n_chunks, *shape, dtype=torch.float32) for shape in shapes]
    run(blocks, chunk, slices, [*shares], at_once)
    return slots, dgates, *(sum_chunks(share, offsets, chunk) for share in shares)


def _gemm(call: _Call) -> dict[str, int]:
    """The blocks of the wide experts' GEMMs.

    In bf16 and fp16 two programs of these fit a Hopper multiprocessor, so that one multiplies while
    the other stores; 256 columns would spill in two of the four kernels.
    """
    if call.dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def _wide_forward(
    call: _Call,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gemm = _gemm(call)
    n_tiles = tiles(call.rows, gemm["ROWS"], call.n_experts)
    h = call.empty(call.rows, call.hidden)
    z = None if call.activation["ACTIVATION"] == "relu" else torch.empty_like(h)
    launch(
        wide.hidden_kernel, (n_tiles * -(-call.hidden // gemm["COLUMNS"]),), x,
        x, order, offsets, w1, b1, z, h, **call.sizes, **call.activation, **call.common, **gemm,
    )  # fmt: skip
    slots = call.empty(call.rows, call.dim)
    launch(
        wide.output_kernel, (n_tiles * -(-call.dim // gemm["COLUMNS"]),), x,
        h, order, offsets, w2, b2, gates, slots,
        *call.drop, **call.widths, stride_d=call.hidden, stride_h=1, **call.dropping, **call.common, **gemm,
    )  # fmt: skip
    return slots, h if z is None else z


def _wide_backward(
    call: _Call,
    dy: Tensor,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    gates: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    z: Tensor,
) -> tuple[Tensor, ...]:
    gemm = _gemm(call)
    n_tiles = tiles(call.rows, gemm["ROWS"], call.n_experts)
    # An activation that is not ReLU needs registers of its own: half as many columns.
    relu = call.activation["ACTIVATION"] == "relu"
    sliced = gemm if relu else {**gemm, "COLUMNS": 64}
    n_slices = -(-call.hidden // sliced["COLUMNS"])
    do, gated = call.empty(call.rows, call.dim), call.empty(call.rows, call.dim)
    dgates = call.empty(1 + n_slices, call.rows, dtype=torch.float32)
    launch(
        wide.gather_gradient_kernel, (tiles(call.rows, 32, call.n_experts),), x,
        dy, order, offsets, gates, b2, do, gated, dgates,
        *call.drop, n_experts=call.n_experts, dim=call.dim, K=call.k, ROWS=32, COLUMNS=128, EXPERTS=call.common["EXPERTS"], **call.dropping,
    )  # fmt: skip
    dz = call.empty(call.rows, call.hidden)
    h = z if relu else torch.empty_like(z)
    launch(
        wide.hidden_backward_kernel, (n_tiles * n_slices,), x,
        do, order, offsets, gates, w2, z, None if h is z else h, dz, dgates,
        call.rows, call.drop[-1], **call.widths, **call.activation, **call.common, **sliced,
    )  # fmt: skip
    slots = do  # no longer needed
    launch(
        wide.output_kernel, (n_tiles * -(-call.dim // gemm["COLUMNS"]),), x,
        dz, order, offsets, w1, None, None, slots,
        *call.drop, **call.widths, stride_d=1, stride_h=call.dim, DROP=False, **call.common, **gemm,
    )  # fmt: skip
    dw1, db1 = _weight_gradient(call, dz, x, order, offsets, gather=True)
    dw2, db2 = _weight_gradient(call, gated, h, order, offsets, gather=False)
    return slots, dgates.sum(dim=0).view(gates.shape), dw1, db1, dw2, db2


def _weight_gradient(
    call: _Call, a: Tensor, b: Tensor, order: Tensor, offsets: Tensor, gather: bool
) -> tuple[Tensor, Tensor]:
    """Σ a[row] · b[row]ᵀ and Σ a[row] of each expert: (E, a's width, b's width), (E, a's width)."""
    gemm = _gemm(call)
    sides = a.shape[1], b.shape[1]
    n_tiles = -(-sides[0] // gemm["COLUMNS"]) * -(-sides[1] // gemm["COLUMNS"])
    # Where the weights alone are tiles enough for a GPU, an expert's rows need not be shared out.
    split = n_tiles * call.n_experts < PROGRAMS // 2
    chunk = max(call.rows * n_tiles // PROGRAMS, 512)
    n_chunks = tiles(call.rows, chunk, call.n_experts) if split else call.n_experts
    dtype = torch.float32 if split else call.own
    shares = call.empty(n_chunks, *sides, dtype=dtype)
    bias = call.empty(n_chunks, sides[0], dtype=dtype)
    launch(
        wide.weight_backward_kernel, (n_chunks * n_tiles,), a,
        a, b, order, offsets, shares, bias, chunk,
        n_experts=call.n_experts, a_columns=sides[0], b_columns=sides[1], K=call.k, GATHER=gather, SPLIT=split, ROWS=gemm["DEPTH"], COLUMNS=gemm["COLUMNS"], **call.common,
        num_warps=gemm["num_warps"], num_stages=gemm["num_stages"],
    )  # fmt: skip
    if split:
        return sum_chunks(shares, offsets, chunk), sum_chunks(bias, offsets, chunk)
    return shares, bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.dropout, seed, ctx.dtype, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1], seed)


def _backward(ctx: Any, dy_TD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, hidden, seed = ctx.saved_tensors
    dx, dgates, *dweights = fused_experts_backward(
        dy_TD, *tensors, hidden, ctx.activation, ctx.dropout, seed, ctx.dtype
    )
    grads = [dx, None, None, dgates, *dweights]
    needed = ctx.needs_input_grad[: len(grads)]
    return *(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * 5


fused_experts.register_autograd(_backward, setup_context=_save_for_backward)
refuse_double_backward(fused_experts_backward)
