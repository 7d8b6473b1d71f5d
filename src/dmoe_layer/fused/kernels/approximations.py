"""Functions of fp32 numbers by the processor's own approximations, one instruction each.

In place of a few dozen. By NVIDIA's PTX manual sine and cosine are off by 7e-7 at most between -π
and π, and the others by 3e-7 of their value, where the logarithm of a number near 1 counts as 1.
Triton's interpreter, which has no such instructions, computes them exactly.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _approximation(INSTRUCTION: tl.constexpr, x):
    """A function of fp32 numbers that is one instruction; tiny numbers count as 0."""
    ASM: tl.constexpr = INSTRUCTION + ".approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def exp2(x):
    return tl.exp2(x) if INTERPRETED else _approximation("ex2", x)


@triton.jit
def log2(x):
    return tl.log2(x) if INTERPRETED else _approximation("lg2", x)


@triton.jit
def root(x):
    return tl.sqrt(x) if INTERPRETED else _approximation("sqrt", x)


@triton.jit
def sine(x):
    return tl.sin(x) if INTERPRETED else _approximation("sin", x)


@triton.jit
def cosine(x):
    return tl.cos(x) if INTERPRETED else _approximation("cos", x)


@triton.jit
def reciprocal(x):
    return 1 / x if INTERPRETED else _approximation("rcp", x)
