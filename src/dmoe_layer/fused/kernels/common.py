"""What the kernels share: which rows a program has, where they go, random bits."""

import triton
import triton.language as tl

from .approximations import INTERPRETED

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
def write_tiles(tiles_ptr, start_G, stop_G, tile, n_tiles, GROUPS: tl.constexpr):
    """Entries ``tile`` of the tile map, (tiles, 4): group, first row, last row, and 0.

    Group g's rows are ``start[g]`` to ``stop[g]``, cut into tiles of TILE rows; no tile has rows of
    two groups. How many tiles there are only the GPU knows, so the map has room for more than
    there are. The entries past the last tile are zeros.
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

    Read from the map: to search the groups' rows takes 250 instructions, a quarter of what a narrow
    kernel's program has. Without rows of its own there are 0 or fewer.
    """
    at = tiles_ptr + program // (TILE // ROWS) * 4
    group, first, last = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    first += program % (TILE // ROWS) * ROWS
    return group, first, tl.minimum(last - first, ROWS)


@triton.jit
def rows_of_chunk(
    tiles_ptr, offsets_ptr, n_experts, chunk, n_windows, window_tiles, first_tile,
):  # fmt: skip
    """(expert, first row, last row) of a chunk, for sums over an expert's rows.

    The tile map, whose first entry is tile ``first_tile`` here, is cut into windows of
    ``window_tiles`` tiles. Chunk c has the rows that window c has of the expert of its first tile.
    An expert that begins inside a window has chunk ``n_windows`` + expert for its rows there. So
    each row is in one chunk, and no program searches for its own.
    """
    if chunk < n_windows:
        at = tiles_ptr + chunk * window_tiles * 4
        expert, first = tl.load(at), tl.load(at + 1)
        n_tiles = tl.where(tl.load(at + 2) > first, window_tiles, 0)
    else:
        expert = chunk - n_windows
        first = tl.load(offsets_ptr + expert)
        tile = tl.maximum(tl.load(offsets_ptr + n_experts + 1 + expert) - first_tile, 0)
        n_tiles = tl.cdiv(tile, window_tiles) * window_tiles - tile
    rows = tl.minimum(n_tiles * TILE, tl.load(offsets_ptr + expert + 1) - first)
    return expert, first, first + rows


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
