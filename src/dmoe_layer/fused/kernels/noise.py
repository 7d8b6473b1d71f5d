"""The router's noise: standard normal numbers from a counter, and the scale that softplus gives it.

On a GPU by the processor's own approximations, a few instructions each in place of a few dozen:
logarithm, sine and cosine are off by less than 1e-6, which no draw's distribution shows. Triton's
interpreter, which has no instructions, computes them exactly.
"""

import triton
import triton.language as tl

from .common import INTERPRETED


@triton.jit
def _approximation(INSTRUCTION: tl.constexpr, x):
    """A function of fp32 numbers that is one instruction; tiny numbers count as 0."""
    ASM: tl.constexpr = INSTRUCTION + ".approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _exp2(x):
    return tl.exp2(x) if INTERPRETED else _approximation("ex2", x)


@triton.jit
def _log2(x):
    return tl.log2(x) if INTERPRETED else _approximation("lg2", x)


@triton.jit
def _root(x):
    return tl.sqrt(x) if INTERPRETED else _approximation("sqrt", x)


@triton.jit
def _sine(x):
    return tl.sin(x) if INTERPRETED else _approximation("sin", x)


@triton.jit
def _cosine(x):
    return tl.cos(x) if INTERPRETED else _approximation("cos", x)


@triton.jit
def _reciprocal(x):
    return 1 / x if INTERPRETED else _approximation("rcp", x)


@triton.jit
def _normal_pair(radius, angle):
    """Two standard normal numbers from two words of random bits (Box and Muller)."""
    # Half a step off zero, of which there is no logarithm.
    uniform = (radius.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # Next to 1 the approximation may be above 0, of whose negative there is no root.
    r = _root(tl.maximum(-1.3862943611198906 * _log2(uniform), 0.0))
    # From -π to π, where the approximations are best.
    turn = angle.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    return r * _cosine(turn), r * _sine(turn)


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
    small = _exp2(-1.4426950408889634 * tl.abs(x))
    # Where it is small beside 1, their sum has lost its last digits: two terms of the series.
    near = small - 0.5 * small * small
    log1p = tl.where(small < 2e-3, near, 0.6931471805599453 * _log2(1 + small))
    part = _reciprocal(1 + small)
    return tl.where(x < 0, 0.0, x) + log1p, tl.where(x < 0, small * part, part)
