"""The narrow experts' kernels: both layers of the MLP in one, the hidden layer in registers.

A program has rows of one expert: it gathers their tokens, runs over the hidden layer in slices,
and writes each pair's row to a place of its own; the K rows of a token are summed afterwards.
OFFSET is the type of offsets into tensors with a row for each token or pair.
"""

import triton
import triton.language as tl

from .activations import activate, slope
from .common import dot, rows_of_chunk, rows_of_program, store_pairs
from .dropout import load_kept


@triton.jit
def _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, HALF: tl.constexpr):
    """One expert's w1 [H, D] and b1 [H] for the hidden units h.

    Of a gated expert HALF 0 is the gate and 1 the linear half.
    """
    live_hd = (h < hidden)[:, None] & (d < dim)[None, :]
    row = HALF * hidden + h
    w1_HD = tl.load(w1_ptr + row[:, None] * dim + d[None, :], mask=live_hd, other=0)
    b1_H = tl.zeros([h.shape[0]], tl.float32)
    if b1_ptr is not None:
        b1_H += tl.load(b1_ptr + row, mask=h < hidden, other=0)
    return w1_HD, b1_H


@triton.jit
def _slice_of_second(w2_ptr, h, d, hidden, dim):
    """One expert's w2 [H, D] for the hidden units h."""
    live_hd = (h < hidden)[:, None] & (d < dim)[None, :]
    return tl.load(w2_ptr + d[None, :] * hidden + h[:, None], mask=live_hd, other=0)


