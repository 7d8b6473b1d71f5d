"""The router's noise: standard normal numbers from a counter, and the scale that softplus gives it.

Both are computed by approximations. No test of the noise's distribution shows their errors.
"""

import triton
import triton.language as tl

from .approximations import cosine, exp2, log2, reciprocal, root, sine


@triton.jit
def _normal_pair(radius, angle):
    """Two standard normal numbers from two words of random bits (Box and Muller)."""
    # Half a step off zero, of which there is no logarithm.
    uniform = (radius.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # Next to 1 the approximation may be above 0, of whose negative there is no root.
    r = root(tl.maximum(-1.3862943611198906 * log2(uniform), 0.0))
    # From -π to π, where the approximations are best.
    turn = angle.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    return r * cosine(turn), r * sine(turn)


@triton.jit
def normal_noise(seed, token_T, EXPERTS: tl.constexpr):
    """Standard normal numbers, [T, EXPERTS]; a call of the generator makes four of them.

    Philox with 7 rounds, as ``common.random_words``; a token's number fits into 32 bits.
    """
    zero = tl.zeros([token_T.shape[0], EXPERTS // 4], tl.uint32)
    call = zero + tl.arange(0, EXPERTS // 4).to(tl.uint32)[None, :]
    a, b, c, d = tl.philox(seed, zero + token_T.to(tl.uint32)[:, None], zero, call, zero, 7)
    a, b = _normal_pair(a, b)
    c, d = _normal_pair(c, d)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [token_T.shape[0], EXPERTS])


@triton.jit
def softplus_and_slope(x):
    """log(1 + exp(x)) and its derivative, the logistic function, for x in fp32."""
    small = exp2(-1.4426950408889634 * tl.abs(x))
    # Where it is small beside 1, their sum has lost its last digits: two terms of the series.
    near = small - 0.5 * small * small
    log1p = tl.where(small < 2e-3, near, 0.6931471805599453 * log2(1 + small))
    part = reciprocal(1 + small)
    return tl.where(x < 0, 0.0, x) + log1p, tl.where(x < 0, small * part, part)
