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
def _normal_pair(radius, angle):
    """Two standard normal numbers from two words of random bits (Box and Muller).

    The angle's two highest bits choose one of four arcs around the axes, the rest the place within
    it, so that sine and cosine are needed between -π/4 and π/4 only: there these polynomials (of
    the Cephes library) have fp32's accuracy, and unlike tl.sin need no stack for huge arguments.
    """
    # Half a step off zero, of which there is no logarithm.
    uniform = (radius.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    r = tl.sqrt(-2 * tl.log(uniform))
    t = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.6572951981e-10
    t2 = t * t
    sine = t + t * t2 * (-1.6666654611e-1 + t2 * (8.3321608736e-3 - t2 * 1.9515295891e-4))
    cosine = 4.166664568298827e-2 + t2 * (-1.388731625493765e-3 + t2 * 2.443315711809948e-5)
    cosine = 1 - 0.5 * t2 + t2 * t2 * cosine
    cosine = tl.where((angle >> 31) != 0, -cosine, cosine)
    along = ((angle >> 30) & 1) != 0
    return r * tl.where(along, cosine, sine), r * tl.where(along, sine, cosine)


@triton.jit
def normal_noise(seed, token_T, EXPERTS: tl.constexpr):
    """Standard normal numbers, [T, EXPERTS]; a call of the generator makes four of them."""
    a, b, c, d = random_words(seed, token_T, tl.arange(0, EXPERTS // 4), 0)
    a, b = _normal_pair(a, b)
    c, d = _normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [token_T.shape[0], EXPERTS])


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
