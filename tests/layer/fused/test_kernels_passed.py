"""The router passes x on to the experts, whose gradient of it its backward adds to its own."""

import pytest
import torch
from harness.kernels import HERE, pair

from dmoe_layer.fused import router
from dmoe_layer.tensors import RouterWeights

A2 = torch.tensor([0, 2])
QUIET = {"noise": "never", "dropout": 0.0}


def make_x():
    return torch.randn(2, 18, 16, device=HERE, requires_grad=True)


def gradients(layer, x, mask=None):
    y = layer(x, A2.to(HERE), mask=mask)
    return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


class Halved(torch.autograd.Function):
    """x itself, in the same memory, with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx / 2


def add_operations(step):
    with torch.profiler.profile() as seen:
        step()
    return [event.name for event in seen.events() if event.name.startswith("aten::add")]


@pytest.mark.parametrize("masked", [False, True])
def test_no_operation_adds_the_two_gradients_of_x(masked):
    layer, eager = pair(**QUIET)
    x, mask = make_x(), torch.rand(2, 18, device=HERE) < 0.7 if masked else None
    of_kernels, of_eager = (layer(x, A2, mask=mask).square().sum() for layer in (layer, eager))
    assert not add_operations(of_kernels.backward)
    assert add_operations(of_eager.backward)


@pytest.mark.parametrize(
    "before",
    [
        lambda router, args: (args[0] * 0.5, *args[1:]),
        lambda router, args: (Halved.apply(args[0]), *args[1:]),
        lambda router, args: (args[0].detach(), *args[1:]),
        lambda router, args: args,
    ],
    ids=["other tokens", "another gradient", "no gradient", "the same"],
)
def test_experts_take_the_layers_own_tokens_whatever_the_router_was_given(before):
    layers, x = pair(**QUIET), make_x()
    for layer in layers:
        layer.router.register_forward_pre_hook(before)
    found, expected = (gradients(layer, x) for layer in layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def no_gradient_in_the_router(router):
    router.forward = torch.no_grad()(router.forward)


def no_gradient_of_the_routers_input(router):
    router.register_forward_pre_hook(
        lambda router, args: args[0].register_hook(torch.zeros_like) and None
    )


def detached_gates(router):
    router.register_forward_hook(
        lambda router, args, routed: routed._replace(gates=routed.gates.detach())
    )


def changed_input(router):
    def halve(router, args, routed):
        with torch.no_grad():
            args[0].mul_(0.5)

    router.register_forward_hook(halve)


@pytest.mark.parametrize(
    "watch",
    [no_gradient_in_the_router, no_gradient_of_the_routers_input, detached_gates, changed_input],
)
def test_who_watches_the_router_finds_no_gradient_of_the_experts_there(watch):
    layers, x, found = pair(**QUIET), make_x(), []
    for layer in layers:
        watch(layer.router)
        y = layer(x * 1, A2)
        if watch is changed_input:
            found.append(y)
        else:
            found.append(torch.autograd.grad(y.square().sum(), [x, layer.w1_EHD]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_routing_and_output_of_detached_gates_are_two_graphs():
    for layer in pair(**QUIET):
        detached_gates(layer.router)
        y, routed = layer(make_x(), A2, return_routing=True)
        y.sum().backward()
        routed.logits.sum().backward()


def test_x_that_is_changed_in_place_after_the_call_is_refused_in_backward():
    for layer in pair(**QUIET):
        x = make_x() * 1
        y = layer(x, A2)
        x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_x_without_a_gradient_is_not_passed():
    layer, _ = pair(**QUIET)
    passed, original = [], layer.router.forward

    def forward(*args, route, **options):
        routed = original(*args, route=route, **options)
        passed.append(route.plan.x is not None)
        return routed

    layer.router.forward = forward
    layer(make_x().detach(), A2)
    layer(make_x(), A2)
    assert passed == [False, True]


def test_a_gradient_of_the_experts_alone_is_passed_on():
    layer, _ = pair(**QUIET)
    x, dx = make_x(), torch.randn(2, 18, 16, device=HERE)
    weights = RouterWeights(layer.router.w_A2ED, layer.router.bias)
    _, plan = router.route(x, weights, A2[:, None].to(HERE), None, 2, None)
    (found,) = torch.autograd.grad(plan.x, [x], dx)
    torch.testing.assert_close(found, dx, rtol=0, atol=0)
