"""Attributes and bad input: what is accepted, what is refused, and with which words."""

import itertools
from contextlib import nullcontext
from math import e, log

import naive
import numpy as np
import pytest
import torch
from helpers import GOOD, A, B, D, E, T, in_a_thread, needs_compiler
from torch.nn.parameter import UninitializedParameter

from dmoe_layer import AttributeRouter, DMoE, MissingAttributesError, routing


def make(dim=D, **options):
    options = {"n_experts": E, "attribute_sizes": A, "hidden_dim": 5, "dropout": 0.0, **options}
    return DMoE(dim, **options)


def make_x(*shape, **options):
    return torch.randn(shape or (B, T, D), **options)


def state_of(layer):
    """All that a call could have changed: parameters, laziness, gradients."""
    lazy = hasattr(layer, "_initialize_hook"), hasattr(layer.router, "_initialize_hook")
    values = [
        (name, None if isinstance(p, UninitializedParameter) else p.detach().clone(), p.grad)
        for name, p in layer.named_parameters()
    ]
    return lazy, values


def assert_refused(layer, call, error, *quotes, within=routing):
    """``call`` raises exactly ``error`` with every quote, and changes nothing at all."""
    before, random_state = state_of(layer), torch.get_rng_state()
    with within() as scope, pytest.raises(error) as caught:
        call()
    assert caught.type is error
    for quote in quotes:
        assert quote in str(caught.value)
    (lazy, values), (lazy_before, values_before) = state_of(layer), before
    assert lazy == lazy_before
    for (name, value, grad), (_, value_before, _) in zip(values, values_before, strict=True):
        assert (value is None) == (value_before is None), name
        assert value is None or torch.equal(value, value_before), name
        assert grad is None, name
    assert torch.equal(torch.get_rng_state(), random_state)
    assert scope is None or scope.routings == []


def naive_logits(layer, x, values, noise_BTE=None):
    """(B·T, E) by the slow loop, with parameters of its own to differentiate."""
    params = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    _, logits, _, _ = naive.dmoe(
        x,
        values,
        params,
        sizes=layer.router.sizes,
        unknown=layer.router.unknown,
        k=layer.k,
        activation="relu",
        noise_BTE=noise_BTE,
    )
    return torch.stack(logits), params


def logits_of(layer, x, attributes):
    return layer(x, attributes, return_routing=True)[1].logits


# ---------------------------------------------------------------- what is refused


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


AVERAGE, LEARNED, TWO = {"unknown": "average"}, {"unknown": "learned"}, {"attribute_sizes": (3, 2)}
ROWS_2 = [[2, 1], [0, 0], [1, 2], [0, 0]]
ALLOW = "unknown='average' | unknown='learned'"

