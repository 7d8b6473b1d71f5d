"""A scope with record=False tells the attributes, and keeps nothing alive of what was routed."""

import weakref

import pytest
import torch
from harness.layers import OTHER, make, make_quiet, make_x
from harness.recomputes import Block, assert_equal, both_ways, grads_of
from harness.recomputes import make_x as make_double_x
from helpers import GOOD, T

from dmoe_layer import routing

READERS = {
    "load_table": routing.load_table,
    "load_balancing_loss": routing.load_balancing_loss,
    "importance_loss": routing.importance_loss,
    "router_z_loss": routing.router_z_loss,
}


class Watched(torch.nn.Module):
    """A layer in training, and how many of its earlier calls' routings live on at every call."""

    def __init__(self):
        super().__init__()
        self.layer, self.alive, self.seen = make(), weakref.WeakSet(), []

    def forward(self, x):
        self.seen.append(len(self.alive))
        y, routed = self.layer(x, return_routing=True)
        for tensor in routed:
            self.alive.add(tensor)
        return y


@pytest.mark.parametrize("record", [True, False])
def test_no_routing_lives_on_in_a_scope_without_a_record(record):
    model = Watched()
    with routing(GOOD, record=record) as scope, torch.no_grad():
        for _ in range(3):
            model(make_x())
    assert model.seen == ([0, 4, 8] if record else [0, 0, 0])
    assert len(scope.routings) == (3 if record else 0)


def test_a_scope_without_a_record_tells_the_attributes():
    layer, x = make_quiet(), make_x()
    with routing(GOOD, record=False) as scope:
        y, routed = layer(x, return_routing=True)
        told = routing.attribute_values(x, 3)
    assert torch.equal(y, layer(x, GOOD))
    assert routed.attributes.tolist() == GOOD.repeat_interleave(T).tolist()
    assert told[:, 0].tolist() == scope.attributes.tolist() == GOOD.tolist()
    assert scope.routings == []


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_the_record_says_that_there_is_none(reader):
    with routing(GOOD, record=False) as scope:
        make_quiet()(make_x())
    with pytest.raises(RuntimeError, match=rf"^{reader}: .*record=False.*routing\(attributes\)"):
        READERS[reader](scope)


@pytest.mark.parametrize("wrong", [None, 0, "no"])
def test_a_record_is_kept_or_not(wrong):
    with pytest.raises(TypeError, match=r"record: got .*expected True or False"):
        routing(GOOD, record=wrong)
    with pytest.raises(TypeError):
        routing(GOOD, False)


def test_each_of_nested_scopes_decides_for_itself():
    layer = make_quiet()
    with routing(GOOD) as outer:
        with routing(OTHER, record=False) as inner:
            layer(make_x())
            with routing(GOOD) as innermost:
                layer(make_x())
        layer(make_x())
    assert [len(scope.routings) for scope in (outer, inner, innermost)] == [1, 0, 1]


@both_ways
def test_a_recomputed_block_gives_the_same_gradients_without_a_record(recompute):
    model, x, results = Block(), make_double_x(), []
    for run in (lambda model, x: model(x), recompute):
        torch.manual_seed(0)
        with routing(GOOD, record=False) as scope:
            y = run(model, x)
        with routing(OTHER) as other:
            results.append(grads_of(y.square().sum(), model, x))
        assert scope.routings == other.routings == []
    assert_equal(*results)


@pytest.fixture
def counted():
    """A layer, compiled, and the graphs that are made of it."""
    layer, graphs = make_quiet(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return layer, torch.compile(layer, fullgraph=True, backend=backend), graphs


def test_a_compiled_layer_keeps_a_record_or_none_as_the_scope_says(counted):
    layer, compiled, graphs = counted
    x = make_x()
    for _ in range(2):
        for record in (False, True):
            with routing(GOOD, record=record) as scope:
                y = compiled(x)
            torch.testing.assert_close(y, layer(x, GOOD))
            assert len(scope.routings) == record
    assert len(graphs) == 2
    with pytest.raises(ValueError, match="got 3"), routing([0, 1, 3, 2], record=False):
        compiled(x)


@pytest.mark.parametrize("record", [True, False])
@both_ways
def test_a_compiled_block_is_recomputed_by_the_graph_that_has_computed_it(
    counted, recompute, record
):
    layer, compiled, graphs = counted
    x = make_x().requires_grad_()
    with routing(GOOD, record=record):
        y = recompute(lambda x: torch.tanh(compiled(x)), x)
    expected = torch.tanh(layer(x, GOOD))
    grads = [grads_of(of.square().sum(), layer, x) for of in (y, expected)]
    for mine, true in zip(*grads, strict=True):
        torch.testing.assert_close(mine, true)
    assert len(graphs) == 1
