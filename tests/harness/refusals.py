"""Attributes that do not fit, the errors that say so, and what a refused call leaves as it was."""

import numpy as np
import pytest
import torch
from helpers import GOOD, B
from torch.nn.parameter import UninitializedParameter

from dmoe_layer import routing


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
