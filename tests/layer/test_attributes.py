"""Attributes: what is accepted, what is refused, and with which words."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from harness.layers import make, make_x
from harness.refusals import BAD_FORM, BAD_VALUES, UNREADABLE, assert_refused, cases
from helpers import GOOD, A, B, D, E, T

from dmoe_layer import AttributeRouter, MissingAttributesError, routing


@pytest.mark.parametrize("dim", [D, None], ids=["dim_known", "lazy"])
@cases(BAD_VALUES, BAD_FORM, UNREADABLE)
def test_bad_explicit_attributes_are_refused_and_nothing_changes(case, dim):
    options, attributes, error, quotes = case
    layer = make(dim, **options)
    x = make_x()
    assert_refused(layer, lambda: layer(x, attributes), error, *quotes)


@pytest.mark.parametrize("dim", [D, None], ids=["dim_known", "lazy"])
@cases(BAD_VALUES)
def test_bad_values_in_a_scope_are_refused_by_the_layer(case, dim):
    options, attributes, error, quotes = case
    layer = make(dim, **options)
    x = make_x()
    opened = []

    def call():
        with routing(attributes) as scope:
            opened.append(scope)
            layer(x)

    assert_refused(layer, call, error, *quotes)
    assert opened[0].routings == []


@cases(BAD_FORM, UNREADABLE)
def test_what_is_no_attribute_is_refused_when_the_scope_opens(case):
    _, attributes, error, quotes = case
    with pytest.raises(error) as caught, routing(attributes):
        pytest.fail("the scope opened")
    assert caught.type is error
    for quote in quotes:
        assert quote in str(caught.value)


def test_no_scope_is_left_behind_by_one_that_failed_to_open():
    layer = make()
    with pytest.raises(TypeError), routing(torch.zeros(B)):
        pass
    with pytest.raises(MissingAttributesError):
        layer(make_x())


@pytest.mark.parametrize("dim", [D, None], ids=["dim_known", "lazy"])
@pytest.mark.parametrize("within", [nullcontext, routing], ids=["no_scope", "scope_without"])
def test_missing_attributes_are_never_guessed(within, dim):
    layer = make(dim)
    x = make_x()
    quotes = "attribute_sizes=3", "with routing(attributes)", "layer(x, attributes=...)"
    assert_refused(layer, lambda: layer(x), MissingAttributesError, *quotes, within=within)


def test_missing_attributes_are_a_value_error():
    assert issubclass(MissingAttributesError, ValueError)


def test_missing_attributes_are_refused_for_an_empty_batch_too():
    with pytest.raises(MissingAttributesError, match=r"attribute_sizes=\(3, 2\)"):
        make(attribute_sizes=(3, 2))(make_x(0, T, D))


@pytest.mark.parametrize("dim", [D, None], ids=["dim_known", "lazy"])
@pytest.mark.parametrize("in_scope", [False, True])
def test_a_plain_layer_handed_attributes_raises(dim, in_scope):
    layer = make(dim, attribute_sizes=None)
    x = make_x()

    def call():
        with routing(GOOD) if in_scope else nullcontext():
            layer(x, GOOD)

    assert_refused(layer, call, ValueError, "attributes", "attribute_sizes=None")


def test_a_plain_layer_refuses_a_scope_of_another_batch():
    layer = make(attribute_sizes=None)
    x = make_x()

    def call():
        with routing(GOOD[:3]):
            layer(x)

    assert_refused(layer, call, ValueError, "attributes", "(3,)", "batch of 4")


@pytest.mark.parametrize("dim", [D, None], ids=["dim_known", "lazy"])
def test_a_plain_layer_refuses_scope_values_that_could_be_nobodys(dim):
    layer, x = make(dim, attribute_sizes=None), make_x()

    def call():
        with routing([0, 1, -5, 2]):
            layer(x)

    assert_refused(layer, call, ValueError, "attributes", "got -5", "sample 2")


@pytest.mark.parametrize(
    ("x_shape", "attributes"),
    [((B, T, D), None), ((B, T, D), [0, 1]), ((B, T, D), torch.zeros(B)), ((T, D), [0])],
    ids=["missing", "wrong_batch", "float", "2d_x"],
)
def test_a_lazy_router_stays_lazy_after_bad_input(x_shape, attributes):
    router = AttributeRouter(None, E, attribute_sizes=A)
    random_state = torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)):
        router(torch.randn(x_shape, generator=torch.Generator()), attributes)
    assert router.dim is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert router(make_x(B, T, 2 * D), GOOD).logits.shape == (B * T, E)


@pytest.mark.parametrize(
    ("attributes", "error", "quotes"),
    [
        (None, MissingAttributesError, ["attribute_sizes=3"]),
        ([0, 1, 3, 2], ValueError, ["got 3", "sample 2"]),
        (torch.zeros(B), TypeError, ["float32"]),
    ],
    ids=["missing", "too_high", "float"],
)
def test_the_router_alone_refuses_like_the_layer(attributes, error, quotes):
    router = AttributeRouter(D, E, attribute_sizes=A)
    with pytest.raises(error) as caught:
        router(make_x(), attributes)
    assert all(quote in str(caught.value) for quote in quotes)


def test_a_plain_router_handed_attributes_raises():
    with pytest.raises(ValueError, match="attribute_sizes=None"):
        AttributeRouter(D, E)(make_x(), GOOD)


@pytest.mark.parametrize(
    "one",
    [2, [2], (2,), np.int64(2), np.array(2), np.array([2]), torch.tensor(2), torch.tensor([[2]])],
    ids=["int", "list", "tuple", "np_int", "np_0d", "np_1d", "0d", "batch_of_1"],
)
@pytest.mark.parametrize("in_scope", [False, True], ids=["explicit", "scope"])
def test_one_value_applies_to_every_sample(one, in_scope):
    layer, x = make(noise="never"), make_x()
    expected = layer(x, torch.full((B,), 2))
    if in_scope:
        with routing(one):
            y = layer(x)
    else:
        y = layer(x, one)
    assert torch.equal(y, expected)
    assert not torch.equal(y, layer(x, 0))


def test_one_row_of_several_attributes_applies_to_every_sample():
    layer, x = make(attribute_sizes=(3, 2), noise="never"), make_x()
    expected = layer(x, torch.tensor([[2, 1]] * B))
    assert torch.equal(layer(x, [[2, 1]]), expected)
    assert not torch.equal(layer(x, [[2, 0]]), expected)


@pytest.mark.parametrize(
    "dtype",
    ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"],
)
@pytest.mark.parametrize("in_scope", [False, True], ids=["explicit", "scope"])
def test_every_integer_type_is_accepted(dtype, in_scope):
    layer, x = make(noise="never"), make_x()
    attributes = torch.from_numpy(GOOD.numpy().astype(dtype))
    if in_scope:
        with routing(attributes) as scope:
            y = layer(x)
        assert scope.attributes.dtype == torch.int64
    else:
        y = layer(x, attributes)
    assert torch.equal(y, layer(x, GOOD))


@pytest.mark.parametrize("as_type", [torch.Tensor.tolist, torch.Tensor.numpy, tuple])
def test_lists_arrays_and_tuples_are_read(as_type):
    layer, x = make(noise="never"), make_x()
    assert torch.equal(layer(x, as_type(GOOD)), layer(x, GOOD))


def test_a_column_is_accepted_for_one_attribute():
    layer, x = make(noise="never"), make_x()
    assert torch.equal(layer(x, GOOD[:, None]), layer(x, GOOD))
    with routing(GOOD[:, None]) as scope:
        layer(x)
    assert scope.routings[0].attributes.tolist() == GOOD.repeat_interleave(T).tolist()


def test_an_int_and_a_tuple_of_one_size_are_the_same():
    torch.manual_seed(0)
    one = make(noise="never")
    torch.manual_seed(0)
    other = make(attribute_sizes=(A,), noise="never")
    x = make_x()
    assert torch.equal(one(x, GOOD), other(x, GOOD))


@pytest.mark.parametrize("attributes", [torch.zeros(0, dtype=torch.int64), 1, [2]])
@pytest.mark.parametrize("in_scope", [False, True], ids=["explicit", "scope"])
def test_an_empty_batch_passes(attributes, in_scope):
    layer, x = make(), make_x(0, T, D, requires_grad=True)
    with routing(attributes if in_scope else None) as scope:
        y = layer(x, None if in_scope else attributes)
    assert y.shape == (0, T, D)
    assert scope.routings[0].logits.shape == (0, E)
    assert scope.routings[0].attributes.shape == (0,)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("attributes", [[0, 1, 2], 7])
def test_an_empty_batch_is_checked_like_any_other(attributes):
    layer, x = make(), make_x(0, T, D)
    assert_refused(layer, lambda: layer(x, attributes), ValueError, "attributes")


def test_a_sample_is_routed_by_its_own_attribute():
    layer, x = make(noise="never"), make_x()
    y = layer(x, GOOD)
    for b, value in enumerate(GOOD.tolist()):
        torch.testing.assert_close(y[b], layer(x[b : b + 1], value)[0])
