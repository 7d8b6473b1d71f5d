"""Eager PyTorch calls the functions of the kernels' operators; who looks at operators sees them."""

import pytest
import torch
from harness.kernels import HERE, pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dmoe_layer import operators, router, routing

OURS = {
    "dmoe_layer::check_attributes",
    "dmoe_layer::fused_route",
    "dmoe_layer::fused_experts",
    "dmoe_layer::fused_route_backward",
    "dmoe_layer::fused_experts_backward",
}
A2 = torch.tensor([0, 2])


class Onlooker(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def make_x(**options):
    return torch.randn(2, 18, 16, device=HERE, **options)


def dispatched(step):
    """Which of the layer's operators PyTorch's dispatcher is handed in a step."""
    with torch.profiler.profile() as seen:
        step()
    return {event.name for event in seen.events()} & OURS


def a_step(layer, x):
    return lambda: layer(x, A2.to(HERE)).sum().backward()


def test_a_step_of_eager_pytorch_hands_the_dispatcher_no_operator_of_the_layer():
    layer, _ = pair()
    assert dispatched(a_step(layer, make_x(requires_grad=True))) == set()
    with torch.no_grad():
        assert dispatched(lambda: layer(make_x(), A2)) == set()
    with torch.inference_mode():
        assert dispatched(lambda: layer(make_x(), A2)) == set()


@pytest.mark.parametrize("onlooker", [Onlooker, lambda: FlopCounterMode(display=False)])
def test_a_dispatch_mode_is_shown_every_operator(onlooker):
    layer, _ = pair()
    step = a_step(layer, make_x(requires_grad=True))
    with onlooker():
        assert dispatched(step) == OURS


def test_a_subclass_of_tensor_and_a_compiled_layer_call_the_operators():
    layer, _ = pair()
    x = pytest.importorskip("monai.data").MetaTensor(make_x()).requires_grad_()
    forward = {name for name in OURS if not name.endswith("backward")}
    assert forward <= dispatched(a_step(layer, x))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert forward <= dispatched(lambda: compiled(make_x(), A2))


@pytest.mark.parametrize(("autocast", "masked"), [(False, True), (True, False)])
def test_both_ways_give_the_same_bits(autocast, masked):
    layer, _ = pair()
    x, mask = make_x(requires_grad=True), torch.rand(2, 18, device=HERE) < 0.7
    found = []
    for way in (torch.enable_grad, Onlooker):
        torch.manual_seed(3)
        with way(), torch.autocast(HERE, dtype=torch.bfloat16, enabled=autocast):
            y = layer(x, A2, mask=mask if masked else None)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    assert all(torch.equal(*two) for two in zip(*found, strict=True))


def test_what_nobody_wants_gets_no_gradient_in_either_way():
    layer, _ = pair()
    layer.requires_grad_(False)
    for way in (torch.enable_grad, Onlooker):
        with way():
            assert not layer(make_x(), A2).requires_grad
            assert layer(make_x(requires_grad=True), A2).requires_grad
    _, routed = layer(make_x(requires_grad=True), A2, return_routing=True)
    assert routed.gates.requires_grad
    assert routed.logits.requires_grad
    assert not routed.expert_indices.requires_grad


def test_second_derivatives_are_refused():
    layer, _ = pair(noise="never", dropout=0.0)
    x = make_x(requires_grad=True)
    for outputs in (layer(x, A2), layer.router(x, A2).logits):
        (dx,) = torch.autograd.grad(outputs.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            dx.sum().backward()


def test_where_pytorch_cannot_be_asked_operators_are_called(monkeypatch):
    layer, _ = pair()
    x = make_x(requires_grad=True)
    monkeypatch.delattr(torch._C, "_dispatch_tls_is_dispatch_key_included")
    assert dispatched(a_step(layer, x)) == OURS


def test_inside_of_vmap_no_function_of_an_operator_is_called():
    seen = []
    torch.vmap(lambda x: seen.append(operators._is_eager((x,))) or x)(torch.zeros(2, 3))
    assert seen == [False]


def test_attributes_are_given_each_token_only_where_somebody_reads_them(monkeypatch):
    layer, _ = pair()
    layer.eval()
    x, calls, original = make_x(), [], router.per_token
    monkeypatch.setattr(router, "per_token", lambda *a: calls.append(1) or original(*a))
    with routing(A2, record=False):
        layer(x)
    layer(x, A2)
    assert not calls
    expected = A2.repeat_interleave(18).to(HERE)
    _, returned = layer(x, A2, return_routing=True)
    with routing(A2) as scope:
        layer(x)
    hooked = []
    handle = layer.router.register_forward_hook(lambda *args: hooked.append(args[-1]))
    layer(x, A2)
    handle.remove()
    everybodys = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, found: hooked.append(found) if module is layer.router else None
    )
    layer(x, A2)
    everybodys.remove()
    alone = layer.router(x, A2)
    for found in (returned, *scope.routings, *hooked, alone):
        assert torch.equal(found.attributes, expected)
    assert len(calls) == 5
