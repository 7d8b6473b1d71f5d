"""The narrow experts' kernels: both layers of the MLP in one, the hidden layer in registers.

A program has rows of one expert: it gathers their tokens, runs over the hidden layer in slices,
and writes to the pair's own slot t·K + j; the K slots of a token are summed afterwards.
"""

import triton
import triton.language as tl

from .common import activate, dot, kept, rows_of_tile, slope


@triton.jit(do_not_specialize=["seed", "threshold"])
def mlp_kernel(
    x_ptr, order_ptr, offsets_ptr, gates_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, slots_ptr,
    seed, threshold, scale,
    n_experts: tl.constexpr, dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr,
    ACTIVATION: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """slots[pair] = gate · Dropout(w2 · act(w1 · x + b1) + b2) for each row of a tile."""
    expert, first, last = rows_of_tile(offsets_ptr, n_experts, tl.program_id(0), ROWS, EXPERTS)
    if expert >= n_experts:
        return
    row = first + tl.arange(0, ROWS)
    live = row < last
    pair = tl.load(order_ptr + row, mask=live, other=0).to(tl.int64)
    d = tl.arange(0, DIM)
    live_d = d < dim
    live_rd = live[:, None] & live_d[None, :]
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    at = (pair // K)[:, None] * dim + d[None, :]
    x_RD = tl.load(x_ptr + at, mask=live_rd, other=0).to(dtype)
    w1_ptr += expert.to(tl.int64) * hidden * dim
    w2_ptr += expert.to(tl.int64) * hidden * dim
    y_RD = tl.zeros([ROWS, DIM], tl.float32)
    for first_h in range(0, hidden, HIDDEN):
        h = first_h + tl.arange(0, HIDDEN)
        live_hd = (h < hidden)[:, None] & live_d[None, :]
        w1_HD = tl.load(w1_ptr + h[:, None] * dim + d[None, :], mask=live_hd, other=0)
        z_RH = dot(x_RD, tl.trans(w1_HD), None, PRECISION)
        if b1_ptr is not None:
            z_RH += tl.load(b1_ptr + expert * hidden + h, mask=h < hidden, other=0)[None, :]
        h_RH = activate(z_RH, ACTIVATION).to(dtype)
        w2_HD = tl.load(w2_ptr + d[None, :] * hidden + h[:, None], mask=live_hd, other=0)
        y_RD = dot(h_RH, w2_HD, y_RD, PRECISION)
    if b2_ptr is not None:
        y_RD += tl.load(b2_ptr + expert * dim + d, mask=live_d, other=0)[None, :]
    if DROP:
        y_RD = tl.where(kept(seed, pair, 0, threshold, DIM), y_RD, 0.0)
    gate = tl.load(gates_ptr + pair, mask=live, other=0) * scale
    at = pair[:, None] * dim + d[None, :]
    tl.store(slots_ptr + at, (y_RD * gate[:, None]).to(slots_ptr.dtype.element_ty), mask=live_rd)


@triton.jit(do_not_specialize=["chunk_rows", "seed", "threshold"])
def mlp_backward_kernel(
    dy_ptr, x_ptr, order_ptr, offsets_ptr, gates_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    slots_ptr, dgates_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr,
    chunk_rows, seed, threshold, scale,
    n_experts: tl.constexpr, dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr,
    OF_ROWS: tl.constexpr, OF_WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Gradients for a chunk of one expert's rows; the hidden layer is computed again.

    OF_ROWS: slots[pair] = the pair's share of dx, and dgates[pair]; needs all of the hidden layer.
    OF_WEIGHTS: the chunk's share of dw1, db1, dw2 and db2, summed in registers over
    the chunk's rows; needs one slice of the hidden layer, which axis 1 of the grid chooses.
    Both at once where one slice is the whole hidden layer; two launches where it is not.

    With dO the gradient of the token's output after dropout and dA = dO · w2, the gate's gradient
    is <dA, h> + <dO, b2>: it needs no output of the expert.
    """
    chunk = tl.program_id(0).to(tl.int64)
    expert, first, last = rows_of_tile(offsets_ptr, n_experts, chunk, chunk_rows, EXPERTS)
    if expert >= n_experts:
        return
    dtype: tl.constexpr = w1_ptr.dtype.element_ty
    d = tl.arange(0, DIM)
    live_d = d < dim
    w1_ptr += expert.to(tl.int64) * hidden * dim
    w2_ptr += expert.to(tl.int64) * hidden * dim
    start_h = tl.program_id(1) * HIDDEN
    stop_h = tl.minimum(start_h + HIDDEN, hidden) if OF_WEIGHTS else hidden
    if OF_WEIGHTS:
        dw1_HD = tl.zeros([HIDDEN, DIM], tl.float32)
        dw2_HD = tl.zeros([HIDDEN, DIM], tl.float32)
        db1_H = tl.zeros([HIDDEN], tl.float32)
        db2_D = tl.zeros([DIM], tl.float32)
    for tile in range(first, last, ROWS):
        row = tile + tl.arange(0, ROWS).to(tl.int64)
        live = row < last
        pair = tl.load(order_ptr + row, mask=live, other=0).to(tl.int64)
        at = (pair // K)[:, None] * dim + d[None, :]
        live_rd = live[:, None] & live_d[None, :]
        x_RD = tl.load(x_ptr + at, mask=live_rd, other=0).to(dtype)
        do_RD = tl.load(dy_ptr + at, mask=live_rd, other=0).to(dtype)
        if DROP:
            do_RD = tl.where(kept(seed, pair, 0, threshold, DIM), do_RD, 0.0)
        gate = tl.load(gates_ptr + pair, mask=live, other=0) * scale
        gated_RD = (do_RD * gate[:, None]).to(dtype)
        dx_RD = tl.zeros([ROWS, DIM], tl.float32)
        dgate = tl.zeros([ROWS], tl.float32)
        for first_h in range(start_h, stop_h, HIDDEN):
            h = first_h + tl.arange(0, HIDDEN)
            live_hd = (h < hidden)[:, None] & live_d[None, :]
            w1_HD = tl.load(w1_ptr + h[:, None] * dim + d[None, :], mask=live_hd, other=0)
            w2_HD = tl.load(w2_ptr + d[None, :] * hidden + h[:, None], mask=live_hd, other=0)
            z_RH = dot(x_RD, tl.trans(w1_HD), None, PRECISION)
            if b1_ptr is not None:
                z_RH += tl.load(b1_ptr + expert * hidden + h, mask=h < hidden, other=0)[None, :]
            da_RH = dot(do_RD, tl.trans(w2_HD), None, PRECISION)
            h_RH = activate(z_RH, ACTIVATION)
            dz_RH = (da_RH * slope(z_RH, ACTIVATION) * gate[:, None]).to(dtype)
            if OF_ROWS:
                dgate += tl.sum(da_RH * h_RH, axis=1)
                dx_RD = dot(dz_RH, w1_HD, dx_RD, PRECISION)
            if OF_WEIGHTS:
                dw1_HD = dot(tl.trans(dz_RH), x_RD, dw1_HD, PRECISION)
                h_HR = tl.trans(h_RH.to(dtype))
                dw2_HD = dot(h_HR, gated_RD, dw2_HD, PRECISION)
                db1_H += tl.sum(dz_RH.to(tl.float32), axis=0)
        if OF_WEIGHTS:
            db2_D += tl.sum(gated_RD.to(tl.float32), axis=0)
        if OF_ROWS:
            if b2_ptr is not None:
                b2_D = tl.load(b2_ptr + expert * dim + d, mask=live_d, other=0)
                dgate += tl.sum(do_RD.to(tl.float32) * b2_D[None, :], axis=1)
            tl.store(dgates_ptr + pair, dgate * scale, mask=live)
            at = pair[:, None] * dim + d[None, :]
            tl.store(slots_ptr + at, dx_RD.to(slots_ptr.dtype.element_ty), mask=live_rd)
    if OF_WEIGHTS:
        h = start_h + tl.arange(0, HIDDEN)
        at = (chunk * hidden + h)[:, None] * dim + d[None, :]
        live_hd = (h < hidden)[:, None] & live_d[None, :]
        tl.store(dw1_ptr + at, dw1_HD, mask=live_hd)
        at = (chunk * dim + d)[None, :] * hidden + h[:, None]
        tl.store(dw2_ptr + at, dw2_HD, mask=live_hd)
        tl.store(db1_ptr + chunk * hidden + h, db1_H, mask=h < hidden)
        if start_h == 0:
            tl.store(db2_ptr + chunk * dim + d, db2_D, mask=live_d)


@triton.jit(do_not_specialize=["numbers"])
def sum_slots_kernel(
    slots_ptr, y_ptr, numbers, dim: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y[t] = Σ_j slots[t·K + j], in fp32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < numbers
    at = (i // dim) * K * dim + i % dim
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        total += tl.load(slots_ptr + at + j * dim, mask=live, other=0).to(tl.float32)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["chunk_rows"])
def sum_chunks_kernel(
    shares_ptr, offsets_ptr, total_ptr, n_groups, numbers, chunk_rows,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total[g] = the sum of the shares of group g's chunks, always in one order."""
    group = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < numbers
    g = tl.arange(0, GROUPS)
    start_G = tl.load(offsets_ptr + g, mask=g < n_groups, other=0)
    stop_G = tl.load(offsets_ptr + g + 1, mask=g < n_groups, other=0)
    chunks_G = (stop_G - start_G + chunk_rows - 1) // chunk_rows
    first = tl.sum(tl.where(g < group, chunks_G, 0), axis=0)
    last = first + tl.sum(tl.where(g == group, chunks_G, 0), axis=0)
    total = tl.zeros([BLOCK], tl.float32)
    for chunk in range(first, last, CHUNKS):
        c = chunk + tl.arange(0, CHUNKS).to(tl.int64)
        at = c[:, None] * numbers + i[None, :]
        share = tl.load(shares_ptr + at, mask=(c < last)[:, None] & live[None, :], other=0)
        total += tl.sum(share, axis=0)
    at = group.to(tl.int64) * numbers + i
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=live)
