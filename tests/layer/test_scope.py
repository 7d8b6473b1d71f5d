"""The scope: which calls it records, how scopes nest and close, and what may be copied."""

import copy
import pickle

import pytest
import torch
from harness.layers import OTHER, make_quiet, make_x
from harness.scopes import Model, by_token, recorded
from helpers import GOOD, A, B, D, E, T

from dmoe_layer import MissingAttributesError, Routing, routing


def test_calls_are_recorded_in_order():
    first, second = make_quiet(), make_quiet(k=3)
    with routing(GOOD) as scope:
        _, a = first(make_x(), return_routing=True)
        _, b = second(make_x(tokens=5), return_routing=True)
        _, c = first(make_x(), return_routing=True)
    assert [id(r) for r in scope.routings] == [id(a), id(b), id(c)]
    assert [tuple(r.expert_indices.shape) for r in scope.routings] == [(12, 2), (20, 3), (12, 2)]


def test_a_routing_holds_what_the_call_routed():
    layer = make_quiet(noise="always")
    with routing(GOOD) as scope:
        layer(make_x())
    (r,) = scope.routings
    assert isinstance(r, Routing)
    scores, experts = r.logits.topk(2)
    assert torch.equal(r.expert_indices, experts)
    assert torch.equal(r.gates, scores.softmax(dim=-1))
    assert r.attributes.tolist() == by_token(GOOD)
    assert r.logits.requires_grad
    assert r.gates.requires_grad


def test_a_module_called_several_times_records_every_call():
    model = Model()
    with routing(GOOD) as scope:
        model(make_x())
    assert recorded(scope) == [by_token(GOOD)] * 3
    assert not torch.equal(scope.routings[0].logits, scope.routings[1].logits)


def test_a_long_loop_over_one_layer_is_recorded_whole():
    layer, x = make_quiet(), make_x(1, 1)
    with routing(0) as scope, torch.no_grad():
        for _ in range(1500):
            layer(x)
    assert len(scope.routings) == 1500
    del scope


def test_the_record_can_be_read_inside_and_after_the_scope():
    layer = make_quiet()
    with routing(GOOD) as scope:
        assert scope.routings == []
        layer(make_x())
        assert len(scope.routings) == 1
        layer(make_x())
    assert len(scope.routings) == 2


def test_calls_outside_any_scope_are_not_recorded():
    layer = make_quiet()
    layer(make_x(), GOOD)
    with routing(GOOD) as scope:
        layer(make_x())
    layer(make_x(), GOOD)
    assert recorded(scope) == [by_token(GOOD)]


def test_a_scope_without_attributes_records_plain_and_explicit_calls():
    with routing() as scope:
        make_quiet(attribute_sizes=None)(make_x())
        make_quiet()(make_x(), OTHER)
    assert recorded(scope) == [None, by_token(OTHER)]
    assert scope.attributes is None


def test_a_call_that_fails_is_not_recorded():
    layer = make_quiet()
    with routing(GOOD) as scope:
        with pytest.raises(ValueError, match="x: got"):
            layer(torch.randn(B, T, D + 1))
        layer(make_x())
    assert len(scope.routings) == 1


def test_evaluation_without_grad_records_detached_routings():
    model = Model().eval()
    for no_grad in (torch.no_grad, torch.inference_mode):
        with no_grad(), routing(GOOD) as scope:
            model(make_x())
        assert len(scope.routings) == 3
        assert not any(r.logits.requires_grad or r.gates.requires_grad for r in scope.routings)
        assert scope.load_table().shape == (A, E)
        assert scope.load_balancing_loss().isfinite()


def test_two_scopes_after_another_share_nothing():
    layer = make_quiet()
    with routing(GOOD) as first:
        layer(make_x())
    with routing(OTHER) as second:
        layer(make_x())
        layer(make_x())
    assert recorded(first) == [by_token(GOOD)]
    assert recorded(second) == [by_token(OTHER)] * 2


def test_the_output_is_the_same_with_and_without_a_scope():
    layer, x = make_quiet(), make_x()
    with routing(GOOD):
        inside = layer(x)
    assert torch.equal(inside, layer(x, GOOD))


