"""The load table: each attribute value's share of tokens by expert."""

import pytest
import torch
from harness.layers import make_quiet, make_x
from harness.scopes import Model, sends
from helpers import GOOD, A, B, E, T

from dmoe_layer import routing


def test_the_load_table_holds_each_values_share_of_tokens_by_expert():
    layer = sends(make_quiet(), (0, 1), (2, 3), (1, 2))
    with routing(GOOD) as scope:
        layer(make_x())
    expected = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0]]
    assert scope.load_table().tolist() == expected


def test_the_load_table_counts_all_calls_together_by_their_tokens():
    one, other = sends(make_quiet(k=1), (0,), (1,), (2,)), sends(make_quiet(k=1), (3,), (1,), (2,))
    with routing(GOOD) as scope:
        one(make_x(tokens=3))
        other(make_x(tokens=1))
    assert scope.load_table()[0].tolist() == [0.75, 0, 0, 0.25]
    per_call = scope.load_table(per_call=True)
    assert per_call.shape == (2, A, E)
    assert per_call[:, 0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_the_load_table_agrees_with_a_count_one_by_one():
    model = Model()
    with routing(GOOD) as scope:
        model(make_x(tokens=7))
    counts = torch.zeros(A, E)
    for r in scope.routings:
        for experts, value in zip(r.expert_indices.tolist(), r.attributes.tolist(), strict=True):
            for expert in experts:
                counts[value, expert] += 1
    table = scope.load_table()
    torch.testing.assert_close(table, counts / counts.sum(dim=1, keepdim=True))
    torch.testing.assert_close(table.sum(dim=1), torch.ones(A))
    assert table.dtype == torch.float32
    assert not table.requires_grad


def test_the_load_table_is_fp32_whatever_the_default_dtype_is():
    torch.set_default_dtype(torch.float64)
    try:
        with routing(GOOD) as scope:
            make_quiet()(make_x())
        assert scope.load_table().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_value_that_is_absent_has_a_row_of_zeros():
    layer = make_quiet(attribute_sizes=5)
    with routing([0, 3, 3, 0]) as scope:
        layer(make_x())
    table = scope.load_table()
    assert table.shape == (5, E)
    torch.testing.assert_close(table.sum(dim=1), torch.tensor([1.0, 0, 0, 1, 0]))


@pytest.mark.parametrize("unknown", ["average", "learned"])
def test_the_unknown_has_no_row_and_counts_in_none(unknown):
    layer = make_quiet(unknown=unknown)
    x = make_x()
    with routing([0, -1, 1, -1]) as scope:
        layer(x)
    with routing([0, 1]) as known:
        layer(x[[0, 2]])
    assert scope.load_table().shape == (A, E)
    assert torch.equal(scope.load_table(), known.load_table())


def test_several_attributes_have_a_table_each():
    layer = make_quiet(attribute_sizes=(3, 2), k=1)
    with torch.no_grad():
        layer.router.w_A2ED.zero_()
        layer.router.bias.zero_()
        layer.router.bias[:3, 0, [0, 1, 2]] = torch.diag(torch.full((3,), 5.0))
        layer.router.bias[4, 0, 3] = 9.0
    with routing([[0, 0], [1, 1], [2, 0], [0, 1]]) as scope:
        layer(make_x())
    by_first = [[0.5, 0, 0, 0.5], [0, 0, 0, 1], [0, 0, 1, 0]]
    by_second = [[0.5, 0, 0.5, 0], [0, 0, 0, 1]]
    assert scope.load_table().tolist() == by_first
    assert scope.load_table(attribute=0).tolist() == by_first
    assert scope.load_table(attribute=1).tolist() == by_second
    assert scope.load_table(attribute=1, per_call=True).tolist() == [by_second]


@pytest.mark.parametrize(
    ("sizes", "attributes", "index"),
    [(3, GOOD, 1), (3, GOOD, -1), ((3, 2), [[0, 0]], 2), ((3, 2), [[0, 0]], -1)],
    ids=str,
)
def test_a_table_of_an_attribute_that_is_not_there_is_refused(sizes, attributes, index):
    layer = make_quiet(attribute_sizes=sizes)
    with routing(attributes) as scope:
        layer(make_x())
    with pytest.raises(ValueError, match=rf"attribute: got {index}"):
        scope.load_table(attribute=index)


def test_a_plain_layer_without_attributes_has_no_second_attribute():
    with routing() as scope:
        make_quiet(attribute_sizes=None)(make_x())
    with pytest.raises(ValueError, match="attribute: got 3"):
        scope.load_table(attribute=3)


def test_a_plain_layer_has_a_row_for_each_value_of_the_scope():
    layer = make_quiet(attribute_sizes=None)
    with routing([0, 3, 3, 0]) as scope:
        layer(make_x())
    assert scope.load_table().shape == (4, E)
    torch.testing.assert_close(scope.load_table().sum(dim=1), torch.tensor([1.0, 0, 0, 1]))


def test_a_plain_layer_without_attributes_has_one_row_for_all_tokens():
    layer = sends(make_quiet(attribute_sizes=None), (1, 3))
    with routing() as scope:
        layer(make_x())
    assert scope.load_table().tolist() == [[0, 0.5, 0, 0.5]]


def test_tokens_without_attributes_are_not_counted_as_those_of_value_0():
    plain, layer = (
        sends(make_quiet(attribute_sizes=None), (0, 1)),
        sends(make_quiet(), (2, 3), (2, 3), (2, 3)),
    )
    with routing() as scope:
        plain(make_x())
        layer(make_x(), GOOD)
    assert scope.load_table()[0].tolist() == [0, 0, 0.5, 0.5]
    # A table for every call still, as many as there are routings.
    plain_table, table = scope.load_table(per_call=True)
    assert not plain_table.any()
    assert torch.equal(table, scope.load_table())


def test_layers_with_more_and_fewer_values_share_a_table():
    with routing([0, 1, 1, 0]) as scope:
        make_quiet(attribute_sizes=2)(make_x())
        make_quiet(attribute_sizes=4)(make_x())
    assert scope.load_table().shape == (4, E)
    assert scope.load_table(per_call=True).shape == (2, 4, E)
    torch.testing.assert_close(scope.load_table().sum(dim=1), torch.tensor([1.0, 1, 0, 0]))


@pytest.mark.parametrize("per_call", [False, True])
def test_a_table_of_no_call_is_refused(per_call):
    with routing(GOOD) as scope:
        pass
    with pytest.raises(ValueError, match="no DMoE was called"):
        scope.load_table(per_call=per_call)


@pytest.mark.parametrize("per_call", [False, True])
def test_a_table_over_different_numbers_of_experts_is_refused(per_call):
    with routing(GOOD) as scope:
        make_quiet(n_experts=4)(make_x())
        make_quiet(n_experts=6)(make_x())
    with pytest.raises(ValueError, match=r"\[4, 6\]"):
        scope.load_table(per_call=per_call)


@pytest.mark.parametrize("sizes", [A, None], ids=["dmoe", "plain"])
def test_masked_tokens_are_not_counted(sizes):
    layer, x = make_quiet(attribute_sizes=sizes), make_x()
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=torch.bool)
    x[~mask] = float("nan")
    with routing(GOOD) as scope:
        layer(x, mask=mask)
    (r,) = scope.routings
    assert r.attributes.tolist() == [0, 0, 2, 2]
    counts = torch.zeros(A, E)
    for experts, value in zip(r.expert_indices.tolist(), r.attributes.tolist(), strict=True):
        counts[value, experts] += 1
    torch.testing.assert_close(scope.load_table(), counts / counts.sum(1, keepdim=True).clamp(1))
    assert not scope.load_table()[1].any()


def test_a_table_of_masked_tokens_only_is_zero():
    with routing(GOOD) as scope:
        make_quiet()(make_x(), mask=torch.zeros(B, T, dtype=torch.bool))
    assert torch.equal(scope.load_table(), torch.zeros(A, E))
