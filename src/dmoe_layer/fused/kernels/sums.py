"""The sums that stand where others use atomics: always in one order, so always to the same bit."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def sum_pairs_kernel(
    rest_ptr, y_ptr, tokens,
    dim: tl.constexpr, REST: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """y[t] += Σ_j rest[t·REST + j], in fp32; y has each token's first pair already.

    OFFSET is the type of offsets into both.
    """
    token = tl.program_id(0).to(OFFSET) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    live = (token < tokens)[:, None] & (d < dim)[None, :]
    y_at = y_ptr + token[:, None] * dim + d[None, :]
    total = tl.load(y_at, mask=live, other=0).to(tl.float32)
    for j in tl.static_range(REST):
        at = (token * REST + j)[:, None] * dim + d[None, :]
        total += tl.load(rest_ptr + at, mask=live, other=0).to(tl.float32)
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["w1", "b1", "w2", "b2", "n_windows", "window_tiles", "first_tile"])
def sum_chunks_kernel(
    w1_ptr, b1_ptr, w2_ptr, b2_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, w1, b1, w2, b2,
    offsets_ptr, n_experts, n_windows, window_tiles, first_tile,
    OFFSET: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the shares of each expert's chunks, see ``rows_of_chunk``, always in one order.

    Of four tensors, of ``w1``, ``b1``, ``w2`` and ``b2`` numbers an expert: one launch takes the
    CPU less time than four.
    """
    expert = tl.program_id(0)
    # Whose block it is.
    block, shares_ptr, total_ptr, numbers = tl.program_id(1), w1_ptr, dw1_ptr, w1
    if block >= tl.cdiv(numbers, BLOCK):
        block -= tl.cdiv(numbers, BLOCK)
        shares_ptr, total_ptr, numbers = b1_ptr, db1_ptr, b1
        if block >= tl.cdiv(numbers, BLOCK):
            block -= tl.cdiv(numbers, BLOCK)
            shares_ptr, total_ptr, numbers = w2_ptr, dw2_ptr, w2
            if block >= tl.cdiv(numbers, BLOCK):
                block -= tl.cdiv(numbers, BLOCK)
                shares_ptr, total_ptr, numbers = b2_ptr, db2_ptr, b2
    i = block * BLOCK + tl.arange(0, BLOCK)
    live = i < numbers
    # The windows whose first tile is the expert's, after its rows that no such window has.
    tiles_ptr = offsets_ptr + n_experts + 1 + expert
    tile, end = tl.load(tiles_ptr) - first_tile, tl.load(tiles_ptr + 1) - first_tile
    first = tl.minimum(tl.cdiv(tl.maximum(tile, 0), window_tiles), n_windows)
    last = tl.minimum(tl.cdiv(tl.maximum(end, 0), window_tiles), n_windows)
    total = tl.zeros([BLOCK], tl.float32)
    for window in range(first - 1, last, CHUNKS):
        c = window + tl.arange(0, CHUNKS)
        inside = (c < last)[:, None] & live[None, :]
        c = tl.where(c < first, n_windows + expert, c).to(OFFSET)
        share = tl.load(shares_ptr + c[:, None] * numbers + i[None, :], mask=inside, other=0)
        total += tl.sum(share, axis=0)
    total_ptr += expert.to(tl.int64) * numbers
    tl.store(total_ptr + i, total.to(total_ptr.dtype.element_ty), mask=live)
