"""Operators keep their word about memory: contiguous outputs, however the inputs are laid out."""

import pytest
import torch
from harness.exactness import assert_close
from harness.layouts import LAYOUTS, check_operator, laid_out
from helpers import needs_compiler
from torch import nn

from dmoe_layer import AttributeRouter, DMoE, routing

OPS = torch.ops.dmoe_layer
# So wide and so many rows of each expert that oneDNN multiplies them, unpadded.
SAMPLES, TOKENS, DIM, HIDDEN, EXPERTS = 3, 32, 16, 18, 4


def router_inputs(ragged=False):
    shape = (SAMPLES * TOKENS, DIM) if ragged else (SAMPLES, TOKENS, DIM)
    x, w, b = torch.randn(shape), torch.randn(5, 2, EXPERTS, DIM), torch.randn(5, 2, EXPERTS)
    rows = torch.tensor([[0, 3], [2, 4], [1, 3]])
    counts = torch.tensor([40, 9, 47]) if ragged else None
    return x, w, b, rows, counts, torch.tensor(5)


def experts_inputs(keep, activation="gelu"):
    tokens, wide = SAMPLES * TOKENS, HIDDEN * (2 if activation == "swiglu" else 1)
    shapes = ((EXPERTS, wide, DIM), (EXPERTS, wide), (EXPERTS, DIM, HIDDEN), (EXPERTS, DIM))
    weights = [torch.randn(shape) for shape in shapes]
    indices = torch.arange(2 * tokens).view(tokens, 2) % EXPERTS
    options = (activation, 0.1, torch.tensor(5), torch.float32, keep)
    return torch.randn(tokens, DIM), indices, torch.rand(tokens, 2), *weights, *options


def trained(args):
    """With copies of floating-point tensors that want a gradient."""
    return tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    )


def calls():
    tokens = SAMPLES * TOKENS
    z = torch.randn(2 * tokens, HIDDEN)
    dy, dlogits = torch.randn(tokens, DIM), torch.randn(tokens, EXPERTS)
    pairs = torch.tensor([[0, 1], [2, 0], [1, 1]])
    x, w, b, *_ = router_inputs()
    one = (x, w[:1], b[:1], None, None, None)
    some = [True, False, False, True, True, False]
    return {
        "check_attributes": (
            OPS.check_attributes, (torch.randn(3, 2), 3, pairs, None, [3, 2], "error"),
        ),
        "router": (OPS.router_logits, trained(router_inputs())),
        "router, one for all": (OPS.router_logits, trained(one)),
        "router, ragged": (OPS.router_logits, trained(router_inputs(ragged=True))),
        "router's backward": (OPS.router_logits_backward, (dlogits, *router_inputs())),
        "router's backward, one for all": (OPS.router_logits_backward, (dlogits, *one)),
        "router's backward, ragged": (
            OPS.router_logits_backward, (dlogits, *router_inputs(ragged=True)),
        ),
        "experts": (OPS.experts, trained(experts_inputs(False))),
        "experts, kept": (OPS.experts, trained(experts_inputs(True))),
        "experts' backward": (
            OPS.experts_backward, (dy, z[:0], *experts_inputs(False), [True] * 6),
        ),
        "experts' backward, kept": (
            OPS.experts_backward, (dy, z, *experts_inputs(True), [True] * 6),
        ),
        "gated experts, kept": (OPS.experts, trained(experts_inputs(True, "swiglu"))),
        "gated experts' backward, kept": (
            OPS.experts_backward,
            (dy, torch.cat([z, z], 1), *experts_inputs(True, "swiglu"), [True] * 6),
        ),
        "experts' backward, in part": (
            OPS.experts_backward, (dy, z[:0], *experts_inputs(False), some),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("call", calls())
def test_an_operator_returns_contiguous_tensors_as_its_fake_promises(call, layout):
    op, args = calls()[call]
    trains = any(a.requires_grad for a in args if isinstance(a, torch.Tensor))
    checks = ["test_schema", "test_faketensor"]
    if trains and layout == "transposed":  # one layout is enough for what costs most
        checks.append("test_aot_dispatch_dynamic")
    check_operator(op.default, args, layout, checks)


def test_backward_draws_the_noise_of_forward_whatever_the_layout_of_the_gradient():
    router, x = AttributeRouter(16, attribute_sizes=3), torch.randn(2, 10, 16)
    grads = []
    for look in (torch.Tensor.contiguous, lambda logits: logits.mT.contiguous()):
        torch.manual_seed(1)
        loss = look(router(x, torch.tensor([0, 2])).logits).square().sum()
        grads.append(torch.autograd.grad(loss, list(router.parameters())))
    for transposed, plain in zip(*grads, strict=True):
        assert_close(transposed, plain, torch.float32, "the router's gradient")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_network_of_another_layout_trains_as_the_contiguous_one(compiled):
    # Inductor draws other seeds.
    layer = DMoE(16, attribute_sizes=3, channel_dim=1, noise="never", dropout=0.0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), layer)
    x, direction = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 8, 8)

    def train(network):
        network.zero_grad()
        with routing(torch.tensor([0, 2])) as r:
            y = network(x)
        ((y * direction).sum() + r.router_z_loss()).backward()
        return [y.detach(), *(p.grad for p in network.parameters())]

    true = train(network)
    network, x = (t.to(memory_format=torch.channels_last) for t in (network, x))
    assert not layer.router.w_A2ED.is_contiguous()
    for parameter in (layer.w1_EHD, layer.w2_EDH, layer.w1_bias, layer.router.bias):
        parameter.data = laid_out([parameter.detach()], "transposed")[0]
    found = train(torch.compile(network) if compiled else network)
    for ours, expected in zip(found, true, strict=True):
        assert_close(ours, expected, torch.float32, "a network of another layout")


@pytest.mark.parametrize("name", ["w1_EHD", "w1_bias", "w2_EDH", "w2_bias", "router.bias"])
def test_a_transposed_parameter_computes_what_a_contiguous_one_does(name):
    layer = DMoE(16, n_experts=4, hidden_dim=32, attribute_sizes=3, noise="never", dropout=0.0)
    x, site = torch.randn(2, 64, 16, requires_grad=True), torch.tensor([0, 2])
    y = layer(x, site)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    parameter = layer.get_parameter(name)
    parameter.data = parameter.data.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not parameter.is_contiguous()
    assert_close(layer(x, site), y, torch.float32, "y")
    layer(x, site).square().sum().backward()
    assert_close(x.grad, dx, torch.float32, "dx")
