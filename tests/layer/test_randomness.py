"""Noise and dropout: how they are distributed, when they are drawn, and that the seed decides."""

import pytest
import torch

from dmoe_layer import DMoE


def test_noise_is_normal_and_scaled_by_the_softplus_of_its_own_scores():
    layer = DMoE(4, n_experts=2, k=1)
    x = torch.randn(1, 1, 4).expand(1, 200_000, 4)
    _, routing = layer(x, return_routing=True)
    clean, noise = (
        (layer.router.w_A2ED[0, i] @ x[0, 0] + layer.router.bias[0, i]).detach() for i in (0, 1)
    )
    z = (routing.logits.detach() - clean) / torch.nn.functional.softplus(noise)
    assert z.mean().abs() < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z.abs() < 1).float().mean() - 0.6827) < 0.01


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_the_share_p_of_the_entries_and_keeps_the_mean(p):
    layer = DMoE(32, n_experts=2, k=1, dropout=p, noise="never")
    x = torch.randn(1, 1, 32).expand(1, 20_000, 32)
    y, kept = layer(x)[0], layer.eval()(x)[0, 0]
    dropped = (y == 0).float().mean()
    assert abs(dropped - p) < 0.005
    torch.testing.assert_close(
        y.max(dim=0).values.abs() + y.min(dim=0).values.abs(),
        kept.abs() / (1 - p),
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("noise", "in_train", "in_eval"),
    [("train", True, False), ("always", True, True), ("never", False, False)],
)
def test_noise_is_drawn_when_its_mode_says_so(noise, in_train, in_eval):
    layer, x = DMoE(8, noise=noise, dropout=0.0), torch.randn(1, 20, 8)
    assert (not torch.equal(layer(x), layer(x))) == in_train
    layer.eval()
    assert (not torch.equal(layer(x), layer(x))) == in_eval


def test_the_seed_decides_noise_and_dropout():
    layer, x = DMoE(8), torch.randn(1, 20, 8)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_deterministic_algorithms_are_honoured():
    layer, x = DMoE(8, attribute_sizes=2), torch.randn(2, 30, 8, requires_grad=True)
    # Refuses operators that are not deterministic, and fills torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            torch.manual_seed(0)
            mask = torch.ones(2, 30, dtype=torch.bool)
            y = layer(x, torch.tensor([0, 1]), mask=mask)
            grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.isfinite(g).all() for g in grads[0])