@triton.jit
def mlp_kernel(
    x_ptr, order_ptr, tiles_ptr, gates_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, kept_ptr,
    y_ptr, rest_ptr, scale,
    dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """A pair's gate · Dropout(w2 · act(w1 · x + b1) + b2) for each row of a tile."""
    expert, first, rows = rows_of_program(tiles_ptr, tl.program_id(0), ROWS)
    if rows <= 0:
        return
    row = first + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < rows
    pair = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET)
    d = tl.arange(0, DIM)
    live_d = d < dim
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    at = (pair // K)[:, None] * dim + d[None, :]
    x_RD = tl.load(x_ptr + at, mask=live[:, None] & live_d[None, :], other=0).to(dtype)
    first_rows: tl.constexpr = 2 * hidden if GATED else hidden
    w1_ptr += expert.to(tl.int64) * first_rows * dim
    w2_ptr += expert.to(tl.int64) * hidden * dim
    if b1_ptr is not None:
        b1_ptr += expert * first_rows
    y_RD = tl.zeros([ROWS, DIM], tl.float32)
    for first_h in range(0, hidden, HIDDEN):
        h = first_h + tl.arange(0, HIDDEN)
        w1_HD, b1_H = _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, 0)
        z_RH = dot(x_RD, tl.trans(w1_HD), None, PRECISION) + b1_H[None, :]
        h_RH = activate(z_RH, ACTIVATION)
        if GATED:
            w1_HD, b1_H = _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, 1)
            h_RH *= dot(x_RD, tl.trans(w1_HD), None, PRECISION) + b1_H[None, :]
        w2_HD = _slice_of_second(w2_ptr, h, d, hidden, dim)
        y_RD = dot(h_RH.to(dtype), w2_HD, y_RD, PRECISION)
    if b2_ptr is not None:
        y_RD += tl.load(b2_ptr + expert * dim + d, mask=live_d, other=0)[None, :]
    if kept_ptr is not None:
        kept_RD = load_kept(kept_ptr, row.to(OFFSET), live, 0, (dim + 31) // 32, DIM)
        y_RD = tl.where(kept_RD, y_RD, 0.0)
    gate = tl.load(gates_ptr + pair, mask=live, other=0) * scale
    store_pairs(y_ptr, rest_ptr, pair, live, d, dim, y_RD * gate[:, None], K)


@triton.jit
def _hidden_gradients(
    x_RD, do_RD, gate_R, w1_HD, b1_H, w2_HD, linear_HD, linear_b_H,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(da, h, dz, dlinear), [R, H] each, of a slice of the hidden layer, which is computed again.

    da and h are in fp32. dz and dlinear, the gradients of the products with w1, are operands;
    without a linear half dlinear is dz.
    """
    dtype: tl.constexpr = w1_HD.dtype
    z_RH = dot(x_RD, tl.trans(w1_HD), None, PRECISION) + b1_H[None, :]
    da_RH = dot(do_RD, tl.trans(w2_HD), None, PRECISION)
    h_RH = activate(z_RH, ACTIVATION)
    if GATED:
        linear_RH = dot(x_RD, tl.trans(linear_HD), None, PRECISION) + linear_b_H[None, :]
        dlinear_RH = (da_RH * h_RH * gate_R[:, None]).to(dtype)
        h_RH *= linear_RH
        dz_RH = (slope(z_RH, da_RH * linear_RH, ACTIVATION) * gate_R[:, None]).to(dtype)
    else:
        dz_RH = (slope(z_RH, da_RH, ACTIVATION) * gate_R[:, None]).to(dtype)
        dlinear_RH = dz_RH
    return da_RH, h_RH, dz_RH, dlinear_RH


@triton.jit
def mlp_backward_kernel(
    dy_ptr, x_ptr, order_ptr, tiles_ptr, gates_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, kept_ptr,
    dx_ptr, rest_ptr, dgates_ptr, scale,
    dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """The pairs' shares of dx, and dgates, for each row of a tile.

    With dO the gradient of the token's output after dropout and dA = dO · w2, the gate's gradient
    is <dA, h> + <dO, b2>: it needs no output of the expert.
    """
    expert, first, rows = rows_of_program(tiles_ptr, tl.program_id(0), ROWS)
    if rows <= 0:
        return
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    row = first + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < rows
    pair = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET)
    d = tl.arange(0, DIM)
    x_RD, do_RD, gate = _rows_of_backward(
        dy_ptr, x_ptr, gates_ptr, kept_ptr, row.to(OFFSET), pair, live, d, scale, dim, K, dtype
    )
    first_rows: tl.constexpr = 2 * hidden if GATED else hidden
    w1_ptr += expert.to(tl.int64) * first_rows * dim
    w2_ptr += expert.to(tl.int64) * hidden * dim
    if b1_ptr is not None:
        b1_ptr += expert * first_rows
    dx_RD = tl.zeros([ROWS, DIM], tl.float32)
    dgate = tl.zeros([ROWS], tl.float32)
    if b2_ptr is not None:
        b2_D = tl.load(b2_ptr + expert * dim + d, mask=d < dim, other=0)
        dgate += tl.sum(do_RD.to(tl.float32) * b2_D[None, :], axis=1)
    for first_h in range(0, hidden, HIDDEN):
        h = first_h + tl.arange(0, HIDDEN)
        w1_HD, b1_H = _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, 0)
        w2_HD = _slice_of_second(w2_ptr, h, d, hidden, dim)
        linear_HD, linear_b_H = w1_HD, b1_H
        if GATED:
            linear_HD, linear_b_H = _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, 1)
        da_RH, h_RH, dz_RH, dlinear_RH = _hidden_gradients(
            x_RD, do_RD, gate, w1_HD, b1_H, w2_HD, linear_HD, linear_b_H,
            ACTIVATION, GATED, PRECISION,
        )  # fmt: skip
        dgate += tl.sum(da_RH * h_RH, axis=1)
        dx_RD = dot(dz_RH, w1_HD, dx_RD, PRECISION)
        if GATED:
            dx_RD = dot(dlinear_RH, linear_HD, dx_RD, PRECISION)
    tl.store(dgates_ptr + pair, dgate * scale, mask=live)
    store_pairs(dx_ptr, rest_ptr, pair, live, d, dim, dx_RD, K)


@triton.jit
def _rows_of_backward(
    dy_ptr, x_ptr, gates_ptr, kept_ptr, row, pair, live, d, scale,
    dim: tl.constexpr, K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The x and the dO of each pair, and its gate times dropout's scale."""
    at = (pair // K)[:, None] * dim + d[None, :]
    inside = live[:, None] & (d < dim)[None, :]
    x_RD = tl.load(x_ptr + at, mask=inside, other=0).to(dtype)
    do_RD = tl.load(dy_ptr + at, mask=inside, other=0).to(dtype)
    if kept_ptr is not None:
        kept_RD = load_kept(kept_ptr, row, live, 0, (dim + 31) // 32, d.shape[0])
        do_RD = tl.where(kept_RD, do_RD, 0.0)
    return x_RD, do_RD, tl.load(gates_ptr + pair, mask=live, other=0) * scale


@triton.jit(do_not_specialize=["n_windows", "window_tiles", "first_tile"])
def weight_gradients_kernel(
    dy_ptr, x_ptr, order_ptr, tiles_ptr, offsets_ptr, gates_ptr, w1_ptr, b1_ptr, w2_ptr, kept_ptr,
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, n_windows, window_tiles, first_tile, scale,
    n_experts: tl.constexpr, dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr,
    OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """A chunk's share of dw1, db1, dw2 and db2 in a slice of the hidden layer.

    Summed in registers over the chunk's rows. The slices of a chunk run side by side, so that what
    one has read the others find in cache.
    """
    slices: tl.constexpr = (hidden + HIDDEN - 1) // HIDDEN
    chunk = tl.program_id(0) // slices
    expert, first, last = rows_of_chunk(
        tiles_ptr, offsets_ptr, n_experts, chunk, n_windows, window_tiles, first_tile
    )
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    d = tl.arange(0, DIM)
    first_rows: tl.constexpr = 2 * hidden if GATED else hidden
    w1_ptr += expert.to(tl.int64) * first_rows * dim
    w2_ptr += expert.to(tl.int64) * hidden * dim
    if b1_ptr is not None:
        b1_ptr += expert * first_rows
    start_h = tl.program_id(0) % slices * HIDDEN
    h = start_h + tl.arange(0, HIDDEN)
    w1_HD, b1_H = _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, 0)
    w2_HD = _slice_of_second(w2_ptr, h, d, hidden, dim)
    linear_HD, linear_b_H = w1_HD, b1_H
    if GATED:
        linear_HD, linear_b_H = _slice_of_first(w1_ptr, b1_ptr, h, d, hidden, dim, 1)
    dw1_HD = tl.zeros([HIDDEN, DIM], tl.float32)
    dlinear_HD = tl.zeros([HIDDEN, DIM], tl.float32)
    dw2_HD = tl.zeros([HIDDEN, DIM], tl.float32)
    # Sums over rows are products with ones: a reduction would shuffle at every tile.
    # Made in fp32, since the interpreter of Triton 3.7 and older has no scalars of bf16.
    ones_RG = tl.full([ROWS, 16], 1, tl.float32).to(dtype)
    db1_HG = tl.zeros([HIDDEN, 16], tl.float32)
    dlinear_b_HG = tl.zeros([HIDDEN, 16], tl.float32)
    db2_DG = tl.zeros([DIM, 16], tl.float32)
    order_ptr += first
    if kept_ptr is not None:
        kept_ptr += first.to(tl.int64) * ((dim + 31) // 32)
    rows = last - first
    for tile in range(0, rows, ROWS):
        row = tile + tl.arange(0, ROWS)
        live = row < rows
        pair = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET)
        x_RD, do_RD, gate = _rows_of_backward(
            dy_ptr, x_ptr, gates_ptr, kept_ptr, row, pair, live, d, scale, dim, K, dtype
        )
        _, h_RH, dz_RH, dlinear_RH = _hidden_gradients(
            x_RD, do_RD, gate, w1_HD, b1_H, w2_HD, linear_HD, linear_b_H,
            ACTIVATION, GATED, PRECISION,
        )  # fmt: skip
        if GATED:
            # After the last row there are products of biases, which may be infinite in fp16. Their
            # product with a gradient of 0 would be NaN.
            h_RH = tl.where(live[:, None], h_RH, 0.0)
        gated_RD = (do_RD * gate[:, None]).to(dtype)
        dz_HR = tl.trans(dz_RH)
        dw1_HD = dot(dz_HR, x_RD, dw1_HD, PRECISION)
        dw2_HD = dot(tl.trans(h_RH.to(dtype)), gated_RD, dw2_HD, PRECISION)
        db1_HG = dot(dz_HR, ones_RG, db1_HG, "tf32x3")
        db2_DG = dot(tl.trans(gated_RD), ones_RG, db2_DG, "tf32x3")
        if GATED:
            dlinear_HR = tl.trans(dlinear_RH)
            dlinear_HD = dot(dlinear_HR, x_RD, dlinear_HD, PRECISION)
            dlinear_b_HG = dot(dlinear_HR, ones_RG, dlinear_b_HG, "tf32x3")
    own = chunk.to(tl.int64)
    dw1_ptr += own * first_rows * dim
    db1_ptr += own * first_rows
    at = h[:, None] * dim + d[None, :]
    live_hd = (h < hidden)[:, None] & (d < dim)[None, :]
    tl.store(dw1_ptr + at, dw1_HD, mask=live_hd)
    # Sixteen columns, all equal.
    tl.store(db1_ptr + h, tl.max(db1_HG, axis=1), mask=h < hidden)
    if GATED:
        tl.store(dw1_ptr + at + hidden * dim, dlinear_HD, mask=live_hd)
        tl.store(db1_ptr + h + hidden, tl.max(dlinear_b_HG, axis=1), mask=h < hidden)
    at = d[None, :] * hidden + h[:, None]
    tl.store(dw2_ptr + own * dim * hidden + at, dw2_HD, mask=live_hd)
    if start_h == 0:
        tl.store(db2_ptr + own * dim + d, tl.max(db2_DG, axis=1), mask=d < dim)
