"""The activations of experts and their derivatives, in fp32."""

import triton
import triton.language as tl

from .approximations import exp2, reciprocal


@triton.jit
def sigmoid(exponent):
    """The logistic function s of u, and 1 - s, which a difference from 1 would rob of its digits.

    ``exponent`` is -u / log(2): the caller multiplies its own factors by that one beforehand.
    1 - s is right where s is no smaller than 1e-30. It is only ever multiplied by s.
    """
    power = exp2(exponent)
    s = reciprocal(1 + power)
    return s, tl.minimum(power, 1e30) * s  # where the power is infinite, s is 0


@triton.jit
def tanh_exponent(z):
    """Of GELU by tanh: (1 + tanh(u / 2)) / 2 is the logistic function of u."""
    return z * (-2.302208198144325 - 0.1029432395800235 * z * z)


@triton.jit
def normal_tail(size):
    """The normal distribution's Φ(-size), and exp(-size²/2), where size is 0 or more.

    The latter times a polynomial of t = 1 / (1 + 0.276 size): Abramowitz and Stegun's 7.1.26 with a
    sixth term, fitted to an error below 5e-9. In fp32 the error of Φ is at most 2.2e-7, and 7e-7
    with a GPU's exponential and reciprocal, where the error function's is 6e-8. That of GELU is
    2.5e-7, where the error function leaves 4.5e-7. It takes a third of the instructions.
    """
    power = exp2(-0.7213475204444817 * size * size)
    t = reciprocal(1 + 0.2759837796 * size)
    sum_5 = 0.4409901401 - 0.1134738326 * t
    sum_3 = 0.3223350534 + t * (t * sum_5 - 0.3141281368)
    return power * t * (0.1176269453 + t * (0.0466498269 + t * sum_3)), power


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of z in fp32; of a gated one that of its gate."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        # z · Φ(z) is z or 0, less what the tail takes. To choose Φ(z) between the tail and 1 less
        # the tail, as the slope does, takes registers that a wide tile lacks.
        tail, _ = normal_tail(tl.abs(z))
        return tl.maximum(z, 0.0) - tl.minimum(tl.abs(z), 1e30) * tail  # not infinity times 0
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":
        return z * sigmoid(tanh_exponent(z))[0]
    elif ACTIVATION == "quick_gelu":
        return z * sigmoid(-2.4554669595930155 * z)[0]
    else:
        known: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "swiglu"
        tl.static_assert(known, "the kernels have no such activation")
        return z * sigmoid(-1.4426950408889634 * z)[0]


@triton.jit
def slope(z, da, ACTIVATION: tl.constexpr):
    """da times the activation's derivative at z, in fp32; of a gated one that of its gate."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, da, 0.0)
    elif ACTIVATION == "gelu" or ACTIVATION == "geglu":
        tail, power = normal_tail(tl.abs(z))
        cdf = tl.where(z < 0, tail, 1 - tail)
        return da * (cdf + 0.3989422804014327 * z * power)
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "geglu_tanh":
        s, rest = sigmoid(tanh_exponent(z))
        return da * (s + z * s * rest * (1.5957691216057308 + 0.21406444881780074 * z * z))
    elif ACTIVATION == "quick_gelu":
        s, rest = sigmoid(-2.4554669595930155 * z)
        return da * (s + z * s * rest * 1.702)
    else:
        known: tl.constexpr = ACTIVATION == "silu" or ACTIVATION == "swiglu"
        tl.static_assert(known, "the kernels have no such activation")
        s, rest = sigmoid(-1.4426950408889634 * z)
        return da * (s + z * s * rest)