def test_an_inner_scope_hides_the_outer_one():
    layer, x = make_quiet(), make_x()
    with routing(GOOD) as outer:
        before = layer(x)
        with routing(OTHER) as inner:
            within = layer(x)
        after = layer(x)
    assert recorded(outer) == [by_token(GOOD)] * 2
    assert recorded(inner) == [by_token(OTHER)]
    assert torch.equal(before, after)
    assert torch.equal(within, layer(x, OTHER))
    assert not torch.equal(within, before)


def test_an_inner_scope_without_attributes_hides_the_outer_ones():
    layer = make_quiet()
    with routing(GOOD) as outer:
        with routing(), pytest.raises(MissingAttributesError):
            layer(make_x())
        layer(make_x())
    assert len(outer.routings) == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_an_exception_closes_the_scope(depth):
    layer = make_quiet()
    with pytest.raises(KeyError), routing(GOOD):  # noqa: PT012
        layer(make_x())
        if depth == 2:
            with routing(OTHER):
                layer(make_x())
                raise KeyError
        raise KeyError
    with pytest.raises(MissingAttributesError):
        layer(make_x())


def test_an_exception_in_an_inner_scope_gives_the_outer_one_back():
    layer = make_quiet()
    with routing(GOOD) as outer:
        with pytest.raises(KeyError), routing(OTHER):
            raise KeyError
        layer(make_x())
    assert recorded(outer) == [by_token(GOOD)]


def test_an_open_scope_cannot_be_opened_again():
    scope, layer = routing(GOOD), make_quiet()
    with scope:
        with pytest.raises(RuntimeError, match="already open"), scope:
            pass
        layer(make_x())
    assert len(scope.routings) == 1
    with pytest.raises(MissingAttributesError):
        layer(make_x())


def test_an_open_scope_cannot_be_opened_in_an_inner_one():
    scope, layer = routing(GOOD), make_quiet()
    with scope:
        with routing(OTHER), pytest.raises(RuntimeError, match="already open"), scope:
            pass
        layer(make_x())
    assert recorded(scope) == [by_token(GOOD)]


def test_a_closed_scope_that_is_opened_again_goes_on_recording():
    scope, layer = routing(GOOD), make_quiet()
    for _ in range(2):
        with scope:
            layer(make_x())
    assert recorded(scope) == [by_token(GOOD)] * 2


def test_a_routing_without_grad_can_be_copied_and_pickled():
    with torch.no_grad(), routing(GOOD) as scope:
        make_quiet()(make_x())
        make_quiet(attribute_sizes=None)(make_x())
    for r in scope.routings:
        for twin in (copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
            assert type(twin) is Routing
            assert all(torch.equal(a, b) and a is not b for a, b in zip(twin, r, strict=True))


def test_a_detached_routing_of_a_training_step_can_be_pickled():
    with routing() as scope:
        make_quiet(attribute_sizes=None)(make_x())
    (r,) = scope.routings
    detached = Routing(*(None if t is None else t.detach() for t in r))
    twin = pickle.loads(pickle.dumps(detached))
    assert twin.attributes is None
    assert torch.equal(twin.logits, r.logits)
    assert copy.deepcopy(detached).gates.shape == (B * T, 2)


def test_a_model_copied_inside_a_scope_takes_nothing_of_it_along():
    model = Model()
    with routing(GOOD) as scope:
        model(make_x())
        model.pause = None  # a lambda cannot be pickled
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        twin.pause = lambda: None
        with pytest.raises(MissingAttributesError):
            twin(make_x())
        with routing(OTHER) as own:
            twin(make_x())
        assert recorded(own) == [by_token(OTHER)] * 3
    assert len(scope.routings) == 3


def test_two_calls_leave_the_modules_attributes_as_they_were():
    """No state of a call lives on the module."""
    model = Model(noise="train", dropout=0.1)

    def contents():
        return {
            n: sorted(vars(m)) + sorted(map(str, m.buffers())) for n, m in model.named_modules()
        }

    before = contents()
    with routing(GOOD):
        model(make_x()).sum().backward()
    assert contents() == before