# name: options, attributes, error, what the message quotes
BAD_VALUES = {
    "too_high": ({}, [0, 1, 3, 2], ValueError, "got 3 | sample 2 | 0 .. 2"),
    "far_too_high": ({}, [9, 1, 0, 2], ValueError, "got 9 | sample 0 | 0 .. 2"),
    "unknown_refused": ({}, [0, -1, 0, 0], ValueError, f"got -1 | sample 1 | 0 .. 2 | {ALLOW}"),
    "too_low": ({}, [0, 0, 0, -2], ValueError, "got -2 | sample 3 | 0 .. 2"),
    "too_low_average": (AVERAGE, [0, -1, -2, 0], ValueError, "got -2 | sample 2 | -1 .. 2"),
    "too_low_learned": (LEARNED, [-7, -1, 0, 0], ValueError, "got -7 | sample 0 | -1 .. 2"),
    "too_high_learned": (LEARNED, [0, -1, 0, 3], ValueError, "got 3 | sample 3 | -1 .. 2"),
    "scalar_too_high": ({}, 5, ValueError, "got 5 | sample 0 | 0 .. 2"),
    "second_of_two": (TWO, ROWS_2, ValueError, "got 2 | sample 2 | 0 .. 1 | attributes[:, 1]"),
    "wrong_batch": ({}, [0, 1, 2], ValueError, "(3,) | batch of 4 | (4,)"),
    "empty_for_a_batch": ({}, ints(0), ValueError, "(0,) | batch of 4 | (4,)"),
    "two_columns_for_one": ({}, ints(B, 2), ValueError, "(4, 2) | (4,) | attribute_sizes=3"),
    "one_dimension_for_two": (TWO, GOOD, ValueError, "(4,) | (4, 2) | attribute_sizes=(3, 2)"),
    "a_value_an_attribute": (TWO, [0, 1], ValueError, "(2,) | (4, 2)"),
    "scalar_for_two": (TWO, 0, ValueError, "() | (4, 2)"),
    "three_columns_for_two": (TWO, ints(B, 3), ValueError, "(4, 3) | (4, 2)"),
}
BAD_FORM = {
    "float": ({}, torch.zeros(B), TypeError, "torch.float32 | integer | (4,)"),
    "half": ({}, torch.zeros(B).half(), TypeError, "torch.float16 | integer"),
    "list_of_floats": ({}, [0.0, 1.0, 2.0, 0.0], TypeError, "float | integer"),
    "numpy_of_floats": ({}, np.zeros(B), TypeError, "torch.float64 | integer"),
    "float_scalar": ({}, 1.0, TypeError, "float | integer"),
    "bool": ({}, torch.zeros(B).bool(), TypeError, "torch.bool | integer"),
    "python_bool": ({}, True, TypeError, "torch.bool | integer"),
    "complex": ({}, torch.zeros(B) + 0j, TypeError, "complex64 | integer"),
    "three_dimensions": ({}, ints(B, 1, 1), ValueError, "(4, 1, 1) | (batch,)"),
    "no_columns": ({}, ints(B, 0), ValueError, "(4, 0) | (batch, n)"),
}
UNREADABLE = {
    "a_string": ({}, "abc", TypeError, "str | integer"),
    "a_ragged_list": ({}, [[0], [1, 2]], TypeError, "list | integer"),
    "a_dict": ({}, {"stage": 1}, TypeError, "dict | integer"),
    "strings": ({}, ["T1", "T2", "T3", "T1"], TypeError, "list | integer"),
    "a_list_with_a_hole": ({}, [0, None, 1, 2], TypeError, "list | integer"),
}


def cases(*tables):
    """(options, attributes, error, quotes) of every row of the tables."""
    merged = {
        name: (options, attributes, error, ["attributes", *quotes.split(" | ")])
        for table in tables
        for name, (options, attributes, error, quotes) in table.items()
    }
    return pytest.mark.parametrize("case", merged.values(), ids=merged.keys())


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
    quotes = "attribute_sizes=3", "with routing(attributes)", "layer(x, attributes)"
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
        router(make_x(*x_shape, generator=torch.Generator()), attributes)
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


# ---------------------------------------------------------------- the same, compiled


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


# ---------------------------------------------------------------- what is accepted


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


# ---------------------------------------------------------------- tuples and unknowns

TUPLE_VALUES = [[2, 1], [0, 0], [1, 1], [2, 0]]


