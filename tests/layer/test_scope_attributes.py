"""Whose attributes a call gets, those of its argument or of the scope, and that it keeps copies."""

from contextlib import nullcontext

import pytest
import torch
from harness.layers import GOOD_PAIRS, make, make_x
from harness.refusals import assert_refused
from helpers import GOOD, B, T
from torch import nn

from dmoe_layer import DMoE, MissingAttributesError, routing


def test_a_plain_layer_records_the_scopes_attributes():
    layer, x = make(attribute_sizes=None), make_x()
    with routing(GOOD) as scope:
        y, routed = layer(x, return_routing=True)
    assert y.shape == x.shape
    assert routed.attributes.tolist() == GOOD.repeat_interleave(T).tolist()
    assert scope.routings[0].attributes is routed.attributes


def test_a_plain_layer_routes_alike_whatever_the_scope_says():
    layer, x = make(attribute_sizes=None, noise="never"), make_x()
    y, routed = layer(x, return_routing=True)
    assert routed.attributes is None
    for attributes in (GOOD, 0, torch.tensor([[0, 7]] * B), -1):
        with routing(attributes):
            assert torch.equal(layer(x), y)


def test_a_plain_layer_records_several_attributes_of_the_scope():
    layer, x = make(attribute_sizes=None), make_x()
    with routing(GOOD_PAIRS) as scope:
        layer(x)
    expected = torch.tensor(GOOD_PAIRS).repeat_interleave(T, dim=0)
    assert torch.equal(scope.routings[0].attributes, expected)


def test_an_explicit_argument_wins_over_the_scope():
    layer, x = make(noise="never"), make_x()
    with routing(torch.zeros(B, dtype=torch.int64)) as scope:
        y = layer(x, GOOD)
        y_scope = layer(x)
    assert torch.equal(y, layer(x, GOOD))
    assert torch.equal(y_scope, layer(x, 0))
    recorded = [routed.attributes.tolist() for routed in scope.routings]
    assert recorded == [GOOD.repeat_interleave(T).tolist(), [0] * (B * T)]


def test_a_good_argument_wins_over_a_scope_that_does_not_fit():
    layer, x = make(noise="never"), make_x()
    with routing([9, 9]):
        assert torch.equal(layer(x, GOOD), layer(x, attributes=GOOD))


def test_a_bad_argument_is_not_replaced_by_a_good_scope():
    layer, x = make(), make_x()

    def call():
        with routing(GOOD):
            layer(x, [0, 1, 3, 2])

    assert_refused(layer, call, ValueError, "got 3")


def test_an_edit_of_the_scopes_attributes_never_routes_a_value_that_was_not_checked():
    layer, x = make(attribute_sizes=(3, 2), noise="never"), make_x()
    with routing([[0, 0]]) as scope:
        # 4 is no value of the first attribute; its row in the stack belongs to the second.
        scope.attributes[0, 0] = 4
        try:
            y = layer(x)
        except ValueError:
            return
    assert torch.equal(y, layer(x, [[0, 0]]))


@pytest.mark.parametrize("container", ["tensor", "numpy"])
def test_a_scope_keeps_its_own_copy_of_the_attributes(container):
    layer, x = make(noise="never"), make_x()
    mine = GOOD.clone() if container == "tensor" else GOOD.numpy().copy()
    with routing(mine) as scope:
        mine[:] = 7
        assert torch.equal(layer(x), layer(x, GOOD))
    assert torch.equal(scope.attributes, GOOD)


def test_a_routing_keeps_its_own_copy_of_explicit_attributes():
    layer, x, mine = make(), make_x(), GOOD.clone()
    _, routed = layer(x, mine, return_routing=True)
    mine.fill_(0)
    assert routed.attributes.tolist() == GOOD.repeat_interleave(T).tolist()


def test_a_module_reads_the_open_scopes_attributes_as_a_layer_does():
    x = torch.randn(3, 5)
    with routing(torch.tensor([1])), routing(torch.tensor([0, 2, -1])):
        values = routing.attribute_values(x, 3, unknown="average")
        assert values.tolist() == [[0], [2], [-1]]
        with pytest.raises(ValueError, match="sample 2") as mine:
            routing.attribute_values(x, 3)
        with pytest.raises(ValueError, match="sample 2") as layers:
            DMoE(5, attribute_sizes=3)(x)
        assert str(mine.value) == str(layers.value)
    with routing(torch.tensor([[1, 0]])):
        assert routing.attribute_values(x, (2, 2)).tolist() == [[1, 0]] * 3
    for scope in (nullcontext(), routing()):
        with scope, pytest.raises(MissingAttributesError, match="attribute_sizes=3"):
            routing.attribute_values(x, 3)


def test_a_compiled_module_reads_the_scope_that_is_open_when_it_runs():
    class Shift(nn.Module):
        def forward(self, x):
            return x + routing.attribute_values(x, 3)

    model = torch.compile(Shift(), fullgraph=True, backend="aot_eager")
    for values in ([0, 2], [1, 1]):
        with routing(torch.tensor(values)):
            assert model(torch.zeros(2, 1)).flatten().tolist() == values
    with routing(torch.tensor([0, 3])), pytest.raises(ValueError, match=r"expected 0 \.\. 2"):
        model(torch.zeros(2, 1))
