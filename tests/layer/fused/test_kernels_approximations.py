"""The kernels' noise is normal, and their activations are exact: by functions as NumPy has them,
and by a GPU's approximations of them.
"""

import math

import pytest
import torch
from harness.kernels import HERE, kernel_noise
from torch.nn.functional import softplus

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dmoe_layer.activations import ACTIVATIONS  # noqa: E402
from dmoe_layer.fused.kernels import activations  # noqa: E402
from dmoe_layer.fused.kernels import noise as kernels  # noqa: E402
from dmoe_layer.fused.launch import launch  # noqa: E402

DRAWS = (2**15, 8)
N = math.prod(DRAWS)


# The largest errors that NVIDIA's PTX manual allows the approximations, with signs that change
# from number to number: relative ones of ex2 (2**-22), sqrt and rcp (2**-23), absolute ones of
# sin and cos, and of lg2 both (2**-22).
@triton.jit
def _sign(x):
    return tl.where(tl.sin(1e6 * tl.where(tl.abs(x) < 1e9, x, 0.0)) < 0, 1.0, -1.0)


@triton.jit
def _exp2_with_errors(x):
    return tl.exp2(x) * (1 + 2.4e-7 * _sign(x))


@triton.jit
def _root_with_errors(x):
    return tl.sqrt(x) * (1 + 1.2e-7 * _sign(x))


@triton.jit
def _reciprocal_with_errors(x):
    return 1 / x * (1 - 1.2e-7 * _sign(x))


@triton.jit
def _log2_with_errors(x):
    log = tl.log2(x)
    return log + 2.4e-7 * tl.maximum(tl.abs(log), 1.0) * _sign(x)  # at 1 beyond 0


@triton.jit
def _sine_with_errors(x):
    return tl.sin(x) - 6.8e-7 * _sign(x)


@triton.jit
def _cosine_with_errors(x):
    return tl.cos(x) - 6.8e-7 * _sign(x)


@pytest.fixture(params=["as it is", "with the errors of a GPU's approximations"])
def approximations(request, monkeypatch):
    if request.param == "as it is":
        return
    if HERE == "cuda":
        pytest.skip("a GPU has its own")
    for name in ("exp2", "log2", "root", "sine", "cosine", "reciprocal"):
        monkeypatch.setattr(kernels, name, globals()[f"_{name}_with_errors"])
    for name in ("exp2", "reciprocal"):
        monkeypatch.setattr(activations, name, globals()[f"_{name}_with_errors"])


@pytest.mark.usefixtures("approximations")
def test_the_kernels_noise_is_normal():
    noise = kernel_noise(True, *DRAWS, torch.float32).double()
    # Moments, within four standard errors of those of N draws.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs((noise**power).mean() - moment) < 4 * math.sqrt(variance / N)
    # Tails, on either side.
    for limit in (3.0, 3.5, 4.0):
        expected = N * torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64)).item()
        for tail in (noise > limit, noise < -limit):
            assert abs(tail.sum() - expected) < 4 * math.sqrt(expected) + 1
    assert 4.4 < noise.abs().max() < 6.7  # the most that 32 bits allow is 6.66
    # Kolmogorov and Smirnov: a normal sample goes beyond this once in a thousand.
    below = torch.special.ndtr(noise.flatten().sort().values)
    ranks = torch.arange(N + 1, dtype=torch.float64) / N
    distance = torch.maximum(ranks[1:] - below, below - ranks[:-1]).max()
    assert distance < 1.95 / math.sqrt(N)
    # Neither neighbours nor tokens nor experts go together, in value or in size.
    for drawn in (noise, noise.abs() - noise.abs().mean()):
        assert torch.corrcoef(drawn.T).sub(torch.eye(8)).abs().max() < 5 / math.sqrt(DRAWS[0])
        assert (drawn[1:] * drawn[:-1]).mean().abs() < 5 / math.sqrt(N)


