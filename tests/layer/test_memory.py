"""What is kept for backward is about x, and the peak of a volume is far below a plain loop's."""

import copy
from itertools import accumulate

import pytest
import torch
from harness.layers import A3
from harness.saved import bytes_of, saved_for_backward
from torch.profiler import ProfilerActivity

from dmoe_layer import DMoE


@pytest.mark.parametrize("attribute_sizes", [None, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("shape", "channel_dim", "masked"),
    [((2, 2048, 64), -1, False), ((2, 2048, 64), -1, True), ((4096, 64), -1, False),
     ((2, 64, 32, 64), 1, False)],
    ids=["tokens", "masked", "one token a sample", "channels first"],
)  # fmt: skip
def test_what_is_saved_for_backward_is_about_x(
    shape, channel_dim, masked, autocast, attribute_sizes
):
    layer = DMoE(64, attribute_sizes=attribute_sizes, channel_dim=channel_dim)
    x = torch.randn(shape, requires_grad=True)
    mask = torch.ones(shape[:-1], dtype=torch.bool) if masked else None
    with (
        saved_for_backward(*layer.parameters(), n_experts=layer.n_experts) as saved,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        y = layer(x, None if attribute_sizes is None else 0, mask=mask)
    # x itself; then 12 bytes for each of 2 slots a token: an index and a gate, beside 4·64 of x.
    assert bytes_of(saved) <= 1.2 * x.nbytes
    y.sum().backward()


def test_a_layer_called_many_times_under_autocast_keeps_no_copies_of_its_weights():
    layer, x = DMoE(48, attribute_sizes=3), torch.randn(3, 2, 48)
    with (
        saved_for_backward(*layer.parameters()) as saved,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        for _ in range(12):
            x = layer(x, A3)
    assert bytes_of(saved) < 0.1 * layer.w1_EHD.nbytes
    x.sum().backward()
    assert layer.w1_EHD.grad.dtype == torch.float32


class BooleanMaskLoop(torch.nn.Module):
    """Noisy top-2 routing with one router, and its experts one by one over the tokens of a mask."""

    def __init__(self, d, n_experts=8):
        super().__init__()
        Linear, ModuleList = torch.nn.Linear, torch.nn.ModuleList
        self.router = ModuleList(Linear(d, n_experts) for _ in range(2))
        parts = Linear(d, 4 * d), torch.nn.ReLU(), Linear(4 * d, d), torch.nn.Dropout(0.1)
        expert = torch.nn.Sequential(*parts)
        self.experts = ModuleList(copy.deepcopy(expert) for _ in range(n_experts))

    def forward(self, x):
        x_TD = x.flatten(0, 1)
        clean, noise = (linear(x_TD) for linear in self.router)
        logits = clean + torch.randn_like(clean) * torch.nn.functional.softplus(noise)
        scores, indices = logits.topk(2)
        gates = torch.full_like(logits, -torch.inf).scatter(-1, indices, scores).softmax(-1)
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            mask = (indices == e).any(-1)
            y_TD[mask] += expert(x_TD[mask]) * gates[mask, e, None]
        return y_TD.view_as(x)


def peak_memory(layer, x):
    """The most bytes that a forward and backward held at a time, beside x and the parameters."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_the_peak_memory_of_a_volume_is_a_quarter_of_a_boolean_mask_loops():
    x = torch.randn(2, 131072, 24, requires_grad=True)
    loop, layer = (peak_memory(kind(24), x) for kind in (BooleanMaskLoop, DMoE))
    assert layer <= 0.25 * loop
