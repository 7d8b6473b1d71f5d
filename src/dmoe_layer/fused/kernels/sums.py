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


@triton.jit(do_not_specialize=["w1", "b1", "w2", "b2", "chunk_rows"])
def sum_chunks_kernel(
    w1_ptr, b1_ptr, w2_ptr, b2_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, w1, b1, w2, b2,
    offsets_ptr, n_groups, chunk_rows,
    GROUPS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of the shares of each group's chunks, always in one order.

    Of four tensors, of ``w1``, ``b1``, ``w2`` and ``b2`` numbers a group: one launch takes the CPU
    less time than four.
    """
    group = tl.program_id(0)
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