def make_double(**options):
    return make(dtype=torch.float64, **options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_logits_of_several_attributes_are_the_sum_of_their_routers():
    layer = make_double(attribute_sizes=(3, 2), noise="never")
    x = make_x(dtype=torch.float64)
    expected, _ = naive_logits(layer, x, TUPLE_VALUES)
    assert_close(logits_of(layer, x, TUPLE_VALUES), expected)


def test_the_noise_of_several_attributes_is_the_sum_of_their_routers():
    layer = make_double(attribute_sizes=(3, 2), noise="always")
    x = make_x(dtype=torch.float64)
    # The draws themselves: what a router gives whose score is 0 and whose softplus is 1.
    draws = make_double(attribute_sizes=None, noise="always")
    with torch.no_grad():
        draws.router.w_A2ED.zero_()
        draws.router.b_A2E[0, 0] = 0
        draws.router.b_A2E[0, 1] = log(e - 1)
    torch.manual_seed(3)
    noise_TE = logits_of(draws, x, None).detach()
    assert 0.3 < noise_TE.std() < 3
    torch.manual_seed(3)
    logits = logits_of(layer, x, TUPLE_VALUES)
    expected, _ = naive_logits(layer, x, TUPLE_VALUES, noise_TE.reshape(B, T, E))
    assert_close(logits, expected)
    clean, _ = naive_logits(layer, x, TUPLE_VALUES)
    assert (logits - clean).abs().max() > 1e-3


UNKNOWN_CASES = [
    (sizes, values)
    for sizes, values in (
        (3, [[-1], [0], [-1], [2]]),
        (1, [[-1], [0], [-1], [0]]),
        ((3,), [[-1], [-1], [-1], [-1]]),
        ((3, 2), [[-1, 1], [0, -1], [-1, -1], [2, 0]]),
        ((2, 1, 4), [[-1, -1, 3], [1, 0, -1], [0, -1, -1], [-1, -1, -1]]),
    )
]


@pytest.mark.parametrize("unknown", ["average", "learned"])
@pytest.mark.parametrize(("sizes", "values"), UNKNOWN_CASES, ids=str)
def test_an_unknown_value_is_routed_as_its_policy_says_gradients_too(sizes, values, unknown):
    layer = make_double(attribute_sizes=sizes, unknown=unknown, noise="never")
    x = make_x(dtype=torch.float64)
    weights = torch.randn(B * T, E, dtype=torch.float64)
    logits = logits_of(layer, x, values)
    expected, params = naive_logits(layer, x, values)
    assert_close(logits, expected)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    for name in ("router.w_A2ED", "router.b_A2E"):
        actual = layer.get_parameter(name).grad
        assert_close(actual, params[name].grad)
        assert actual.any()


def test_a_learned_unknown_has_a_router_of_its_own_for_each_attribute():
    assert make(unknown="learned").router.w_A2ED.shape[0] == A + 1
    assert make(unknown="learned", attribute_sizes=(3, 2)).router.w_A2ED.shape[0] == 5 + 2
    assert make(unknown="average", attribute_sizes=(3, 2)).router.w_A2ED.shape[0] == 5
    # 2E(D+1) numbers a value, as the contract says.
    assert sum(p.numel() for p in make().router.parameters()) == A * 2 * E * (D + 1)


def test_an_unknown_sample_leaves_its_batch_mates_alone():
    layer, x = make(unknown="average", noise="never"), make_x()
    y = layer(x, [0, -1, 2, 2])
    torch.testing.assert_close(y[[0, 2, 3]], layer(x, [0, 1, 2, 2])[[0, 2, 3]])


def test_the_routing_names_the_unknown():
    layer, x = make(unknown="learned"), make_x()
    _, routed = layer(x, [0, -1, 2, 2], return_routing=True)
    assert routed.attributes.tolist() == [v for v in (0, -1, 2, 2) for _ in range(T)]


def test_no_value_has_another_values_router():
    """Every value of every attribute, and its unknown, moves the logits to a place of its own."""
    layer = make_double(attribute_sizes=(3, 2), unknown="learned", noise="never")
    x = make_x(1, 1, D, dtype=torch.float64)
    rows = list(itertools.product(range(-1, 3), range(-1, 2)))
    logits = torch.stack([logits_of(layer, x, [row])[0] for row in rows])
    assert len(logits.unique(dim=0)) == len(rows)


# ---------------------------------------------------------------- scope and argument


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
    with routing(TUPLE_VALUES) as scope:
        layer(x)
    expected = torch.tensor(TUPLE_VALUES).repeat_interleave(T, dim=0)
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


# ---------------------------------------------------------------- constructor options

BAD_OPTIONS = [
    ("k", {"k": 5, "n_experts": 4}, ValueError, "5"),
    ("k", {"k": 0}, ValueError, "0"),
    ("k", {"k": -1}, ValueError, "-1"),
    ("k", {"k": True}, TypeError, "True"),
    ("k", {"k": 2.0}, TypeError, "2.0"),
    ("n_experts", {"n_experts": 0}, ValueError, "0"),
    ("n_experts", {"n_experts": True}, TypeError, "True"),
    ("n_experts", {"n_experts": None}, TypeError, "None"),
    ("activation", {"activation": "swish"}, ValueError, "swish"),
    ("activation", {"activation": None}, ValueError, "None"),
    ("backend", {"backend": "cuda"}, ValueError, "cuda"),
    ("noise", {"noise": "sometimes"}, ValueError, "sometimes"),
    ("noise", {"noise": True}, ValueError, "True"),
    ("unknown", {"unknown": "ignore"}, ValueError, "ignore"),
    ("unknown", {"unknown": None}, ValueError, "None"),
    ("dropout", {"dropout": 1.5}, ValueError, "1.5"),
    ("dropout", {"dropout": -0.1}, ValueError, "-0.1"),
    ("dropout", {"dropout": float("nan")}, ValueError, "nan"),
    ("dropout", {"dropout": "0.1"}, TypeError, "0.1"),
    ("dropout", {"dropout": True}, TypeError, "True"),
    ("attribute_sizes", {"attribute_sizes": ()}, ValueError, ""),
    ("attribute_sizes", {"attribute_sizes": (3, 0)}, ValueError, "0"),
    ("attribute_sizes", {"attribute_sizes": 0}, ValueError, "0"),
    ("attribute_sizes", {"attribute_sizes": -1}, ValueError, "-1"),
    ("attribute_sizes", {"attribute_sizes": True}, TypeError, "True"),
    ("attribute_sizes", {"attribute_sizes": (3, True)}, TypeError, "True"),
    ("attribute_sizes", {"attribute_sizes": 3.0}, TypeError, "3.0"),
    ("attribute_sizes", {"attribute_sizes": "3"}, TypeError, "3"),
    ("channel_dim", {"channel_dim": 0}, ValueError, "0"),
    ("channel_dim", {"channel_dim": 1.0}, TypeError, "1.0"),
    ("channel_dim", {"channel_dim": True}, TypeError, "True"),
    ("hidden_dim", {"hidden_dim": 0}, ValueError, "0"),
    ("hidden_dim", {"hidden_dim": True}, TypeError, "True"),
    ("dim", {"dim": 0}, ValueError, "0"),
    ("dim", {"dim": -4}, ValueError, "-4"),
    ("dim", {"dim": True}, TypeError, "True"),
    ("dim", {"dim": 8.0}, TypeError, "8.0"),
    ("bias", {"bias": "false"}, TypeError, "false"),
    ("residual", {"residual": 1}, TypeError, "1"),
    ("zero_init", {"zero_init": None}, TypeError, "None"),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "quote"), BAD_OPTIONS, ids=[str(o[1]) for o in BAD_OPTIONS]
)
def test_a_bad_option_raises_at_construction_and_is_named(name, options, error, quote):
    with pytest.raises(error) as caught:
        DMoE(**{"dim": D, **options})
    assert caught.type is error
    assert str(caught.value).startswith(name)
    assert quote in str(caught.value)


