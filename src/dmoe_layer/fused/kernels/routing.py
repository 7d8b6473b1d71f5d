"""The router's kernels: scores, noise, top-k, softmax and counts in one pass; the sort; backward.

A program has the tokens of one sample, so that one router serves its whole tile. Clean and noise
weights stand as columns 2e and 2e + 1 of one matrix, so that one GEMM gives both.
"""

import triton
import triton.language as tl

from .common import dot, normal_noise, rows_of_tile, sigmoid, write_tiles


@triton.jit
def _routers(
    table_ptr, rows_ptr, sample, n_experts, dim, d,
    EXPERTS: tl.constexpr, ATTRIBUTES: tl.constexpr,
):  # fmt: skip
    """The sample's clean and noise weights, summed over its attributes: [d, 2·EXPERTS] in fp32.

    ATTRIBUTES = 0: all samples have the table's only row.
    """
    c = tl.arange(0, 2 * EXPERTS)
    entry = ((c % 2) * n_experts + c // 2)[None, :].to(tl.int64) * dim + d[:, None]
    live = (c // 2 < n_experts)[None, :] & (d < dim)[:, None]
    if ATTRIBUTES == 0:
        total = tl.load(table_ptr + entry, mask=live, other=0).to(tl.float32)
    else:
        total = tl.zeros(entry.shape, tl.float32)
        for i in tl.static_range(ATTRIBUTES):
            row = tl.load(rows_ptr + sample.to(tl.int64) * ATTRIBUTES + i)
            router = table_ptr + row * 2 * n_experts * dim
            total += tl.load(router + entry, mask=live, other=0).to(tl.float32)
    return total


@triton.jit
def _scores(
    x_ptr, w_ptr, b_ptr, rows_ptr, sample, token_T, live_T, n_experts, dim,
    EXPERTS: tl.constexpr, DIM: tl.constexpr, ATTRIBUTES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Clean scores and the noise's before softplus, [T, EXPERTS] each, accumulated in fp32."""
    scores = tl.zeros([token_T.shape[0], 2 * EXPERTS], tl.float32)
    for first in range(0, dim, DIM):
        d = first + tl.arange(0, DIM)
        live = live_T[:, None] & (d < dim)[None, :]
        x_TD = tl.load(x_ptr + token_T[:, None] * dim + d[None, :], mask=live, other=0).to(DOT)
        w_DC = _routers(w_ptr, rows_ptr, sample, n_experts, dim, d, EXPERTS, ATTRIBUTES).to(DOT)
        scores = dot(x_TD, w_DC, scores, "tf32x3")
    one = tl.zeros([1], tl.int64)
    bias = _routers(b_ptr, rows_ptr, sample, n_experts, 1, one, EXPERTS, ATTRIBUTES)
    return tl.split(tl.reshape(scores + bias, [token_T.shape[0], EXPERTS, 2]))


@triton.jit(do_not_specialize=["n_samples", "n_tiles", "seed"])
def route_kernel(
    x_ptr, w_ptr, b_ptr, rows_ptr, offsets_ptr,
    logits_ptr, indices_ptr, gates_ptr, counts_ptr,
    n_samples, n_tiles, seed,
    n_experts: tl.constexpr, dim: tl.constexpr,
    K: tl.constexpr, SLOTS: tl.constexpr, NOISY: tl.constexpr,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr,
    ATTRIBUTES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile's logits (T, E), experts (T, K), gates (T, K), and its column of counts (E, tiles)."""
    tile = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    sample, first, last = rows_of_tile(offsets_ptr, n_samples, tile, TOKENS, SAMPLES)
    if sample >= n_samples:
        tl.store(counts_ptr + e.to(tl.int64) * n_tiles + tile, tl.zeros_like(e), e < n_experts)
        return
    token = first + tl.arange(0, TOKENS)
    live = token < last
    logits, spread = _scores(
        x_ptr, w_ptr, b_ptr, rows_ptr, sample, token, live, n_experts, dim,
        EXPERTS, DIM, ATTRIBUTES, DOT,
    )  # fmt: skip
    if NOISY:
        # softplus as max(v, 0) + log1p(exp(-|v|)), with log1p made exact where its argument
        # vanishes beside 1.
        small = tl.exp(-tl.abs(spread))
        one = 1 + small
        log1p = tl.where(one == 1, small, tl.log(one) * (small / (one - 1)))
        softplus = tl.where(spread < 0, 0.0, spread) + log1p
        logits += normal_noise(seed, token, EXPERTS) * softplus
    real = (e < n_experts)[None, :]
    at = token[:, None] * n_experts + e[None, :]
    tl.store(logits_ptr + at, logits, mask=live[:, None] & real)

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
        best = tl.argmax(rank, axis=1, tie_break_left=True)
        is_best = e[None, :] == best[:, None]
        score = tl.sum(tl.where(is_best, logits, 0.0), axis=1)
        rank = tl.where(is_best, -0x80000000, rank)
        chosen = tl.where(slot[None, :] == j, best[:, None], chosen)
        scores = tl.where(slot[None, :] == j, score[:, None], scores)
    # The first score is the largest.
    largest = tl.sum(tl.where(slot[None, :] == 0, scores, 0.0), axis=1)
    powers = tl.where(slot[None, :] < K, tl.exp(scores - largest[:, None]), 0.0)
    gates = powers / tl.sum(powers, axis=1)[:, None]
    at = token[:, None] * K + slot[None, :]
    live_slots = live[:, None] & (slot < K)[None, :]
    tl.store(indices_ptr + at, chosen.to(tl.int64), mask=live_slots)
    tl.store(gates_ptr + at, gates, mask=live_slots)
    taken = (rank == -0x80000000) & real & live[:, None]
    count = tl.sum(taken.to(tl.int32), axis=0)
    tl.store(counts_ptr + e.to(tl.int64) * n_tiles + tile, count, e < n_experts)


@triton.jit(do_not_specialize=["n_samples", "n_tiles", "n_pair_tiles"])
def sort_kernel(
    indices_ptr, offsets_ptr, starts_ptr, order_ptr, pair_offsets_ptr, pair_tiles_ptr,
    n_samples, n_tiles, n_pair_tiles,
    n_experts: tl.constexpr, K: tl.constexpr,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Writes each (token, slot) pair of a tile to its place in the order by expert.

    ``starts`` (E, tiles) is where the tile's first pair of each expert goes. Pairs of one expert
    stay in the order of their tokens: nothing depends on which program runs first. The tile map of
    that order is shared out among the programs.
    """
    tile = tl.program_id(0)
    for first in range(tile * 16, n_pair_tiles, n_tiles * 16):
        write_tiles(
            pair_tiles_ptr, pair_offsets_ptr, n_experts, first + tl.arange(0, 16), n_pair_tiles,
            EXPERTS,
        )  # fmt: skip
    e = tl.arange(0, EXPERTS)
    sample, first, last = rows_of_tile(offsets_ptr, n_samples, tile, TOKENS, SAMPLES)
    if sample >= n_samples:
        return
    token = first + tl.arange(0, TOKENS)
    live = token < last
    chosen = tl.zeros([TOKENS, EXPERTS], tl.int32)
    for j in tl.static_range(K):
        expert = tl.load(indices_ptr + token * K + j, mask=live, other=-1)
        chosen += (expert[:, None] == e[None, :]).to(tl.int32)
    starts = tl.load(starts_ptr + e.to(tl.int64) * n_tiles + tile, mask=e < n_experts, other=0)
    place = starts[None, :] + tl.cumsum(chosen, axis=0) - chosen
    for j in tl.static_range(K):
        expert = tl.load(indices_ptr + token * K + j, mask=live, other=-1)
        row = tl.sum(tl.where(expert[:, None] == e[None, :], place, 0), axis=1)
        pair = token * K + j
        tl.store(order_ptr + row, pair.to(order_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n_samples", "chunk_tokens", "seed"])
def route_backward_kernel(
    dlogits_ptr, dgates_ptr, indices_ptr, gates_ptr,
    x_ptr, w_ptr, b_ptr, rows_ptr, offsets_ptr, dx_ptr, dw_ptr, db_ptr,
    n_samples, chunk_tokens, seed,
    n_experts: tl.constexpr, dim: tl.constexpr,
    K: tl.constexpr, NOISY: tl.constexpr,
    TOKENS: tl.constexpr, SAMPLES: tl.constexpr, EXPERTS: tl.constexpr, DIM: tl.constexpr,
    ATTRIBUTES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of one sample's tokens, and the chunk's share of dw (2, E, D) and db (2, E).

    The second axis of the grid has DIM features each. No atomics: each share is written once, and
    summed afterwards in the same order every time.
    """
    chunk = tl.program_id(0)
    d = tl.program_id(1) * DIM + tl.arange(0, DIM)
    sample, first, last = rows_of_tile(offsets_ptr, n_samples, chunk, chunk_tokens, SAMPLES)
    if sample >= n_samples:
        return
    e = tl.arange(0, EXPERTS)
    w_DC = _routers(w_ptr, rows_ptr, sample, n_experts, dim, d, EXPERTS, ATTRIBUTES)
    dw_CD = tl.zeros([2 * EXPERTS, DIM], tl.float32)
    db_C = tl.zeros([2 * EXPERTS], tl.float32)
    for tile in range(first, last, TOKENS):
        token = tile + tl.arange(0, TOKENS).to(tl.int64)
        live = token < last
        live_te = live[:, None] & (e < n_experts)[None, :]
        dscores = tl.zeros([TOKENS, EXPERTS], tl.float32)
        if dlogits_ptr is not None:
            at = token[:, None] * n_experts + e[None, :]
            dscores += tl.load(dlogits_ptr + at, mask=live_te, other=0)
        if dgates_ptr is not None:
            # Softmax over the K chosen: dscore_j = gate_j · (dgate_j - Σ_i gate_i · dgate_i).
            mean = tl.zeros([TOKENS], tl.float32)
            for j in tl.static_range(K):
                gate = tl.load(gates_ptr + token * K + j, mask=live, other=0)
                mean += gate * tl.load(dgates_ptr + token * K + j, mask=live, other=0)
            for j in tl.static_range(K):
                gate = tl.load(gates_ptr + token * K + j, mask=live, other=0)
                dgate = tl.load(dgates_ptr + token * K + j, mask=live, other=0)
                expert = tl.load(indices_ptr + token * K + j, mask=live, other=-1)
                dscore = gate * (dgate - mean)
                dscores += tl.where(expert[:, None] == e[None, :], dscore[:, None], 0.0)
        dspread = tl.zeros_like(dscores)
        if NOISY:
            _, spread = _scores(
                x_ptr, w_ptr, b_ptr, rows_ptr, sample, token, live, n_experts, dim,
                EXPERTS, DIM, ATTRIBUTES, DOT,
            )  # fmt: skip
            noise = normal_noise(seed, token, EXPERTS)
            dspread = tl.where(live_te, dscores * noise * sigmoid(spread), 0.0)
        d_TC = tl.reshape(tl.join(dscores, dspread), [TOKENS, 2 * EXPERTS])
        db_C += tl.sum(d_TC, axis=0)
        at = token[:, None] * dim + d[None, :]
        live_td = live[:, None] & (d < dim)[None, :]
        x_TD = tl.load(x_ptr + at, mask=live_td, other=0).to(tl.float32)
        dw_CD = dot(tl.trans(d_TC), x_TD, dw_CD, "tf32x3")
        dx_TD = dot(d_TC, tl.trans(w_DC), None, "tf32x3")
        tl.store(dx_ptr + at, dx_TD.to(dx_ptr.dtype.element_ty), mask=live_td)
    c = tl.arange(0, 2 * EXPERTS)
    share = chunk.to(tl.int64) * 2 * n_experts + (c % 2) * n_experts + c // 2
    real_c = c // 2 < n_experts
    at = share[:, None] * dim + d[None, :]
    tl.store(dw_ptr + at, dw_CD, mask=real_c[:, None] & (d < dim)[None, :])
    if tl.program_id(1) == 0:
        tl.store(db_ptr + share, db_C, mask=real_c)
