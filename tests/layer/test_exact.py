"""Output and every gradient equal the naive loop, for random configurations and every dtype."""

from functools import partial

import naive
import pytest
import torch
from harness.exactness import assert_close, blocks_of, configurations, run_both
from harness.layers import eval_layer
from hypothesis import given, settings
from torch.autograd import forward_ad

from dmoe_layer import DMoE
from dmoe_layer.activations import ACTIVATIONS


def test_the_naive_loop_knows_every_activation():
    assert naive.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@settings(max_examples=150)
@given(configurations())
def test_double_precision_equals_the_naive_loop(configuration):
    options, call = configuration
    with blocks_of(call["block_rows"]):
        pairs = run_both(options, call, torch.float64)
    for what, (found, true) in pairs.items():
        assert_close(found, true, torch.float64, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", sorted(naive.ACTIVATIONS))
@pytest.mark.parametrize("masked", [False, True])
def test_lower_precision_equals_the_naive_loop(dtype, activation, masked):
    options = {
        "dim": 24,
        "hidden_dim": 40,
        "n_experts": 8,
        "k": 2,
        "attribute_sizes": 3,
        "unknown": "error",
        "activation": activation,
        "bias": True,
        "noise": "train",
        "dropout": 0.1,
        "residual": False,
    }
    call = {
        "batch": 3,
        "tokens": 21,
        "values": [[0], [2], [2]],
        "training": True,
        "masked": masked,
        "seed": 5,
    }
    for what, (found, true) in run_both(options, call, dtype).items():
        assert_close(found, true, dtype, what)


# Of gated experts along random directions alone, which takes a tenth of the time.
@pytest.mark.parametrize(
    ("activation", "fast"),
    [("silu", False), ("swiglu", True), ("geglu", True), ("geglu_tanh", True)],
)
def test_the_whole_layer_passes_gradcheck(activation, fast):
    options = {"n_experts": 3, "k": 2, "attribute_sizes": (2, 2), "hidden_dim": 5}
    layer = DMoE(4, **options, activation=activation).double()
    attributes = torch.tensor([[0, 1], [1, 1]])
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *parameters):
        torch.manual_seed(0)  # the same noise and dropout in every evaluation
        params = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, params, (x, attributes))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=fast)


@pytest.mark.parametrize("needs", ["x", "experts", "router"])
def test_only_what_is_not_frozen_gets_a_gradient_and_it_is_the_same(needs):
    layer = DMoE(6, attribute_sizes=2, hidden_dim=8, dropout=0.0, noise="never").double()
    x, attributes = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([0, 1])
    full_x = x.clone().requires_grad_()
    layer(full_x, attributes).square().sum().backward()
    full = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(needs == ("router" if "router" in name else "experts"))
    some_x = x.clone().requires_grad_(needs == "x")
    layer(some_x, attributes).square().sum().backward()
    if needs == "x":
        torch.testing.assert_close(some_x.grad, full_x.grad)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, full[name])
        else:
            assert parameter.grad is None


def test_second_derivatives_are_refused_in_words():
    layer = DMoE(4, attribute_sizes=2, noise="never")
    x = torch.randn(2, 3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x, 0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def test_functional_derivatives_are_refused_in_words():
    layer, x = eval_layer(), torch.randn(1, 3, 16)

    def run(x):
        return layer(x, 0).sum()

    for derivative in (
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.jacfwd(run)(x),
        lambda: torch.func.grad(run)(x),
    ):
        with pytest.raises(RuntimeError, match=r"derivatives by torch\.func"):
            derivative()
    layer.requires_grad_(False)  # then autograd has no say, and the tangent would be lost
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        layer(forward_ad.make_dual(x, x), 0)
    head = torch.nn.Linear(16, 1)
    with torch.no_grad():
        features = layer(x, 0)
    call = partial(torch.func.functional_call, head)
    grads = torch.func.grad(lambda p: call(p, features).sum())(dict(head.named_parameters()))
    assert grads["weight"].any()


def test_all_tokens_to_one_expert_and_idle_experts_get_zero_gradients():
    layer = eval_layer(n_experts=4, k=1)
    with torch.no_grad():
        layer.router.w_A2ED.zero_()
        layer.router.bias.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    x = torch.randn(2, 7, 16)
    y, routing = layer(x, 0, return_routing=True)
    assert (routing.expert_indices == 1).all()
    h = torch.relu(x @ layer.w1_EHD[1].mT + layer.w1_bias[1])
    torch.testing.assert_close(y, h @ layer.w2_EDH[1].mT + layer.w2_bias[1], rtol=1e-5, atol=1e-6)
    y.sum().backward()
    for parameter in (layer.w1_EHD, layer.w1_bias, layer.w2_EDH, layer.w2_bias):
        assert parameter.grad[1].abs().sum() > 0
        assert not parameter.grad[[0, 2, 3]].any()
    assert not layer.router.w_A2ED.grad[1:].any()


def test_with_all_experts_chosen_the_output_is_the_softmax_mixture():
    layer, x = eval_layer(n_experts=3, k=3), torch.randn(1, 5, 16)
    y, routing = layer(x, 2, return_routing=True)
    every = [
        torch.relu(x[0] @ layer.w1_EHD[e].mT + layer.w1_bias[e]) @ layer.w2_EDH[e].mT
        + layer.w2_bias[e]
        for e in range(3)
    ]
    gates = routing.logits.softmax(dim=-1)
    mixture = sum(gates[:, e, None] * every[e] for e in range(3))
    torch.testing.assert_close(y[0], mixture, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16), (0, 0, 16), (3, 16), (1, 1, 16)])
def test_empty_and_tiny_batches_run_forward_and_backward(shape):
    layer, x = eval_layer().train(), torch.randn(shape, requires_grad=True)
    y = layer(x, torch.zeros(shape[0], dtype=torch.int64))
    assert y.shape == shape
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())
