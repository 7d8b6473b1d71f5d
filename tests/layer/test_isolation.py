"""What a token's output does not depend on: batch-mates, their order, masked tokens and NaNs."""

import math

import pytest
import torch
from harness.layers import eval_layer

from dmoe_layer import DMoE


def test_in_eval_a_sample_does_not_depend_on_its_batch_mates():
    layer, x, a = eval_layer(), torch.randn(6, 11, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    together = layer(x, a)
    alone = torch.cat([layer(x[i : i + 1], a[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    if torch.backends.mkl.is_available():  # whose GEMMs keep a row's bits: see eager/gemm.py
        assert torch.equal(alone, together)


def test_a_sample_of_few_tokens_keeps_its_bits_beside_longer_ones():
    plain, layer = DMoE(16).eval(), eval_layer()
    x, a = torch.randn(5, 40, 16), torch.tensor([0, 1, 2, 0, 1])
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[0, 3:] = False
    pairs = (
        (plain(x[:1, :1]), plain(x[:, :1])[:1]),
        (layer(x[:1], a[:1], mask=mask[:1]), layer(x, a, mask=mask)[:1]),
    )
    for alone, together in pairs:
        torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
        if torch.backends.mkl.is_available():
            assert torch.equal(alone, together)


def test_permuting_tokens_permutes_the_output():
    layer, x, order = eval_layer(), torch.randn(2, 50, 16), torch.randperm(50)
    torch.testing.assert_close(layer(x[:, order], 1), layer(x, 1)[:, order], rtol=1e-6, atol=1e-6)


def test_a_mask_that_keeps_nothing_gives_zero_and_zero_gradients():
    layer, x = eval_layer().train(), torch.randn(2, 4, 16, requires_grad=True)
    y = layer(x, 0, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()


def test_the_mask_gives_the_same_as_computing_the_tokens_inside_it_alone():
    layer, x = eval_layer(), torch.randn(3, 9, 16)
    mask, a = torch.rand(3, 9) < 0.4, torch.tensor([2, 0, 1])
    y = layer(x, a, mask=mask)
    for b in range(3):
        alone = layer(x[b : b + 1, mask[b]], a[b])
        torch.testing.assert_close(y[b, mask[b]], alone[0], rtol=1e-6, atol=1e-6)
    assert not y[~mask].any()
    residual = eval_layer(residual=True)
    assert torch.equal(residual(x, a, mask=mask)[~mask], x[~mask])


@pytest.mark.parametrize("residual", [False, True])
def test_nan_outside_the_mask_reaches_nothing(residual):
    layer = DMoE(8, attribute_sizes=2, residual=residual)
    x, mask = torch.randn(2, 6, 8), torch.rand(2, 6) < 0.5
    results = []
    for fill in (0.0, math.nan, math.inf):
        layer.zero_grad()
        torch.manual_seed(0)
        spoiled = x.masked_fill(~mask[..., None], fill).requires_grad_()
        y, routing = layer(spoiled, torch.tensor([0, 1]), mask=mask, return_routing=True)
        (y[mask].square().sum() + routing.logits.square().sum()).backward()
        results.append(
            [y[mask], routing.logits, spoiled.grad, *(p.grad for p in layer.parameters())]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_nan_in_one_sample_stays_in_that_sample():
    layer, x, a = eval_layer(), torch.randn(3, 5, 16), torch.tensor([0, 1, 2])
    clean = layer(x, a)
    x[1, 2, 3] = math.nan
    x.requires_grad_()
    y = layer(x, a)
    assert torch.isnan(y[1, 2]).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    y[[0, 2]].sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()
    assert torch.isfinite(layer.router.w_A2ED.grad[[0, 2]]).all()
