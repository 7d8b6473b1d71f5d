"""What the kernels share: which rows a program has, where they go, activations, random bits."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Rows of an entry in the tile map: the most that any kernel's program has.
TILE = tl.constexpr(128)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a · b, summed in fp32; just a · b where total is None."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # Triton's interpreter multiplies the bits of bf16 as integers. In fp32 the products are
        # exact, as they are on a GPU.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def rows_of_tile(offsets_ptr, n_groups, tile, block, GROUPS: tl.constexpr):
    """(group, first row, last row) of a tile, where each group has rows of its own.

    Group g's rows are ``offsets[g]`` to ``offsets[g + 1]``, cut into tiles of ``block`` rows; no
    tile has rows of two groups. How many tiles there are only the GPU knows, so more programs are
    launched than needed: those past the last tile get ``group >= n_groups``.
    """
    g = tl.arange(0, GROUPS)
    start_G = tl.load(offsets_ptr + g, mask=g < n_groups, other=0)
    stop_G = tl.load(offsets_ptr + g + 1, mask=g < n_groups, other=0)
    tiles_G = (stop_G - start_G + block - 1) // block
    end_G = tl.cumsum(tiles_G, axis=0)
    group = tl.sum((end_G <= tile).to(tl.int32), axis=0)
    first_G = start_G + (tile - (end_G - tiles_G)) * block
    first = tl.sum(tl.where(g == group, first_G, 0), axis=0)
    stop = tl.sum(tl.where(g == group, stop_G, 0), axis=0)
    return group, first, tl.minimum(first + block, stop)


@triton.jit
def write_tiles(tiles_ptr, start_G, stop_G, tile, n_tiles, GROUPS: tl.constexpr):
    """Entries ``tile`` of the tile map, (tiles, 4): group, first row, last row, and 0.

    Tiles have TILE rows as ``rows_of_tile`` cuts them, and those past the last have none.
    """
    g = tl.arange(0, GROUPS)
    tiles_G = (stop_G - start_G + TILE - 1) // TILE
    end_G = tl.cumsum(tiles_G, axis=0)
    own_TG = (tile[:, None] >= (end_G - tiles_G)[None, :]) & (tile[:, None] < end_G[None, :])
    first_TG = start_G[None, :] + (tile[:, None] - (end_G - tiles_G)[None, :]) * TILE
    first_T = tl.sum(tl.where(own_TG, first_TG, 0), axis=1)
    stop_T = tl.sum(tl.where(own_TG, stop_G[None, :], 0), axis=1)
    group_T = tl.sum(tl.where(own_TG, g[None, :], 0), axis=1)
    at, live = tiles_ptr + tile * 4, tile < n_tiles
    tl.store(at, group_T.to(tl.int32), mask=live)
    tl.store(at + 1, first_T.to(tl.int32), mask=live)
    tl.store(at + 2, tl.minimum(first_T + TILE, stop_T).to(tl.int32), mask=live)
    tl.store(at + 3, tl.zeros_like(tile), mask=live)


@triton.jit
def rows_of_program(tiles_ptr, program, ROWS: tl.constexpr):
    """(group, first row, how many rows) of a program of at most ROWS, TILE // ROWS to a tile.

    Read from the map: to search the offsets, as ``rows_of_tile`` does, takes 250 instructions, a
    quarter of what a narrow kernel's program has. Without rows of its own there are 0 or fewer.
    """
    at = tiles_ptr + program // (TILE // ROWS) * 4
    group, first, last = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    first += program % (TILE // ROWS) * ROWS
    return group, first, tl.minimum(last - first, ROWS)


@triton.jit
def store_pairs(
    y_ptr, rest_ptr, pair, live, n, columns, value_RN, K: tl.constexpr,
):  # fmt: skip
    """Writes the pairs' rows where ``sum_pairs_kernel`` adds them: pair t·K + j is row t of y if
    j = 0, else row t·(K - 1) + j - 1 of the rest.
    """
    token, slot = pair // K, pair % K
    inside = live[:, None] & (n < columns)[None, :]
    at = token[:, None] * columns + n[None, :]
    is_first = inside & (slot == 0)[:, None]
    tl.store(y_ptr + at, value_RN.to(y_ptr.dtype.element_ty), mask=is_first)
    if K > 1:
        at = (token * (K - 1) + slot - 1)[:, None] * columns + n[None, :]
        is_other = inside & (slot > 0)[:, None]
        tl.store(rest_ptr + at, value_RN.to(rest_ptr.dtype.element_ty), mask=is_other)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of z in fp32; of a gated one that of its gate."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u.
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "quick_gelu":
        return z * sigmoid(1.702 * z)
    else:
        known: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "swiglu"
        tl.static_assert(known, "the kernels have no such activation")
        return z * sigmoid(z)


@triton.jit
def slope(z, da, ACTIVATION: tl.constexpr):
    """da times the activation's derivative at z, in fp32; of a gated one that of its gate."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, da, 0.0)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        normal = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return da * (0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * normal)
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":
        s = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return da * (s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z))
    elif ACTIVATION == "quick_gelu":
        s = sigmoid(1.702 * z)
        return da * (s + z * s * (1 - s) * 1.702)
    else:
        known: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "swiglu"
        tl.static_assert(known, "the kernels have no such activation")
        s = sigmoid(z)
        return da * (s + z * s * (1 - s))


@triton.jit
def random_words(seed, row_R, column_C, STREAM: tl.constexpr):
    """Four uint32 for each row and column, [R, C]; the same ones in every kernel that asks.

    Philox with 7 rounds, the fewest that pass all of BigCrush (Salmon et al., SC 2011, table 2):
    more keys would stand in registers all along a loop.
    """
    row = row_R[:, None].to(tl.uint64)
    column = tl.zeros_like(row) + column_C[None, :].to(tl.uint64)
    row = row + tl.zeros_like(column)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    stream = tl.full(low.shape, STREAM, tl.uint32)
    return tl.philox(seed, low, high, column.to(tl.uint32), stream, 7)
