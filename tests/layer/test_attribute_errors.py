"""The causes that errors about attributes name, and Routings pickled by another layout."""

import pickle
import re
import typing

import pytest
import torch
from harness.layers import GOOD_PAIRS, make, make_quiet, make_x
from harness.refusals import assert_refused
from helpers import GOOD, A, B, D, T

from dmoe_layer import AttributeRouter, DMoE, Routing, router, routing, tensors

FLATTENED, SEQUENCE_FIRST = "flattened its tokens, or put windows", "sequence-first"


def causes(layer, x, attributes, **options):
    """The causes that the error of a call names."""
    with pytest.raises(ValueError, match=r"attributes: got shape .* for a batch of") as caught:
        layer(x, attributes, **options)
    return [cause for cause in (FLATTENED, SEQUENCE_FIRST) if cause in str(caught.value)]


@pytest.mark.parametrize("of", ["explicit", "scope", "lazy", "compiled"])
def test_tokens_flattened_into_the_batch_are_named_as_the_likely_cause(of):
    layer = make(None if of == "lazy" else D)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if of == "compiled" else layer
    x = make_x().flatten(0, 1)

    def call():
        if of == "scope":
            with routing(GOOD):
                run(x)
        else:
            run(x, GOOD)

    ways = "routing(attributes.repeat_interleave(3, dim=0))", "dmoe_layer.window_attributes"
    quotes = "(4,)", "batch of 12", "Expected (12,)", "12 is 3 x 4", "3 rows per sample", FLATTENED
    assert_refused(layer, call, ValueError, *quotes, *ways)


def test_what_the_error_says_of_flattened_tokens_gives_what_the_batch_gives():
    layer, x = make_quiet(), make_x()
    expected = layer(x, GOOD).flatten(0, 1)
    with routing(GOOD.repeat_interleave(T, dim=0)):
        torch.testing.assert_close(layer(x.flatten(0, 1)), expected)


def test_several_attributes_of_windows_in_the_batch_are_named_too():
    layer = make(attribute_sizes=(3, 2))
    assert causes(layer, make_x(B * T, 5), torch.tensor(GOOD_PAIRS)) == [FLATTENED]


@pytest.mark.parametrize(
    ("batch", "tokens", "rows", "named"),
    [
        (6, 5, 4, []),  # no multiple
        (4, 5, 8, []),  # fewer rows than attributes
        (5, 4, 4, [SEQUENCE_FIRST]),
        (8, 4, 4, [FLATTENED, SEQUENCE_FIRST]),
        (8, 5, 4, [FLATTENED]),
    ],
)
def test_a_cause_is_named_where_the_sizes_speak_for_it_alone(batch, tokens, rows, named):
    attributes = torch.zeros(rows, dtype=torch.int64)
    assert causes(make(), make_x(batch, tokens), attributes) == named
    assert causes(make(batch_dim=1), make_x(tokens, batch), attributes) == named


def test_a_sequence_first_model_is_told_of_the_batchs_axis():
    layer, x = make(), make_x().transpose(0, 1)
    quotes = "There are 4 tokens, as many as attributes", SEQUENCE_FIRST, "DMoE(batch_dim=1)"
    assert_refused(layer, lambda: layer(x, GOOD), ValueError, *quotes)
    assert make(batch_dim=1)(x, GOOD).shape == x.shape


def test_a_mask_does_not_make_widths_into_tokens():
    x = make_x(2, 5, 4)
    layer, mask = make(4), torch.ones(2, 5, dtype=torch.bool)
    assert causes(layer, x, GOOD, mask=mask) == []


@pytest.mark.parametrize(
    ("x", "sizes", "error", "quotes"),
    [
        ([0.0, 1.0], 3, TypeError, r"x: got \[0\.0, 1\.0\] \(list\), expected a tensor \(batch"),
        (None, 3, TypeError, r"x: got None \(NoneType\), expected a tensor \(batch"),
        (torch.tensor(1.0), 3, ValueError, r"x: got torch.float32 of shape \(\), expected \(batch"),
        (torch.zeros(4, 2), None, TypeError, "attribute_sizes: got None, expected the number"),
        (torch.zeros(4, 2), (), ValueError, "attribute_sizes: got no size"),
        (torch.zeros(4, 2), 0, ValueError, "attribute_sizes: got 0, expected at least 1"),
    ],
)
def test_a_module_of_ones_own_is_told_what_it_has_handed_over_wrongly(x, sizes, error, quotes):
    for scope in (routing(GOOD), routing()):
        with scope, pytest.raises(error, match=quotes):
            routing.attribute_values(x, sizes)


META = torch.zeros(B, dtype=torch.int64, device="meta")
NO_VALUES = "attributes: got shape (4,) on the meta device, where tensors have no values"


def test_attributes_without_values_route_nothing():
    x, layer, lazy, router = make_x(), make(), make(None), AttributeRouter(D, attribute_sizes=A)
    for call in (layer, lazy, router):
        assert_refused(layer, lambda call=call: call(x, META), ValueError, NO_VALUES)
    with pytest.raises(ValueError, match=re.escape(NO_VALUES)):
        routing(META)
    with pytest.raises(RuntimeError, match=re.escape(NO_VALUES)):  # PyTorch's own, of a compilation
        torch.compile(layer, backend="aot_eager")(x, META)


def test_a_model_on_meta_tells_shapes_with_attributes_of_either_kind():
    layer, x = make(device="meta"), make_x(device="meta")
    for attributes in (META, GOOD):
        y = layer(x, attributes)
        assert y.device.type == "meta"
        assert y.shape == x.shape
    with routing(GOOD):
        assert layer(x).shape == x.shape


@pytest.mark.parametrize("layout", ["router", "tensors"])
def test_a_routing_that_was_pickled_by_another_layout_of_the_package_loads(layout):
    assert pickle.loads(f"cdmoe_layer.{layout}\nRouting\n.".encode()) is Routing
    assert router.Routing is tensors.Routing is Routing


def test_a_pickled_routing_names_the_place_that_every_layout_has():
    with torch.no_grad():
        _, routed = DMoE(D)(make_x(), return_routing=True)
    stored = pickle.dumps(routed)
    assert b"dmoe_layer.router" in stored
    assert b"dmoe_layer.tensors" not in stored
    assert torch.equal(pickle.loads(stored).logits, routed.logits)
    assert typing.get_type_hints(Routing)["gates"] is torch.Tensor