@triton.jit
def _pairs_kernel(radius_ptr, angle_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    radius = tl.load(radius_ptr + i).to(tl.uint32, bitcast=True)
    angle = tl.load(angle_ptr + i).to(tl.uint32, bitcast=True)
    a, b = kernels._normal_pair(radius, angle)
    tl.store(out_ptr + 2 * i, a)
    tl.store(out_ptr + 2 * i + 1, b)


@pytest.mark.usefixtures("approximations")
def test_the_extreme_words_of_random_bits_make_finite_numbers_of_the_right_size():
    extremes = torch.tensor(
        [0, 1, -1, -2, 2**31 - 1, -(2**31), 1 - 2**31, 2**30], dtype=torch.int32
    )
    radius, angle = (t.flatten() for t in torch.meshgrid(extremes, extremes, indexing="ij"))
    out = torch.empty(64, 2, device=HERE)
    launch(_pairs_kernel, (1,), out, radius.to(HERE), angle.to(HERE), out, COUNT=64)
    uniform = ((radius.long() % 2**32).double() + 0.5) / 2**32
    expected = torch.sqrt(-2 * uniform.log())
    size = out.cpu().double().norm(dim=1)
    # Where the radius is nearly 0, the root turns an error of 2e-7 into one of 1e-3.
    assert torch.allclose(size, expected, rtol=1e-5, atol=1e-3)
    assert torch.isfinite(out).all()


@triton.jit
def _softplus_kernel(x_ptr, value_ptr, slope_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    value, slope = kernels.softplus_and_slope(tl.load(x_ptr + i))
    tl.store(value_ptr + i, value)
    tl.store(slope_ptr + i, slope)


@pytest.mark.usefixtures("approximations")
def test_softplus_and_its_slope_are_exact_from_the_smallest_to_the_largest():
    x = torch.cat([torch.linspace(-80, 80, 500), torch.tensor([-math.inf, math.inf, 0.0, -0.0])])
    x = torch.cat([x, torch.linspace(-8, -4, 512 - len(x))]).to(HERE)
    value, slope = torch.empty_like(x), torch.empty_like(x)
    launch(_softplus_kernel, (1,), x, x, value, slope, COUNT=512)
    true = x.cpu().double()
    torch.testing.assert_close(value.cpu().double(), softplus(true), rtol=1e-4, atol=0)
    torch.testing.assert_close(value.cpu().double(), softplus(true), rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(slope.cpu().double(), true.sigmoid(), rtol=1e-5, atol=0)


@triton.jit
def _activation_kernel(z_ptr, h_ptr, dz_ptr, ACTIVATION: tl.constexpr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    z = tl.load(z_ptr + i)
    tl.store(h_ptr + i, activations.activate(z, ACTIVATION))
    tl.store(dz_ptr + i, activations.slope(z, tl.full([COUNT], -3.0, tl.float32), ACTIVATION))


@pytest.mark.usefixtures("approximations")
@pytest.mark.parametrize("name", [name for name, a in ACTIVATIONS.items() if not a.gated])
def test_activations_and_their_slopes_are_exact_from_the_smallest_to_the_largest(name):
    special = torch.tensor([math.nan, math.inf, 0.0, -0.0, 1e30, -1e30, 1e-30, -200.0])
    z = torch.cat([torch.linspace(-12, 12, 8184), special]).to(HERE)
    h, dz = torch.empty_like(z), torch.empty_like(z)
    launch(_activation_kernel, (16,), z, z, h, dz, name, COUNT=512)
    true = z.cpu().double().requires_grad_()
    expected = ACTIVATIONS[name].forward(true)
    (slope,) = torch.autograd.grad(-3 * expected.sum(), true)
    close = {"rtol": 3e-7, "atol": 5e-7, "equal_nan": True}
    torch.testing.assert_close(h.cpu().double(), expected.detach(), **close)
    known = z.cpu().abs() <= 200  # beyond, the true formula has infinity times zero
    torch.testing.assert_close(dz.cpu().double()[known], slope[known], rtol=1e-6, atol=2e-6)
