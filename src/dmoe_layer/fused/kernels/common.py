"""What the kernels share: which rows a program has, activations, random bits."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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


@triton.jit
def kept(seed, pair_R, first_column, threshold, COLUMNS: tl.constexpr):
    """Which entries dropout keeps, [R, COLUMNS], from ``first_column``, a multiple of 8, on.

    A random word holds two 16-bit numbers, each compared with a threshold, so that a call of the
    generator decides eight entries.
    """
    column = first_column // 8 + tl.arange(0, COLUMNS // 8)
    a, b, c, d = random_words(seed, pair_R, column, 1)
    words = tl.join(tl.join(a, b), tl.join(c, d))
    halves = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.reshape(halves, [pair_R.shape[0], COLUMNS]) >= threshold
