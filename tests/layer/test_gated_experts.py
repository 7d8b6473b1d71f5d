"""Gated experts and quick_gelu in plain PyTorch: formulas, parameters, gradients, memory, NaNs."""

import math

import naive
import pytest
import torch
from harness.layers import eval_layer
from harness.saved import bytes_of, gradients_and_largest_saved, saved_for_backward

from dmoe_layer import DMoE
from dmoe_layer.activations import ACTIVATIONS
from dmoe_layer.eager import experts

GATED = sorted(name for name, activation in ACTIVATIONS.items() if activation.gated)


def test_three_activations_are_gated():
    assert GATED == ["geglu", "geglu_tanh", "swiglu"]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_an_activations_backward_is_the_gradient_of_its_forward(name):
    activation = ACTIVATIONS[name]
    z = (3 * torch.randn(7, 10, dtype=torch.float64)).requires_grad_()
    h = activation.forward(z)
    assert h.shape == (7, 5 if activation.gated else 10)
    true = torch.stack([naive.ACTIVATIONS[name](row) for row in z])
    torch.testing.assert_close(h, true, rtol=1e-12, atol=1e-12)
    dh, before = torch.randn_like(h), z.detach().clone()
    (true_dz,) = torch.autograd.grad(true, z, dh)
    with torch.no_grad():
        dz = activation.backward(dh.clone(), z)
    torch.testing.assert_close(dz, true_dz, rtol=1e-12, atol=1e-12)
    assert torch.equal(z, before)


def test_quick_gelu_of_large_fp16_numbers_is_finite():
    z = torch.tensor([-6e4, -4e4, 0, 4e4, 6e4], dtype=torch.float16)
    activation = ACTIVATIONS["quick_gelu"]
    torch.testing.assert_close(activation.forward(z), z.clamp(min=0))
    slope = torch.tensor([0, 0, 0.5, 1, 1], dtype=torch.float16)
    torch.testing.assert_close(activation.backward(torch.ones_like(z), z), slope)


def test_the_first_half_of_w1_is_the_gate():
    layer = DMoE(1, n_experts=1, k=1, hidden_dim=1, activation="swiglu", dropout=0.0).eval()
    with torch.no_grad():
        layer.w1_EHD.copy_(torch.tensor([[[2.0], [3.0]]]))  # the gate, then the linear half
        layer.w2_EDH.fill_(5.0)
        for name, parameter in layer.named_parameters():
            if parameter.ndim == 2 and "router" not in name:
                parameter.zero_()
    # silu(2) · 3 · 5, where silu(2) = 2 / (1 + e⁻²)
    y = layer(torch.ones(1, 1, 1))
    torch.testing.assert_close(y.item(), 2 / (1 + math.exp(-2)) * 15, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GATED)
def test_w1_and_its_bias_have_both_halves_and_are_drawn_as_linear_layers_are(name):
    layer = DMoE(9, n_experts=3, hidden_dim=400, activation=name)
    shapes = sorted(tuple(p.shape) for n, p in layer.named_parameters() if "router" not in n)
    assert shapes == sorted([(3, 800, 9), (3, 800), (3, 9, 400), (3, 9)])
    for half in layer.w1_EHD.chunk(2, dim=1):
        assert 0.99 / 3 < half.abs().max() <= 1 / 3
    assert 0.99 / 20 < layer.w2_EDH.abs().max() <= 1 / 20
    assert DMoE(9, activation=name).w1_EHD.shape == (8, 2 * 4 * 9, 9)
    lazy = DMoE(n_experts=3, hidden_dim=400, activation=name)
    lazy.load_state_dict(layer.state_dict())
    assert lazy.w1_EHD.shape == (3, 800, 9)
    bare = DMoE(9, n_experts=3, hidden_dim=400, activation=name, bias=False)
    shapes = [tuple(p.shape) for n, p in bare.named_parameters() if "router" not in n]
    assert sorted(shapes) == [(3, 9, 400), (3, 800, 9)]


@pytest.mark.parametrize(("tokens", "keeps"), [(384, True), (392, False)])
def test_both_halves_are_kept_while_no_larger_than_weights_and_gradients(tokens, keeps):
    # 2 · tokens · 2H numbers, beside 2 · 2 · 3HD of both layers' weights and gradients.
    layer = DMoE(128, n_experts=2, k=2, hidden_dim=8, noise="never", activation="swiglu")
    _, kept = gradients_and_largest_saved(layer, torch.randn(1, tokens, 128, requires_grad=True))
    assert (kept == 2 * tokens * 16) == keeps


@pytest.mark.parametrize("name", GATED)
def test_what_is_saved_for_backward_of_gated_experts_is_about_x(name):
    layer, x = DMoE(64, activation=name), torch.randn(2, 1024, 64, requires_grad=True)
    with saved_for_backward(*layer.parameters(), n_experts=8) as saved:
        y = layer(x)
    assert bytes_of(saved) <= 1.2 * x.nbytes
    y.sum().backward()


@pytest.mark.parametrize("name", [*GATED, "quick_gelu"])
def test_in_eval_a_sample_depends_on_no_batch_mate_nor_on_its_nans(name):
    layer, x, a = eval_layer(activation=name), torch.randn(3, 11, 16), torch.tensor([0, 1, 2])
    together = layer(x, a)
    alone = torch.cat([layer(x[i : i + 1], a[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    if torch.backends.mkl.is_available():
        assert torch.equal(alone, together)
    x[1, 2, 3] = math.nan
    x.requires_grad_()
    y = layer(x, a)
    assert torch.isnan(y[1, 2]).all()
    assert torch.equal(y[[0, 2]], together[[0, 2]])
    y[[0, 2]].sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()


@pytest.mark.parametrize("keep", [False, True])
def test_the_operators_of_gated_experts_pass_opcheck(keep):
    shapes = ((9, 6), (9, 2), (3, 10, 6), (3, 10), (3, 6, 5), (3, 6))
    x, gates, *weights = (torch.randn(shape, requires_grad=True) for shape in shapes)
    indices, options = torch.randint(3, (9, 2)), ("swiglu", 0.1, torch.tensor(5), torch.float32)
    inputs = (x, indices, gates, *weights)
    torch.library.opcheck(experts.experts_forward, (*inputs, *options, keep))
    y, z = (t.detach() for t in experts.experts_forward(*inputs, *options, keep))
    assert z.shape == (18 if keep else 0, 10)
    inputs = tuple(t.detach() for t in inputs)
    torch.library.opcheck(experts.experts_backward, (y, z, *inputs, *options, keep, [True] * 6))


@pytest.mark.parametrize("name", ["swiglu", "quick_gelu"])
def test_a_compiled_layer_gives_the_same(name):
    layer = DMoE(16, activation=name, noise="never", dropout=0.0)
    x, results = torch.randn(2, 9, 16, requires_grad=True), []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
