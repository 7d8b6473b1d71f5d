"""The wide experts' kernels: grouped GEMMs over the rows of every expert, without a host sync.

Rows stand sorted by expert, and buffers hold those of one segment of them, from row ``base`` on.
Gathers happen where a GEMM loads its operand, and bias, activation, dropout and gate where it
stores its result. OFFSET is the type of offsets into tensors with a row for each token or pair.
"""

import triton
import triton.language as tl

from .activations import activate, slope
from .common import dot, rows_of_chunk, rows_of_program, store_pairs
from .dropout import load_kept


@triton.jit
def _rows_of_segment(tiles_ptr, program, base, stop, ROWS: tl.constexpr):
    """As ``rows_of_program``, of the rows from ``base`` to ``stop``."""
    expert, first, rows = rows_of_program(tiles_ptr, program, ROWS)
    start = tl.maximum(first, base)
    return expert, start, tl.minimum(first + rows, stop) - start


@triton.jit
def _product(
    a_ptr, row_R, live_R, w_ptr, stride_n, stride_k, n, columns, depth,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ_k a[row, k] · w[n, k] in fp32: [R, n]. ``a`` has ``depth`` numbers a row."""
    dtype: tl.constexpr = w_ptr.dtype.element_ty
    k = tl.arange(0, DEPTH)
    a_ptrs = a_ptr + row_R[:, None] * depth + k[None, :]
    w_ptrs = w_ptr + n.to(row_R.dtype)[None, :] * stride_n + k[:, None] * stride_k
    total = tl.zeros([row_R.shape[0], n.shape[0]], tl.float32)
    live_n = (n < columns)[None, :]
    for first in range(0, depth, DEPTH):
        live_k = first + k < depth
        a = tl.load(a_ptrs, mask=live_R[:, None] & live_k[None, :], other=0).to(dtype)
        w = tl.load(w_ptrs, mask=live_k[:, None] & live_n, other=0)
        total = dot(a, w, total, PRECISION)
        a_ptrs += DEPTH
        w_ptrs += DEPTH * stride_k
    return total


@triton.jit(do_not_specialize=["base", "stop"])
def hidden_kernel(
    x_ptr, order_ptr, tiles_ptr, w1_ptr, b1_ptr, z_ptr, h_ptr, base, stop,
    dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """h[row] = act(w1 · x + b1), and z[row], what it is the activation of, where z is wanted.

    Columns of a gated expert's product are those of the gate and of the linear half by turns, so
    that what belongs together is in the same thread.
    """
    first_rows: tl.constexpr = 2 * hidden if GATED else hidden
    UNITS: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    parts: tl.constexpr = (hidden + UNITS - 1) // UNITS
    program = tl.program_id(0)
    expert, first, rows = _rows_of_segment(tiles_ptr, program // parts, base, stop, ROWS)
    if rows <= 0:
        return
    first_unit = program % parts * UNITS
    n = tl.arange(0, COLUMNS)
    n = first_unit + n // 2 + n % 2 * hidden if GATED else first_unit + n
    row = first + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < rows
    token = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET) // K
    w1_ptr += expert.to(tl.int64) * first_rows * dim
    z = _product(x_ptr, token, live, w1_ptr, dim, 1, n, first_rows, dim, PRECISION, DEPTH)
    if b1_ptr is not None:
        z += tl.load(b1_ptr + expert * first_rows + n, mask=n < first_rows, other=0)[None, :]
    z = z.to(h_ptr.dtype.element_ty)
    unit = first_unit + tl.arange(0, UNITS)
    inside = live[:, None] & (unit < hidden)[None, :]
    row = (row - base).to(OFFSET)[:, None]
    at = row * first_rows + unit[None, :]
    if GATED:
        z, linear = tl.split(tl.reshape(z, [ROWS, UNITS, 2]))
        if z_ptr is not None:
            tl.store(z_ptr + at + hidden, linear, mask=inside)
    if z_ptr is not None:
        tl.store(z_ptr + at, z, mask=inside)
    h = activate(z.to(tl.float32), ACTIVATION)
    if GATED:
        h *= linear.to(tl.float32)
    at = row * hidden + unit[None, :]
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["base", "stop"])
def output_kernel(
    h_ptr, order_ptr, tiles_ptr, w_ptr, b_ptr, gates_ptr, kept_ptr, y_ptr, rest_ptr,
    base, stop, scale,
    dim: tl.constexpr, hidden: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    stride_d: tl.constexpr, stride_h: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A pair's gate · Dropout(w · h[row] + b); without gates and b a plain product."""
    parts: tl.constexpr = (dim + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    expert, first, rows = _rows_of_segment(tiles_ptr, program // parts, base, stop, ROWS)
    if rows <= 0:
        return
    first_n = program % parts * COLUMNS
    n = first_n + tl.arange(0, COLUMNS)
    row = first + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < rows
    w_ptr += expert.to(tl.int64) * hidden * dim
    row_h = (row - base).to(OFFSET)
    y = _product(h_ptr, row_h, live, w_ptr, stride_d, stride_h, n, dim, hidden, PRECISION, DEPTH)
    if b_ptr is not None:
        y += tl.load(b_ptr + expert * dim + n, mask=n < dim, other=0)[None, :]
    pair = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET)
    if kept_ptr is not None:
        words: tl.constexpr = (dim + 31) // 32
        kept = load_kept(kept_ptr, row.to(OFFSET), live, first_n // 32, words, COLUMNS)
        y = tl.where(kept, y, 0.0)
    if gates_ptr is not None:
        y *= tl.load(gates_ptr + pair, mask=live, other=0)[:, None] * scale
    store_pairs(y_ptr, rest_ptr, pair, live, n, dim, y, K)


@triton.jit(do_not_specialize=["base", "stop"])
def gather_gradient_kernel(
    dy_ptr, order_ptr, tiles_ptr, gates_ptr, b2_ptr, kept_ptr, do_ptr, gated_ptr, dgates_ptr,
    base, stop, scale,
    dim: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """do[row], the gradient of the row's output after dropout; gate · do; and <do, b2>."""
    expert, first, rows = _rows_of_segment(tiles_ptr, tl.program_id(0), base, stop, ROWS)
    if rows <= 0:
        return
    row = first + tl.arange(0, ROWS)
    live = tl.arange(0, ROWS) < rows
    pair = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET)
    row = row.to(OFFSET)
    gate = tl.load(gates_ptr + pair, mask=live, other=0) * scale
    dgate = tl.zeros([ROWS], tl.float32)
    words: tl.constexpr = (dim + 31) // 32
    for first_n in range(0, dim, COLUMNS):
        n = first_n + tl.arange(0, COLUMNS)
        inside = live[:, None] & (n < dim)[None, :]
        at = (pair // K)[:, None] * dim + n[None, :]
        do = tl.load(dy_ptr + at, mask=inside, other=0).to(tl.float32)
        if kept_ptr is not None:
            kept = load_kept(kept_ptr, row, live, first_n // 32, words, COLUMNS)
            do = tl.where(kept, do, 0.0)
        if b2_ptr is not None:
            b2 = tl.load(b2_ptr + expert * dim + n, mask=n < dim, other=0)
            dgate += tl.sum(do * b2[None, :], axis=1)
        at = (row - base)[:, None] * dim + n[None, :]
        tl.store(do_ptr + at, do.to(do_ptr.dtype.element_ty), mask=inside)
        gated = (do * gate[:, None]).to(do_ptr.dtype.element_ty)
        tl.store(gated_ptr + at, gated, mask=inside)
    tl.store(dgates_ptr + pair, dgate * scale, mask=live)


@triton.jit(do_not_specialize=["base", "stop", "n_pairs"])
def hidden_backward_kernel(
    do_ptr, order_ptr, tiles_ptr, gates_ptr, w2_ptr, z_ptr, h_ptr, dz_ptr, dgates_ptr,
    base, stop, n_pairs, scale,
    dim: tl.constexpr, hidden: tl.constexpr, OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dz[row]; h[row] where it is not at hand; and this slice's <do · w2, h>, in dgates[1 + slice].

    ``z`` may be h itself where the activation is ReLU, which does not change it.
    """
    parts: tl.constexpr = (hidden + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    expert, first, rows = _rows_of_segment(tiles_ptr, program // parts, base, stop, ROWS)
    if rows <= 0:
        return
    part = program % parts
    n = part * COLUMNS + tl.arange(0, COLUMNS)
    live = tl.arange(0, ROWS) < rows
    row = (first - base + tl.arange(0, ROWS)).to(OFFSET)
    w2_ptr += expert.to(tl.int64) * hidden * dim
    da = _product(do_ptr, row, live, w2_ptr, 1, hidden, n, hidden, dim, PRECISION, DEPTH)
    inside = live[:, None] & (n < hidden)[None, :]
    at = row[:, None] * hidden + n[None, :]
    first_rows: tl.constexpr = 2 * hidden if GATED else hidden
    at_z = row[:, None] * first_rows + n[None, :]
    z = tl.load(z_ptr + at_z, mask=inside, other=0).to(tl.float32)
    h = activate(z, ACTIVATION)
    pair = tl.load(order_ptr + first + tl.arange(0, ROWS), mask=live, other=0).to(OFFSET)
    gate = tl.load(gates_ptr + pair, mask=live, other=0) * scale
    if GATED:
        dlinear = da * h * gate[:, None]
        tl.store(dz_ptr + at_z + hidden, dlinear.to(dz_ptr.dtype.element_ty), mask=inside)
        linear = tl.load(z_ptr + at_z + hidden, mask=inside, other=0).to(tl.float32)
        h *= linear
        dz = slope(z, da * linear, ACTIVATION) * gate[:, None]
    else:
        dz = slope(z, da, ACTIVATION) * gate[:, None]
    tl.store(dz_ptr + at_z, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    if h_ptr is not None:
        tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=inside)
    dgate = tl.sum(da * h, axis=1) * scale
    tl.store(dgates_ptr + (1 + part).to(OFFSET) * n_pairs + pair, dgate, mask=live)


@triton.jit
def _sum_of_products(
    a_ptr, b_ptr, order_ptr, first, last, base, i, j,
    a_columns: tl.constexpr, b_columns: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    GATHER: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Σ_row a[row] · b[row]ᵀ, [i, j], and if BIAS Σ_row a, [i, 16] with all columns equal.

    The latter is a product with ones: a sum over a tile's rows would pass numbers between the
    threads, and wait for them, at every tile.
    """
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    bias = tl.zeros([i.shape[0], 16], tl.float32)
    # Made in fp32, since the interpreter of Triton 3.7 and older has no scalars of bf16.
    ones = tl.full([ROWS, 16], 1, tl.float32).to(dtype)
    order_ptr += first
    first_row = (first - base).to(OFFSET)
    rows = last - first
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < rows
        at = (first_row + row)[:, None] * a_columns + i[None, :]
        inside = live[:, None] & (i < a_columns)[None, :]
        a = tl.trans(tl.load(a_ptr + at, mask=inside, other=0))
        if GATHER:
            row_b = tl.load(order_ptr + row, mask=live, other=0).to(OFFSET) // K
        else:
            row_b = first_row + row
        inside = live[:, None] & (j < b_columns)[None, :]
        at = row_b[:, None] * b_columns + j[None, :]
        b = tl.load(b_ptr + at, mask=inside, other=0).to(dtype)
        total = dot(a, b, total, PRECISION)
        if BIAS:
            bias = dot(a, ones, bias, "tf32x3")
    return total, bias


@triton.jit
def _share_of_weight(
    a_ptr, b_ptr, order_ptr, share_ptr, bias_ptr, chunk, tile, first, last, base,
    a_columns: tl.constexpr, b_columns: tl.constexpr, K: tl.constexpr, OFFSET: tl.constexpr,
    GATHER: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes a tile of Σ_row a[row] · b[row]ᵀ, and if it is the first of its rows Σ_row a."""
    tiles_b: tl.constexpr = (b_columns + COLUMNS - 1) // COLUMNS
    i = (tile // tiles_b) * COLUMNS + tl.arange(0, COLUMNS)
    j = (tile % tiles_b) * COLUMNS + tl.arange(0, COLUMNS)
    if tile % tiles_b == 0:
        total, bias = _sum_of_products(
            a_ptr, b_ptr, order_ptr, first, last, base, i, j, a_columns, b_columns, K, OFFSET,
            GATHER, True, PRECISION, ROWS,
        )  # fmt: skip
        own = bias_ptr + chunk.to(tl.int64) * a_columns + i
        tl.store(own, tl.max(bias, axis=1).to(bias_ptr.dtype.element_ty), mask=i < a_columns)
    else:
        total, bias = _sum_of_products(
            a_ptr, b_ptr, order_ptr, first, last, base, i, j, a_columns, b_columns, K, OFFSET,
            GATHER, False, PRECISION, ROWS,
        )  # fmt: skip
    inside = (i < a_columns)[:, None] & (j < b_columns)[None, :]
    share_ptr += chunk.to(tl.int64) * a_columns * b_columns
    at = i[:, None] * b_columns + j[None, :]
    tl.store(share_ptr + at, total.to(share_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["base", "stop", "n_windows", "window_tiles", "first_tile"])
def weight_backward_kernel(
    dz_ptr, x_ptr, gated_ptr, h_ptr, order_ptr, tiles_ptr, offsets_ptr,
    dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, base, stop, n_windows, window_tiles, first_tile,
    n_experts: tl.constexpr, first_rows: tl.constexpr, hidden: tl.constexpr, dim: tl.constexpr,
    K: tl.constexpr, OFFSET: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A chunk's share of dw1 = Σ_row dz[row] · x[token]ᵀ and db1 = Σ_row dz[row].

    And of dw2 and db2, by (gate · do)[row] and h[row].

    SPLIT: chunks as ``rows_of_chunk`` cuts them, to be summed afterwards; else one program has all
    rows of its expert, and writes the gradient itself.
    """
    columns: tl.constexpr = (dim + COLUMNS - 1) // COLUMNS
    tiles_1: tl.constexpr = (first_rows + COLUMNS - 1) // COLUMNS * columns
    tiles: tl.constexpr = tiles_1 + columns * ((hidden + COLUMNS - 1) // COLUMNS)
    chunk, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if SPLIT:
        _, first, last = rows_of_chunk(
            tiles_ptr, offsets_ptr, n_experts, chunk, n_windows, window_tiles, first_tile
        )
    else:
        first, last = tl.load(offsets_ptr + chunk), tl.load(offsets_ptr + chunk + 1)
    first, last = tl.maximum(first, base), tl.minimum(last, stop)
    if tile < tiles_1:
        _share_of_weight(
            dz_ptr, x_ptr, order_ptr, dw1_ptr, db1_ptr, chunk, tile, first, last, base,
            first_rows, dim, K, OFFSET, True, PRECISION, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _share_of_weight(
            gated_ptr, h_ptr, order_ptr, dw2_ptr, db2_ptr, chunk, tile - tiles_1, first, last,
            base, dim, hidden, K, OFFSET, False, PRECISION, ROWS, COLUMNS,
        )  # fmt: skip
