"""What carry_routing can wrap, and that it leaves every other scope in place."""

import functools
from contextlib import nullcontext

import pytest
import torch
from harness.layers import OTHER
from harness.recomputes import (
    Block,
    assert_equal,
    both_ways,
    grads_of,
    keep,
    loss_of,
    make,
    make_x,
    step,
)
from helpers import GOOD, T
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import MissingAttributesError, carry_routing, routing


def test_one_wrapper_serves_several_calls():
    model, x = make(), make_x()

    def twice(call):
        return lambda x: torch.tanh(call(torch.tanh(call(x))))

    torch.manual_seed(0)
    with routing(GOOD) as kept:
        loss = loss_of(twice(model)(x), kept)
    expected = [loss.detach(), *grads_of(loss, model, x)]
    torch.manual_seed(0)
    with routing(GOOD) as scope:
        carried = carry_routing(model)
        y = twice(lambda x: checkpoint(carried, x, use_reentrant=False))(x)
    loss = loss_of(y, scope)
    assert_equal([loss.detach(), *grads_of(loss, model, x)], expected)
    assert len(scope.routings) == 2


def test_a_wrapper_carries_its_scope_even_into_another():
    layer, x = make(noise="never", dropout=0.0), make_x()
    with routing(GOOD) as mine:
        carried = carry_routing(layer)
    with routing(OTHER) as other:
        y = carried(x)
        layer(x)
    assert torch.equal(y, layer(x, GOOD))
    assert [r.attributes.tolist() for r in mine.routings] == [GOOD.repeat_interleave(T).tolist()]
    assert [r.attributes.tolist() for r in other.routings] == [OTHER.repeat_interleave(T).tolist()]


@pytest.mark.parametrize("backward_in", [nullcontext, lambda: routing([0, 1])], ids=["", "scope"])
@both_ways
def test_a_plain_layer_needs_no_scope_to_be_recomputed(recompute, backward_in):
    # The later scope is of another batch size: a recompute that looked at it would raise.
    model, x = nn.Sequential(make(attribute_sizes=None), nn.Tanh()), make_x()
    results = []
    for run in (keep, recompute):
        torch.manual_seed(0)
        loss = run(model, x).square().sum()
        with backward_in() as scope:
            results.append([loss.detach(), *grads_of(loss, model, x)])
        assert scope is None or scope.routings == []
    assert_equal(*results)


@both_ways
def test_a_layer_with_explicit_attributes_needs_no_scope_to_be_recomputed(recompute):
    model, x, results = make(), make_x(), []
    for run in (keep, recompute):
        torch.manual_seed(0)
        y = run(lambda x, a: torch.tanh(model(x, a)), x, GOOD)
        with routing(OTHER) as scope:
            results.append(grads_of(y.square().sum(), model, x))
        assert scope.routings == []
    assert_equal(*results)


@both_ways
def test_a_recomputed_layer_without_attributes_says_so(recompute):
    with pytest.raises(MissingAttributesError):
        recompute(make(), make_x())


@both_ways
def test_keyword_arguments_and_the_routing_pass_through(recompute):
    model, x, results = make(), make_x(), []
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    for run in (keep, recompute):
        torch.manual_seed(0)
        with routing(GOOD) as scope:
            y, routed = run(model, x, mask=mask, return_routing=True)
        assert routed.attributes.tolist() == [0, 0, 2, 1, 1, 1, 2]
        assert not y[~mask].any()
        assert len(scope.routings) == 1
        loss = y.square().sum() + routed.logits.logsumexp(-1).sum() + scope.importance_loss()
        results.append([loss.detach(), *grads_of(loss, model, x)])
    assert_equal(*results)


def test_functions_methods_partials_and_modules_can_be_wrapped():
    layer, x = make(noise="never", dropout=0.0), make_x()
    expected = layer(x, GOOD)
    with routing(GOOD):
        for fn in (layer, layer.forward, lambda x: layer(x), functools.partial(layer, mask=None)):
            assert torch.equal(carry_routing(fn)(x), expected)
            y = checkpoint(carry_routing(fn), x, use_reentrant=False)
            assert_equal(grads_of(y.sum(), layer, x), grads_of(layer(x).sum(), layer, x))


def test_wrapping_leaves_the_wrapped_module_alone():
    layer = make()
    names = sorted(vars(layer))
    with routing(GOOD):
        carried = carry_routing(layer)
        carried(make_x())
    assert sorted(vars(layer)) == names
    layer.eval()
    assert not layer.training
    with pytest.raises(MissingAttributesError):
        layer(make_x())


def test_a_library_that_only_takes_checkpoint_arguments_can_pass_the_contexts():
    model, x = Block(), make_x()
    expected, _ = step(keep, model, x)
    library = functools.partial(checkpoint, use_reentrant=False, context_fn=carry_routing)
    assert_equal(step(library, model, x, backward="in_another_scope")[0], expected)


@both_ways
def test_an_exception_in_a_carried_block_leaves_the_open_scope_in_place(recompute):
    layer, x = make(), make_x()

    def fails(x):
        layer(x)
        raise KeyError

    with routing(OTHER):
        carried_elsewhere = carry_routing(fails)
    with routing(GOOD) as scope:
        with pytest.raises(KeyError):
            recompute(fails, x)
        with pytest.raises(KeyError):
            carried_elsewhere(x)
        layer(x)
    assert len(scope.routings) == 2
    assert scope.routings[-1].attributes.tolist() == GOOD.repeat_interleave(T).tolist()
    with pytest.raises(MissingAttributesError):
        layer(x)


@both_ways
def test_the_scope_is_as_before_after_a_recompute(recompute):
    layer, x = make(), make_x()
    with routing(GOOD):
        y = recompute(nn.Sequential(layer, nn.Tanh()), x)
    with routing(OTHER) as scope:
        y.sum().backward()
        _, routed = layer(x, return_routing=True)
    assert routed.attributes.tolist() == OTHER.repeat_interleave(T).tolist()
    assert len(scope.routings) == 1
