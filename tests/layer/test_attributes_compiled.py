"""A compiled layer refuses and accepts the attributes that an eager one does, in the same words."""

from contextlib import nullcontext

import pytest
import torch
from harness.layers import make, make_x
from harness.refusals import BAD_FORM, BAD_VALUES, assert_refused, cases
from helpers import GOOD, A, B, D, T, in_a_thread, needs_compiler

from dmoe_layer import MissingAttributesError, routing


def compiled(layer, backend="aot_eager", **options):
    return torch.compile(layer, fullgraph=True, backend=backend, **options)


# Each costs a compilation, so: one of every kind.
COMPILED_EXPLICIT = (
    *("too_high", "scalar_too_high", "second_of_two", "wrong_batch", "two_columns_for_one"),
    *("one_dimension_for_two", "float", "bool", "complex", "three_dimensions"),
)
COMPILED_SCOPE = ("too_high", "second_of_two", "wrong_batch", "scalar_for_two")


@cases({name: (BAD_VALUES | BAD_FORM)[name] for name in COMPILED_EXPLICIT})
def test_a_compiled_layer_refuses_bad_attributes_with_the_same_error(case):
    options, attributes, error, quotes = case
    layer = make(**options)
    run, x = compiled(layer), make_x()
    assert_refused(layer, lambda: run(x, attributes), error, *quotes)


@cases({name: BAD_VALUES[name] for name in COMPILED_SCOPE})
def test_a_compiled_layer_refuses_a_bad_scope_with_the_same_error(case):
    options, attributes, error, quotes = case
    layer = make(**options)
    run, x = compiled(layer), make_x()

    def call():
        with routing(attributes):
            run(x)

    assert_refused(layer, call, error, *quotes)


def test_a_layer_compiled_on_good_attributes_still_refuses_bad_ones():
    layer = make()
    run, x = compiled(layer), make_x()
    with routing(GOOD):
        run(x)
    for attributes in ([0, 1, 3, 2], [0, -1, 2, 2], [0, 1, 2, -2]):
        with pytest.raises(ValueError, match=r"0 \.\. 2"), routing(attributes):
            run(x)
    with pytest.raises(MissingAttributesError):
        run(x)
    with routing(GOOD) as scope:
        run(x)
    assert len(scope.routings) == 1


@pytest.mark.parametrize("within", [nullcontext, routing], ids=["no_scope", "scope_without"])
def test_a_compiled_layer_says_that_attributes_are_missing(within):
    layer = make()
    run, x = compiled(layer), make_x()
    quote = "with routing(attributes)"
    assert_refused(layer, lambda: run(x), MissingAttributesError, quote, within=within)


def test_a_compiled_plain_layer_handed_attributes_raises_the_same_error():
    layer = make(attribute_sizes=None)
    run, x = compiled(layer), make_x()
    assert_refused(layer, lambda: run(x, GOOD), ValueError, "attribute_sizes=None")


@needs_compiler
def test_inductor_drops_no_check():
    layer = make(noise="never")
    run, x = compiled(layer, backend="inductor"), make_x()
    torch.testing.assert_close(run(x, GOOD), layer(x, GOOD))
    refusal = ValueError, "got 3", "sample 2", "0 .. 2"
    assert_refused(layer, lambda: run(x, torch.tensor([0, 1, 3, 2])), *refusal)

    def in_scope():
        with routing([0, 1, 3, 2]):
            run(x)

    assert_refused(layer, in_scope, *refusal)
    assert_refused(layer, lambda: run(x), MissingAttributesError, "attribute_sizes=3")


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_a_compiled_layer_accepts_good_x_of_every_size(dynamic):
    layer = make(noise="never")
    run = compiled(layer, dynamic=dynamic)
    for batch, tokens in ((4, 3), (3, 3), (4, 7), (2, 9)):
        x, attributes = make_x(batch, tokens, D), GOOD[:batch]
        torch.testing.assert_close(run(x, attributes), layer(x, attributes))


def test_compiled_layers_of_several_widths_accept_x_of_their_own_width():
    for dim in (4, 6, 8):
        layer, x = make(dim, noise="never"), make_x(B, T, dim)
        torch.testing.assert_close(compiled(layer)(x, GOOD), layer(x, GOOD))


def test_a_compiled_layer_first_called_without_a_scope_finds_one_later():
    layer = make(noise="never")
    run, x = compiled(layer), make_x()

    def work():
        with pytest.raises(MissingAttributesError):
            run(x)
        with routing(GOOD) as scope:
            return run(x), len(scope.routings)

    y, calls = in_a_thread(work)
    assert calls == 1
    torch.testing.assert_close(y, layer(x, GOOD))


@pytest.mark.parametrize("sizes", [None, A], ids=["plain", "explicit"])
def test_a_compiled_layer_first_called_without_a_scope_is_recorded_by_a_later_one(sizes):
    layer = make(attribute_sizes=sizes)
    run, inputs = compiled(layer), (make_x(), None if sizes is None else GOOD)

    def work():
        run(*inputs)
        with routing(GOOD) as scope:
            run(*inputs)
        return len(scope.routings)

    assert in_a_thread(work) == 1
