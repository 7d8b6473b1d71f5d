"""Surgery checks everything first: a refused call leaves model, gradients and optimizer alone."""

import copy

import pytest
import torch
import torch.distributed as dist
from harness.layers import make, make_quiet
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrize

from dmoe_layer import AttributeRouter, DMoE
from dmoe_layer.surgery import add_attribute_value, remove_attribute_value


def trained():
    """A layer and its optimizer after a step, with a gradient."""
    layer = make_quiet(unknown="average")
    optimizer = torch.optim.Adam(layer.parameters())
    for _ in range(2):
        layer(torch.randn(2, 5, 6), torch.tensor([0, 2])).square().mean().backward()
        optimizer.step()
    return layer, optimizer


def facts(module, optimizer):
    tensors = [(name, p, p.clone(), p.grad) for name, p in module.named_parameters()]
    sizes = [getattr(m, "attribute_sizes", None) for m in module.modules()]
    return tensors, sizes, copy.deepcopy(optimizer.state_dict())


def assert_unchanged(module, optimizer, before):
    tensors, sizes, state = before
    assert sizes == [getattr(m, "attribute_sizes", None) for m in module.modules()]
    found = list(module.named_parameters())
    assert [name for name, _ in found] == [name for name, *_ in tensors]
    for (_, parameter), (name, same, value, grad) in zip(found, tensors, strict=True):
        assert parameter is same, name
        assert torch.equal(parameter, value), name
        assert parameter.grad is grad, name
    now = optimizer.state_dict()
    assert str(now) == str(state)


# what is called, with layer and optimizer: error, what the message quotes
CALLS = {
    "no module": (lambda m, o: add_attribute_value("x"), TypeError, "model | str | Module"),
    "attribute too high": (
        lambda m, o: add_attribute_value(m, 1), ValueError,
        "attribute: got 1 | 0 .. 0 | attribute_sizes=3"),
    "attribute below": (lambda m, o: add_attribute_value(m, -1), ValueError, "got -1 | 0 .. 0"),
    "attribute of a name": (
        lambda m, o: add_attribute_value(m, "site"), TypeError, "attribute: got 'site' | int"),
    "attribute a bool": (lambda m, o: add_attribute_value(m, False), TypeError, "got False | int"),
    "start too high": (
        lambda m, o: add_attribute_value(m, start=3), ValueError, "start: got 3 | 0 .. 2"),
    "start unknown": (
        lambda m, o: add_attribute_value(m, start=-1), ValueError, "-1 | 'average' | 'learned'"),
    "start of a name": (
        lambda m, o: add_attribute_value(m, start="zero"), TypeError, "got 'zero' | 'mean'"),
    "start a float": (lambda m, o: add_attribute_value(m, start=1.0), TypeError, "1.0 | 'mean'"),
    "start a bool": (lambda m, o: add_attribute_value(m, start=True), TypeError, "True | 'mean'"),
    "value too high": (
        lambda m, o: remove_attribute_value(m, 3), ValueError, "value: got 3 | 0 .. 2"),
    "value unknown": (lambda m, o: remove_attribute_value(m, -1), ValueError, "got -1 | 0 .. 2"),
    "value of a name": (lambda m, o: remove_attribute_value(m, "A"), TypeError, "value: got 'A'"),
    "value a bool": (lambda m, o: remove_attribute_value(m, True), TypeError, "value: got True"),
    "optimizer of a kind": (
        lambda m, o: add_attribute_value(m, optimizer=o.state_dict()), TypeError,
        "optimizer: got dict"),
    "another's optimizer": (
        lambda m, o: add_attribute_value(m, optimizer=torch.optim.SGD(make().parameters(), lr=1)),
        ValueError, "optimizer: it holds no parameter of the model's routers"),
    "no attributes": (
        lambda m, o: add_attribute_value(nn.Sequential(DMoE(6), nn.Linear(6, 6))), ValueError,
        "Sequential has no | attribute_sizes"),
    "different sizes": (
        lambda m, o: add_attribute_value(nn.ModuleDict({"a": m, "b": make(attribute_sizes=4)})),
        ValueError, "3 in a.router, 4 in b.router | one by one"),
    "fewer attributes": (
        lambda m, o: add_attribute_value(
            nn.ModuleDict({"two": make(attribute_sizes=(2, 3)), "one": m}), 1),
        ValueError, "attribute: got 1 | one.router has attribute_sizes=3"),
    "not its width": (
        lambda m, o: add_attribute_value(nn.ModuleList([m, DMoE(attribute_sizes=3)])), ValueError,
        "1.router: the layer does not know its width yet | Run the model once"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "quotes"), CALLS.values(), ids=CALLS.keys())
def test_wrong_arguments_raise_what_is_wrong_and_change_nothing(call, error, quotes):
    layer, optimizer = trained()
    before = facts(layer, optimizer)
    with pytest.raises(error) as caught:
        call(layer, optimizer)
    for quote in quotes.split(" | "):
        assert quote in str(caught.value)
    assert_unchanged(layer, optimizer, before)


def test_the_last_value_stays():
    layer = make(attribute_sizes=(1, 2))
    with pytest.raises(ValueError, match=r"the only value of attribute 0"):
        remove_attribute_value(layer, 0)
    assert layer.attribute_sizes == (1, 2)


def test_state_of_another_form_is_refused_before_anything_changes():
    layer, optimizer = trained()
    optimizer.state[layer.router.bias]["exp_avg"] = torch.zeros(24)
    before = facts(layer, optimizer)
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(24,\).*new optimizer"):
        add_attribute_value(layer, optimizer=optimizer)
    assert_unchanged(layer, optimizer, before)


def test_where_memory_runs_out_nothing_is_changed(monkeypatch):
    layer, optimizer = trained()
    before, cat, calls = facts(layer, optimizer), torch.cat, []

    def out_of_memory(tensors):
        calls.append(1)
        if len(calls) == 7:
            raise torch.OutOfMemoryError("no memory for the seventh")
        return cat(tensors)

    monkeypatch.setattr(torch, "cat", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        add_attribute_value(layer, optimizer=optimizer)
    assert_unchanged(layer, optimizer, before)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class RouterOfOnesOwn(nn.Module):
    pass


def test_what_is_no_whole_parameter_of_a_router_is_refused():
    layer = make()
    parametrize.register_parametrization(layer.router, "w_A2ED", Twice())
    with pytest.raises(ValueError, match=r"router.w_A2ED: this is no parameter of the router"):
        add_attribute_value(layer)
    layer = make()
    layer.router.bias = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"router.bias: got a Parameter of shape \(3, 4\)"):
        add_attribute_value(layer)
    layer = make()
    layer.router = RouterOfOnesOwn()
    with pytest.raises(ValueError, match="the router is a RouterOfOnesOwn"):
        add_attribute_value(nn.Sequential(layer, AttributeRouter(6, attribute_sizes=3)))


def test_sharded_models_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = fully_shard(nn.Sequential(make()), mesh=mesh)
        with pytest.raises(
            ValueError, match=r"0\.router\.w_A2ED: got a DTensor .* before you shard it"
        ):
            add_attribute_value(sharded)
        flat = FullyShardedDataParallel(nn.Sequential(make()), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*before you wrap it"):
            add_attribute_value(nn.ModuleList([flat]))
    finally:
        dist.destroy_process_group()