def test_an_option_nobody_knows_raises_at_construction():
    with pytest.raises(TypeError, match="capacity_factor"):
        DMoE(D, capacity_factor=1.25)


ROUTER_OPTIONS = ("dim", "n_experts", "k", "attribute_sizes", "unknown", "noise")


@pytest.mark.parametrize(
    ("name", "options", "error", "quote"),
    [case for case in BAD_OPTIONS if case[0] in ROUTER_OPTIONS],
    ids=str,
)
def test_a_bad_option_of_the_router_alone_raises_too(name, options, error, quote):
    with pytest.raises(error, match=f"^{name}"):
        AttributeRouter(**{"dim": D, **options})


# ---------------------------------------------------------------- x and mask


X, YES = torch.ones(B, T, D), torch.ones(B, T, dtype=torch.bool)
LAZY, CHANNEL_1 = {"dim": None}, {"channel_dim": 1}

# name: options, x, error, what the message quotes
BAD_X = {
    "integers": ({}, X.long(), TypeError, "int64 | floating"),
    "bools": ({}, X > 0, TypeError, "bool | floating"),
    "complex": ({}, X + 0j, TypeError, "complex64 | floating"),
    "numpy": ({}, X.numpy(), TypeError, "ndarray"),
    "one_dimension": ({}, X[0, 0], ValueError, "(6,) | (batch, ..., dim)"),
    "scalar": ({}, X[0, 0, 0], ValueError, "()"),
    "another_width": ({}, torch.ones(B, T, 7), ValueError, "(4, 3, 7) | has 7 | 6."),
    "another_dtype": ({}, X.double(), TypeError, "torch.float64 | torch.float32"),
    "half_for_single": ({}, X.half(), TypeError, "torch.float16 | torch.float32"),
    "channels_elsewhere": (CHANNEL_1, X, ValueError, "(4, 3, 6) | has 3 | 6. | channel_dim=1"),
    "channel_dim_too_large": ({"channel_dim": 3}, X, ValueError, "(4, 3, 6) | channel_dim=3"),
    "channel_dim_is_batch": ({"channel_dim": -3}, X, ValueError, "(4, 3, 6) | channel_dim=-3"),
    "lazy_integers": (LAZY, X.long(), TypeError, "int64"),
    "lazy_one_dimension": (LAZY, X[0, 0], ValueError, "(6,)"),
    "lazy_another_dtype": (LAZY, X.double(), TypeError, "torch.float64"),
    "lazy_no_width": (LAZY, torch.ones(B, T, 0), ValueError, "(4, 3, 0)"),
}


