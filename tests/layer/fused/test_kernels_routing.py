"""The routing kernels: the sort by expert, scores that tie, and the draws of noise and dropout."""

import math

import pytest
import torch
from harness.kernels import HERE, kernel_dropout, kernel_noise

from dmoe_layer.fused import router

pytestmark = pytest.mark.usefixtures("poisoned")


def test_pairs_are_sorted_by_expert_and_then_by_token():
    x = torch.randn(3, 200, 8, device=HERE)
    w, b = torch.randn(2, 2, 5, 8, device=HERE), torch.zeros(2, 2, 5, device=HERE)
    rows = torch.tensor([[0], [1], [0]], device=HERE)
    counts = torch.tensor([140, 0, 460], device=HERE)
    for tokens, per_sample in ((x, None), (x.flatten(0, 1), counts)):
        logits, indices, gates, order, offsets, _ = router._fused_route(
            tokens, w, b, rows, per_sample, 3, None
        )
        assert torch.equal(order.long(), indices.flatten().argsort(stable=True))
        assert offsets.diff().tolist() == indices.flatten().bincount(minlength=5).tolist()
        top = logits.topk(3)
        assert torch.equal(indices, top.indices)
        torch.testing.assert_close(gates, top.values.softmax(dim=-1))


def test_scores_that_are_equal_infinite_or_nan_choose_k_different_experts():
    w = torch.zeros(1, 2, 6, 8, device=HERE)
    for bias in ([0.0] * 6, [-math.inf] * 6, [math.nan] * 6, [1, math.inf, -math.inf, 0, 1, 1],
                 [-1, -2, math.nan, -3, -4, -5], [-1, -2, -math.nan, -3, -4, -5]):  # fmt: skip
        b = torch.zeros(1, 2, 6, device=HERE)
        b[0, 0] = torch.tensor(bias)
        x = torch.zeros(1, 3, 8, device=HERE)
        logits, indices, gates, *_ = router._fused_route(x, w, b, None, None, 4, None)
        torch.testing.assert_close(logits[0], b[0, 0], equal_nan=True)
        assert all(len(set(row)) == 4 and max(row) < 6 for row in indices.tolist())
        top = logits.topk(4).values
        torch.testing.assert_close(logits.gather(1, indices), top, equal_nan=True)
        torch.testing.assert_close(gates, top.softmax(dim=-1), equal_nan=True)


def test_the_kernels_noise_is_normal():
    noise = kernel_noise(True, 2**15, 8, torch.float32).double()
    assert noise.mean().abs() < 0.01
    assert abs(noise.std() - 1) < 0.01
    for quantile in (0.001, 0.05, 0.3, 0.7, 0.95, 0.999):
        z = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1.0)).item()
        assert abs((noise < z).double().mean() - quantile) < 4 * math.sqrt(quantile / 2**18)
    # Neither neighbours nor tokens nor experts go together.
    assert torch.corrcoef(noise.T).sub(torch.eye(8)).abs().max() < 0.03
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_it_should_and_columns_are_independent(p):
    kept = kernel_dropout(p, torch.zeros(2**12, 2), 8, 24, torch.float64).view(-1, 24) > 0
    share = kept.double().mean()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    assert torch.corrcoef(kept.double().T).sub(torch.eye(24)).abs().max() < 0.06
