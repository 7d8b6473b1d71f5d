"""The router's kernels: scores, noise, top-k, softmax and counts in one pass; the sort; backward.

A program has the tokens of one sample, so that one router serves its whole tile. Clean and noise
weights stand as columns 2e and 2e + 1 of one matrix, so that one GEMM gives both.
"""

import triton
import triton.language as tl

from .common import TILE, dot, write_tiles
from .noise import normal_noise, softplus_and_slope


@triton.jit
def _tokens_of_program(offsets_ptr, n_samples, sample_tokens, block, SAMPLES: tl.constexpr):
    """(sample, first token, number of tokens) of a program; no tokens, or no sample: none.

    Without offsets all samples have ``sample_tokens``, and stand along the grid's second axis.
    There are fewer than 2³¹ tokens.
    """
    if offsets_ptr is None:
        sample = tl.program_id(1)
        start = tl.program_id(0) * block
        count = tl.minimum(sample_tokens - start, block)
        return sample, sample * sample_tokens + start, count
    else:
        tile, s = tl.program_id(0), tl.arange(0, SAMPLES)
        start_S = tl.load(offsets_ptr + s, mask=s < n_samples, other=0).to(tl.int32)
        stop_S = tl.load(offsets_ptr + s + 1, mask=s < n_samples, other=0).to(tl.int32)
        tiles_S = (stop_S - start_S + block - 1) // block
        end_S = tl.cumsum(tiles_S, axis=0)
        sample = tl.sum((end_S <= tile).to(tl.int32), axis=0)
        first_S = start_S + (tile - (end_S - tiles_S)) * block
        first = tl.sum(tl.where(s == sample, first_S, 0), axis=0)
        stop = tl.sum(tl.where(s == sample, stop_S, 0), axis=0)
        return sample, first, tl.minimum(stop - first, block)


@triton.jit
def _tile():
    """The program's number along the grid's first two axes."""
    return tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