@pytest.mark.parametrize("case", BAD_X.values(), ids=BAD_X.keys())
def test_bad_x_is_refused_and_nothing_changes(case):
    options, x, error, quotes = case
    layer = make(**options)
    assert_refused(layer, lambda: layer(x, GOOD), error, "x: ", *quotes.split(" | "))


BAD_MASK = {
    "too_short": ({}, YES[:, :2], ValueError, "(4, 2) | (4, 3)"),
    "transposed": ({}, YES.mT, ValueError, "(3, 4) | (4, 3)"),
    "for_one_sample": ({}, YES[0], ValueError, "(3,) | (4, 3)"),
    "broadcast": ({}, YES[:1], ValueError, "(1, 3) | (4, 3)"),
    "with_channels": ({}, YES[..., None], ValueError, "(4, 3, 1) | (4, 3)"),
    "floats": ({}, YES.float(), TypeError, "float32 | bool"),
    "integers": ({}, YES.long(), TypeError, "int64 | bool"),
    "a_list": ({}, YES.tolist(), TypeError, "list | bool"),
    "numpy": ({}, YES.numpy(), TypeError, "ndarray | bool"),
    "lazy_too_short": (LAZY, YES[:, :2], ValueError, "(4, 2) | (4, 3)"),
    "lazy_floats": (LAZY, YES.float(), TypeError, "float32 | bool"),
}


@pytest.mark.parametrize("case", BAD_MASK.values(), ids=BAD_MASK.keys())
def test_a_bad_mask_is_refused_and_nothing_changes(case):
    options, mask, error, quotes = case
    layer = make(**options)
    refusal = error, "mask: ", *quotes.split(" | ")
    assert_refused(layer, lambda: layer(X, GOOD, mask=mask), *refusal)


def test_a_flat_mask_of_an_image_is_refused():
    layer, image = make(channel_dim=1), torch.ones(B, D, 2, 5)
    mask = torch.ones(B, 10, dtype=torch.bool)
    quotes = "mask: ", "(4, 10)", "(4, 2, 5)"
    assert_refused(layer, lambda: layer(image, GOOD, mask=mask), ValueError, *quotes)


def test_a_refused_call_leaves_the_next_good_one_as_if_it_had_not_been():
    layers, x = [], make_x()
    for bad_first in (False, True):
        torch.manual_seed(0)
        layer = make(None)
        if bad_first:
            with pytest.raises(ValueError, match="got 3"):
                layer(make_x(B, T, 2 * D, generator=torch.Generator()), 3)
        layers.append(layer(x, GOOD))
    assert torch.equal(*layers)
