"""PyTorch's FLOP counter sees the kernels too, and counts them as it counts plain PyTorch."""

import subprocess
import sys

import pytest
import torch
from harness.kernels import HERE, pair
from torch.utils.flop_counter import FlopCounterMode

SAMPLES, TOKENS, DIM, HIDDEN, EXPERTS, K = 2, 16, 8, 12, 3, 2
ROUTER = 2 * SAMPLES * TOKENS * DIM * EXPERTS * 2  # the clean one's and the noise one's
PRODUCT = 2 * SAMPLES * TOKENS * K * DIM * HIDDEN
SIZES = {"dim": DIM, "hidden_dim": HIDDEN, "n_experts": EXPERTS}


def make_x(dim=DIM):
    return torch.randn(SAMPLES, TOKENS, dim, device=HERE, requires_grad=True)


def counted(layer, x, mask=None):
    with FlopCounterMode(display=False) as counter:
        layer(x, torch.tensor([0, 2], device=HERE), mask=mask).sum().backward()
    return counter.get_total_flops()


def test_a_step_of_narrow_kernels_counts_as_that_of_plain_pytorch():
    ours, eager = pair(**SIZES)
    x, mask = make_x(), torch.rand(SAMPLES, TOKENS, device=HERE) < 0.7
    assert counted(ours, x) == counted(eager, x) == 3 * ROUTER + 6 * PRODUCT
    assert counted(ours, x, mask) == counted(eager, x, mask) > 0


def test_a_step_of_wide_kernels_without_noise_counts_as_that_of_plain_pytorch():
    ours, eager = pair(dim=129, hidden_dim=3, n_experts=2, noise="never")
    x = make_x(129)
    assert counted(ours, x) == counted(eager, x) > 0


def test_a_step_of_gated_kernels_counts_half_as_much_again():
    layer, _ = pair(**SIZES, activation="swiglu")
    assert counted(layer, make_x()) == 3 * ROUTER + 9 * PRODUCT


@pytest.mark.parametrize(
    ("frozen", "count"),
    [(("x", "router"), ROUTER + 5 * PRODUCT), (("w1_", "w2_"), 3 * ROUTER + 4 * PRODUCT)],
)
def test_gradients_that_no_kernel_computes_are_not_counted(frozen, count):
    layer, _ = pair(**SIZES)
    x = make_x()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        tensor.requires_grad_(not name.startswith(frozen))
    assert counted(layer, x) == count


def test_a_first_call_of_the_kernels_inside_the_counter_is_counted():
    code = """
import sys, torch
from dmoe_layer import DMoE
from torch.utils.flop_counter import FlopCounterMode
layer = DMoE(8, hidden_dim=12, n_experts=3, backend="triton").to(sys.argv[1]).eval()
with FlopCounterMode(display=False) as counter:
    layer(torch.randn(2, 16, 8, device=sys.argv[1]))
print(counter.get_total_flops())
"""
    run = [sys.executable, "-c", code, HERE]
    done = subprocess.run(run, check=True, capture_output=True, encoding="utf-8")
    assert int(done.stdout) == ROUTER // 2 + 2 * PRODUCT