@triton.jit
def _routers(
    table_ptr, rows_ptr, sample, n_experts, dim, d,
    EXPERTS: tl.constexpr, ATTRIBUTES: tl.constexpr,
):  # fmt: skip
    """The sample's clean and noise weights, summed over its attributes: [d, 2·EXPERTS] in fp32.

    ATTRIBUTES = 0: all samples have the table's only row.
    """
    c = tl.arange(0, 2 * EXPERTS)
    entry = ((c % 2) * n_experts + c // 2)[None, :] * dim + d[:, None]
    live = (c // 2 < n_experts)[None, :] & (d < dim)[:, None]
    if ATTRIBUTES == 0:
        total = tl.load(table_ptr + entry, mask=live, other=0).to(tl.float32)
    else:
        total = tl.zeros(entry.shape, tl.float32)
        for i in tl.static_range(ATTRIBUTES):
            row = tl.load(rows_ptr + sample * ATTRIBUTES + i)
            router = table_ptr + row * 2 * n_experts * dim
            total += tl.load(router + entry, mask=live, other=0).to(tl.float32)
    return total


@triton.jit
def _scores(
    x_ptr, w_ptr, b_ptr, rows_ptr, sample, live_T, n_experts, dim,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr, ATTRIBUTES: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Clean scores and the noise's before softplus, [T, EXPERTS] each, accumulated in fp32.

    ``x_ptr`` points to the tile's first token.
    """
    t = tl.arange(0, TOKENS)
    scores = tl.zeros([TOKENS, 2 * EXPERTS], tl.float32)
    for first in range(0, dim, DIM):
        d = first + tl.arange(0, DIM)
        live = live_T[:, None] & (d < dim)[None, :]
        x_TD = tl.load(x_ptr + t[:, None] * dim + d[None, :], mask=live, other=0).to(DOT)
        w_DC = _routers(w_ptr, rows_ptr, sample, n_experts, dim, d, EXPERTS, ATTRIBUTES).to(DOT)
        scores = dot(x_TD, w_DC, scores, "tf32x3")
    one = tl.zeros([1], tl.int32)
    bias = _routers(b_ptr, rows_ptr, sample, n_experts, 1, one, EXPERTS, ATTRIBUTES)
    return tl.split(tl.reshape(scores + bias, [TOKENS, EXPERTS, 2]))


@triton.jit
def _packed(counts_TE, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts of at most 255, four experts' in the bytes of one word: [T, EXPERTS // 4].

    What is then summed or scanned over the tokens is a quarter of what it was.
    """
    tl.static_assert(TOKENS <= 255, "a tile's counts do not fit into bytes")
    shift = (tl.arange(0, EXPERTS) % 4) * 8
    words = tl.reshape(
        counts_TE.to(tl.uint32) << shift[None, :].to(tl.uint32), [TOKENS, EXPERTS // 4, 4]
    )
    return tl.sum(words, axis=2)


@triton.jit(do_not_specialize=["n_samples", "sample_tokens", "seed"])
def route_kernel(
    x_ptr, w_ptr, b_ptr, rows_ptr, offsets_ptr,
    logits_ptr, indices_ptr, gates_ptr, chosen_ptr, slopes_ptr, counts_ptr,
    n_samples, sample_tokens, seed,
    n_experts: tl.constexpr, dim: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr, NOISY: tl.constexpr,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr,
    ATTRIBUTES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile's logits (T, E), experts (T, K), gates (T, K), and its column of counts (E, tiles).

    Backward gets the experts in a byte each and, of noisy scores, noise · softplus'(spread),
    (T, E).
    """
    e = tl.arange(0, EXPERTS)
    sample, first, count = _tokens_of_program(
        offsets_ptr, n_samples, sample_tokens, TOKENS, SAMPLES
    )
    counts_at = counts_ptr + e * (tl.num_programs(0) * tl.num_programs(1)) + _tile()
    if sample >= n_samples:
        tl.store(counts_at, tl.zeros_like(e), e < n_experts)
        return
    t = tl.arange(0, TOKENS)
    live = t < count
    before = first.to(tl.int64)
    logits, spread = _scores(
        x_ptr + before * dim, w_ptr, b_ptr, rows_ptr, sample, live, n_experts, dim,
        TOKENS, EXPERTS, DIM, ATTRIBUTES, DOT,
    )  # fmt: skip
    real = (e < n_experts)[None, :]
    live_te = live[:, None] & real
    at = t[:, None] * n_experts + e[None, :]
    if NOISY:
        softplus, slope = softplus_and_slope(spread)
        noise = normal_noise(seed, first + t, EXPERTS)
        logits += noise * softplus
        if slopes_ptr is not None:
            slope = (noise * slope).to(slopes_ptr.dtype.element_ty)
            tl.store(slopes_ptr + before * n_experts + at, slope, mask=live_te)
    tl.store(logits_ptr + before * n_experts + at, logits, mask=live_te)

    # As integers scores sort with a NaN above all, as in torch.topk, and what is taken or no
    # expert below all, -inf included, so that no expert is ever chosen twice.
    bits = logits.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(logits != logits, 0x7FFFFFFF, rank)
    rank = tl.where(real, rank, -0x80000000)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros([TOKENS, SLOTS], tl.int32)
    scores = tl.full([TOKENS, SLOTS], float("-inf"), tl.float32)
    for j in tl.static_range(K):
        highest, best = tl.max(rank, axis=1, return_indices=True)
        rank = tl.where(e[None, :] == best[:, None], -0x80000000, rank)
        # Of a NaN this is another NaN.
        score = tl.where(highest < 0, highest ^ 0x7FFFFFFF, highest).to(tl.float32, bitcast=True)
        if j == 0:
            largest = score
        chosen = tl.where(slot[None, :] == j, best[:, None], chosen)
        scores = tl.where(slot[None, :] == j, score[:, None], scores)
    powers = tl.where(slot[None, :] < K, tl.exp(scores - largest[:, None]), 0.0)
    gates = powers / tl.sum(powers, axis=1)[:, None]
    at = t[:, None] * K + slot[None, :]
    live_slots = live[:, None] & (slot < K)[None, :]
    tl.store(indices_ptr + before * K + at, chosen.to(tl.int64), mask=live_slots)
    tl.store(gates_ptr + before * K + at, gates, mask=live_slots)
    tl.store(chosen_ptr + before * K + at, chosen.to(tl.int8), mask=live_slots)
    taken = (rank == -0x80000000) & live_te
    words = tl.sum(_packed(taken, TOKENS, EXPERTS), axis=0)
    byte = (tl.arange(0, 4) * 8).to(tl.uint32)
    counts = tl.reshape((words[:, None] >> byte[None, :]) & 0xFF, [EXPERTS])
    tl.store(counts_at, counts.to(tl.int32), e < n_experts)


@triton.jit(do_not_specialize=["n_samples", "sample_tokens", "n_pair_tiles"])
def sort_kernel(
    chosen_ptr, offsets_ptr, ends_ptr, order_ptr, starts_ptr, pair_tiles_ptr,
    n_samples, sample_tokens, n_pair_tiles,
    n_experts: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes each (token, slot) pair of a tile to its place in the order by expert.

    ``ends`` (E, tiles) are the sums of the counts up to and with each tile's, expert after expert,
    so that the entry before a tile's own is where its first pair goes. The first program writes
    ``starts`` (2, E + 1), where each expert's pairs begin, and where its tiles do. Pairs of one
    expert stay in the order of their tokens: nothing depends on which program runs first. The tile
    map of that order is shared out among the programs.
    """
    sample, first, count = _tokens_of_program(
        offsets_ptr, n_samples, sample_tokens, TOKENS, SAMPLES
    )
    tile, n_tiles = _tile(), tl.num_programs(0) * tl.num_programs(1)
    e = tl.arange(0, EXPERTS)
    start = tl.load(ends_ptr + e * n_tiles - 1, mask=(e > 0) & (e < n_experts), other=0)
    stop = tl.load(ends_ptr + e * n_tiles + n_tiles - 1, mask=e < n_experts, other=0)
    for first_tile in range(tile * 16, n_pair_tiles, n_tiles * 16):
        pair_tile = first_tile + tl.arange(0, 16)
        write_tiles(pair_tiles_ptr, start, stop, pair_tile, n_pair_tiles, EXPERTS)
    if tile == 0:
        tile_stop = tl.cumsum((stop - start + TILE - 1) // TILE, axis=0)
        tl.store(starts_ptr + 1 + e, stop, mask=e < n_experts)
        tl.store(starts_ptr + n_experts + 2 + e, tile_stop, mask=e < n_experts)
        tl.store(starts_ptr, 0)
        tl.store(starts_ptr + n_experts + 1, 0)
    if sample >= n_samples:
        return
    t = tl.arange(0, TOKENS)
    live = t < count
    group = tl.arange(0, EXPERTS // 4)
    own = tl.zeros([TOKENS, EXPERTS // 4], tl.uint32)
    for j in tl.static_range(K):
        expert = tl.load(chosen_ptr + first.to(tl.int64) * K + t * K + j, mask=live, other=0).to(
            tl.int32
        )
        one = tl.where(live, 1, 0).to(tl.uint32) << (expert % 4 * 8).to(tl.uint32)
        own += tl.where((expert // 4)[:, None] == group[None, :], one[:, None], 0)
    # The tokens before, four experts' counts in a word as in ``_packed``.
    before = tl.cumsum(own, axis=0) - own
    for j in tl.static_range(K):
        pair = first * K + t * K + j
        expert = tl.load(chosen_ptr + pair, mask=live, other=0).to(tl.int32)
        word = tl.sum(tl.where((expert // 4)[:, None] == group[None, :], before, 0), axis=1)
        place = expert * n_tiles + tile
        start = tl.load(ends_ptr + place - 1, mask=live & (place > 0), other=0)
        row = start + ((word >> (expert % 4 * 8).to(tl.uint32)) & 0xFF).to(tl.int32)
        tl.store(order_ptr + row, pair, mask=live)


@triton.jit(do_not_specialize=["n_samples", "sample_tokens", "chunk_tokens"])
def route_backward_kernel(
    dlogits_ptr, dgates_ptr, chosen_ptr, gates_ptr, slopes_ptr,
    x_ptr, w_ptr, rows_ptr, offsets_ptr, others_ptr, dx_ptr, dw_ptr, db_ptr, routers_ptr,
    n_samples, sample_tokens, chunk_tokens,
    n_experts: tl.constexpr, dim: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr,
    ATTRIBUTES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of one sample's tokens, and the chunk's share of dw (2, E, D) and db (2, E).

    To dx it adds ``others``, the gradient that other uses of x have left, if there is any.
    The third axis of the grid has DIM features each. No atomics: each share is written once, with
    the sample's routers beside it, and summed afterwards in the same order every time.
    """
    chunk = _tile()
    is_first = tl.program_id(2) == 0
    d = tl.program_id(2) * DIM + tl.arange(0, DIM)
    sample, first, count = _tokens_of_program(
        offsets_ptr, n_samples, sample_tokens, chunk_tokens, SAMPLES
    )
    routers: tl.constexpr = 1 if ATTRIBUTES == 0 else ATTRIBUTES
    for i in tl.static_range(routers):
        row = tl.full([], -1, tl.int64)
        if sample < n_samples:
            row = tl.zeros([], tl.int64)
            if ATTRIBUTES > 0:
                row = tl.load(rows_ptr + sample * ATTRIBUTES + i)
        if is_first:
            tl.store(routers_ptr + chunk * routers + i, row.to(tl.int32))
    if sample >= n_samples:
        return
    e = tl.arange(0, EXPERTS)
    t = tl.arange(0, TOKENS)
    w_CD = tl.trans(_routers(w_ptr, rows_ptr, sample, n_experts, dim, d, EXPERTS, ATTRIBUTES))
    dw_CD = tl.zeros([2 * EXPERTS, DIM], tl.float32)
    db_TC = tl.zeros([TOKENS, 2 * EXPERTS], tl.float32)
    at_te, at_td = t[:, None] * n_experts + e[None, :], t[:, None] * dim + d[None, :]
    for start in range(0, count, TOKENS):
        before = first.to(tl.int64) + start
        live = t < count - start
        live_te = live[:, None] & (e < n_experts)[None, :]
        dscores = tl.zeros([TOKENS, EXPERTS], tl.float32)
        if dlogits_ptr is not None:
            dscores += tl.load(dlogits_ptr + before * n_experts + at_te, mask=live_te, other=0)
        if dgates_ptr is not None:
            # Softmax over the K chosen: dscore_j = gate_j · (dgate_j - Σ_i gate_i · dgate_i).
            mean = tl.zeros([TOKENS], tl.float32)
            for j in tl.static_range(K):
                gate = tl.load(gates_ptr + before * K + t * K + j, mask=live, other=0)
                mean += gate * tl.load(dgates_ptr + before * K + t * K + j, mask=live, other=0)
            for j in tl.static_range(K):
                gate = tl.load(gates_ptr + before * K + t * K + j, mask=live, other=0)
                dgate = tl.load(dgates_ptr + before * K + t * K + j, mask=live, other=0)
                expert = tl.load(chosen_ptr + before * K + t * K + j, mask=live, other=-1)
                dscore = gate * (dgate - mean)
                dscores += tl.where(expert[:, None] == e[None, :], dscore[:, None], 0.0)
        dspread = tl.zeros_like(dscores)
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + before * n_experts + at_te, mask=live_te, other=0).to(
                tl.float32
            )
            dspread = dscores * slope
        d_TC = tl.reshape(tl.join(dscores, dspread), [TOKENS, 2 * EXPERTS])
        db_TC += d_TC
        live_td = live[:, None] & (d < dim)[None, :]
        x_TD = tl.load(x_ptr + before * dim + at_td, mask=live_td, other=0).to(tl.float32)
        dw_CD = dot(tl.trans(d_TC), x_TD, dw_CD, PRECISION)
        dx_TD = dot(d_TC, w_CD, None, PRECISION)
        if others_ptr is not None:
            dx_TD += tl.load(others_ptr + before * dim + at_td, mask=live_td, other=0)
        tl.store(dx_ptr + before * dim + at_td, dx_TD.to(dx_ptr.dtype.element_ty), mask=live_td)
    c = tl.arange(0, 2 * EXPERTS)
    row_C = c % 2 * n_experts + c // 2
    real_C = c // 2 < n_experts
    own = chunk.to(tl.int64) * 2 * n_experts
    at = row_C[:, None] * dim + d[None, :]
    tl.store(dw_ptr + own * dim + at, dw_CD, mask=real_C[:, None] & (d < dim)[None, :])
    if is_first:
        tl.store(db_ptr + own + row_C, tl.sum(db_TC, axis=0), mask=real_C)


@triton.jit
def _sum_of_router(
    shares_ptr, routers_ptr, table_ptr, n_chunks, row, block, numbers,
    OFFSET: tl.constexpr, ROUTERS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = block * BLOCK + tl.arange(0, BLOCK)
    live = i < numbers
    total_CB = tl.zeros([CHUNKS, BLOCK], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        at = c.to(OFFSET)[:, None] * numbers + i[None, :]
        for router in tl.static_range(ROUTERS):
            theirs = tl.load(routers_ptr + c * ROUTERS + router, mask=c < n_chunks, other=-1)
            # Shares of other rows are not read, so that no NaN of theirs gets in.
            picked = (theirs == row)[:, None] & live[None, :]
            total_CB += tl.load(shares_ptr + at, mask=picked, other=0)
    total = tl.sum(total_CB, axis=0).to(table_ptr.dtype.element_ty)
    tl.store(table_ptr + row.to(tl.int64) * numbers + i, total, mask=live)


@triton.jit(do_not_specialize=["n_chunks"])
def sum_routers_kernel(
    dw_shares_ptr, db_shares_ptr, routers_ptr, dw_ptr, db_ptr, n_chunks,
    n_experts: tl.constexpr, dim: tl.constexpr, OFFSET: tl.constexpr,
    ROUTERS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw and db of a row of the table: the sum of the shares of the chunks that it has routed.

    Always in one order. The blocks of db come after those of dw.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    numbers: tl.constexpr = 2 * n_experts * dim
    blocks: tl.constexpr = (numbers + BLOCK - 1) // BLOCK
    if block < blocks:
        _sum_of_router(
            dw_shares_ptr, routers_ptr, dw_ptr, n_chunks, row, block, numbers,
            OFFSET, ROUTERS, CHUNKS, BLOCK,
        )  # fmt: skip
    else:
        _sum_of_router(
            db_shares_ptr, routers_ptr, db_ptr, n_chunks, row, block - blocks, 2 * n_experts,
            OFFSET, ROUTERS, CHUNKS, BLOCK,
        )  # fmt: skip
