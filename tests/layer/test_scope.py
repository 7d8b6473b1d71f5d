"""The scope: which calls it records, whose attributes they get, and the load table."""

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from helpers import GOOD, HANG, A, B, D, E, T, run_threads
from torch import nn

from dmoe_layer import DMoE, MissingAttributesError, Routing, carry_routing, routing

OTHER = torch.tensor([1, 1, 0, 0])


def make(**options):
    options = {"n_experts": E, "attribute_sizes": A, "hidden_dim": 5, "dropout": 0.0, **options}
    return DMoE(D, **{"noise": "never", **options})


def make_x(batch=B, tokens=T):
    return torch.randn(batch, tokens, D)


def by_token(attributes, tokens=T):
    return torch.as_tensor(attributes).repeat_interleave(tokens, dim=0).tolist()


def recorded(scope):
    """The attribute values of every recorded call."""
    return [None if r.attributes is None else r.attributes.tolist() for r in scope.routings]


class Model(nn.Module):
    """Two layers, the first of them called twice; ``pause`` runs before every call."""

    def __init__(self, pause=lambda: None, **options):
        super().__init__()
        self.shared, self.last = make(**options), make(**options)
        self.pause = pause

    def forward(self, x):
        for layer in (self.shared, self.shared, self.last):
            self.pause()
            x = x + layer(x)
        return x


def sends(layer, *experts_of_value):
    """Makes every token of value a go to the experts named in the a-th tuple."""
    with torch.no_grad():
        layer.router.w_A2ED.zero_()
        layer.router.b_A2E.zero_()
        for value, experts in enumerate(experts_of_value):
            layer.router.b_A2E[value, 0, list(experts)] = 5.0
    return layer


# ---------------------------------------------------------------- what is recorded


def test_calls_are_recorded_in_order():
    first, second = make(), make(k=3)
    with routing(GOOD) as scope:
        _, a = first(make_x(), return_routing=True)
        _, b = second(make_x(tokens=5), return_routing=True)
        _, c = first(make_x(), return_routing=True)
    assert [id(r) for r in scope.routings] == [id(a), id(b), id(c)]
    assert [tuple(r.expert_indices.shape) for r in scope.routings] == [(12, 2), (20, 3), (12, 2)]


def test_a_routing_holds_what_the_call_routed():
    layer = make(noise="always")
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
    layer, x = make(), make_x(1, 1)
    with routing(0) as scope, torch.no_grad():
        for _ in range(1500):
            layer(x)
    assert len(scope.routings) == 1500
    del scope


def test_the_record_can_be_read_inside_and_after_the_scope():
    layer = make()
    with routing(GOOD) as scope:
        assert scope.routings == []
        layer(make_x())
        assert len(scope.routings) == 1
        layer(make_x())
    assert len(scope.routings) == 2


def test_calls_outside_any_scope_are_not_recorded():
    layer = make()
    layer(make_x(), GOOD)
    with routing(GOOD) as scope:
        layer(make_x())
    layer(make_x(), GOOD)
    assert recorded(scope) == [by_token(GOOD)]


def test_a_scope_without_attributes_records_plain_and_explicit_calls():
    with routing() as scope:
        make(attribute_sizes=None)(make_x())
        make()(make_x(), OTHER)
    assert recorded(scope) == [None, by_token(OTHER)]
    assert scope.attributes is None


def test_a_call_that_fails_is_not_recorded():
    layer = make()
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
    layer = make()
    with routing(GOOD) as first:
        layer(make_x())
    with routing(OTHER) as second:
        layer(make_x())
        layer(make_x())
    assert recorded(first) == [by_token(GOOD)]
    assert recorded(second) == [by_token(OTHER)] * 2


def test_the_output_is_the_same_with_and_without_a_scope():
    layer, x = make(), make_x()
    with routing(GOOD):
        inside = layer(x)
    assert torch.equal(inside, layer(x, GOOD))


# ---------------------------------------------------------------- nesting and closing


def test_an_inner_scope_hides_the_outer_one():
    layer, x = make(), make_x()
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
    layer = make()
    with routing(GOOD) as outer:
        with routing(), pytest.raises(MissingAttributesError):
            layer(make_x())
        layer(make_x())
    assert len(outer.routings) == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_an_exception_closes_the_scope(depth):
    layer = make()
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
    layer = make()
    with routing(GOOD) as outer:
        with pytest.raises(KeyError), routing(OTHER):
            raise KeyError
        layer(make_x())
    assert recorded(outer) == [by_token(GOOD)]


def test_an_open_scope_cannot_be_opened_again():
    scope, layer = routing(GOOD), make()
    with scope:
        with pytest.raises(RuntimeError, match="already open"), scope:
            pass
        layer(make_x())
    assert len(scope.routings) == 1
    with pytest.raises(MissingAttributesError):
        layer(make_x())


def test_an_open_scope_cannot_be_opened_in_an_inner_one():
    scope, layer = routing(GOOD), make()
    with scope:
        with routing(OTHER), pytest.raises(RuntimeError, match="already open"), scope:
            pass
        layer(make_x())
    assert recorded(scope) == [by_token(GOOD)]


def test_a_closed_scope_that_is_opened_again_goes_on_recording():
    scope, layer = routing(GOOD), make()
    for _ in range(2):
        with scope:
            layer(make_x())
    assert recorded(scope) == [by_token(GOOD)] * 2


# ---------------------------------------------------------------- threads and pending forwards


def forward_backward(model, x, attributes):
    x = x.clone().requires_grad_()
    with routing(attributes) as scope:
        y = model(x)
    loss = y.square().sum() + scope.load_balancing_loss()
    (dx,) = torch.autograd.grad(loss, x)
    return y.detach(), dx, recorded(scope)


def test_two_threads_use_one_model_as_if_each_were_alone():
    model = Model()
    xs, attributes = (make_x(), make_x(2, 5)), (GOOD, torch.tensor([1, 0]))
    alone = [forward_backward(model, *args) for args in zip(xs, attributes, strict=True)]
    # Both threads are inside their scope before either makes its next call.
    barrier = threading.Barrier(2, timeout=HANG)
    model.pause = barrier.wait
    together = run_threads(
        *(lambda a=args: forward_backward(model, *a) for args in zip(xs, attributes, strict=True)),
        meeting=barrier,
    )
    for (y, dx, record), (y_alone, dx_alone, record_alone) in zip(together, alone, strict=True):
        assert torch.equal(y, y_alone)
        assert torch.equal(dx, dx_alone)
        assert record == record_alone


def test_a_scope_is_invisible_to_other_threads():
    layer, plain = make(), make(attribute_sizes=None)

    def stranger():
        with pytest.raises(MissingAttributesError):
            layer(make_x())
        plain(make_x())
        return plain(make_x(), return_routing=True)[1].attributes

    with routing(GOOD) as scope:
        assert run_threads(stranger) == [None]
    assert scope.routings == []


def test_a_scope_closed_in_one_thread_leaves_the_others_open():
    layer = make()
    barrier = threading.Barrier(2, timeout=HANG)

    def stays():
        barrier.wait()  # until the other scope is open
        with routing(OTHER) as scope:
            barrier.wait()
            barrier.wait()  # until it is closed
            layer(make_x())
        return recorded(scope)

    def leaves():
        with routing(GOOD):
            barrier.wait()
            barrier.wait()  # until the scope that stays is open
        barrier.wait()

    assert run_threads(stays, leaves, meeting=barrier)[0] == [by_token(OTHER)]


def test_threads_may_make_the_first_call_of_a_lazy_layer_together():
    x = make_x()
    for _ in range(10):
        layer = DMoE(n_experts=E, attribute_sizes=A, hidden_dim=64, dropout=0.0, noise="never")
        barrier = threading.Barrier(3, timeout=HANG)

        def call(layer=layer, barrier=barrier):
            with routing(GOOD):
                barrier.wait()
                return layer(x)

        ys = run_threads(call, call, call, meeting=barrier)
        assert torch.equal(ys[0], ys[1])
        assert torch.equal(ys[0], ys[2])
        assert torch.equal(ys[0], layer(x, GOOD))


def test_a_carried_function_takes_its_scope_into_another_thread():
    layer, x = make(), make_x()
    with routing(GOOD) as scope:
        carried = carry_routing(layer)
        (y,) = run_threads(lambda: carried(x))
    assert torch.equal(y, layer(x, GOOD))
    assert recorded(scope) == [by_token(GOOD)]


def test_two_pending_forwards_keep_their_own_attributes_in_backward():
    model = Model().double()
    xs = [make_x().double().requires_grad_() for _ in range(2)]
    expected = []
    for x, attributes in zip(xs, (GOOD, OTHER), strict=True):
        with routing(attributes) as scope:
            loss = model(x).square().sum() + scope.router_z_loss()
        expected.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    with routing(GOOD) as first:
        y_first = model(xs[0])
    with routing(OTHER) as second:
        y_second = model(xs[1])
        losses = [
            y.square().sum() + s.router_z_loss() for y, s in ((y_first, first), (y_second, second))
        ]
        for loss, x, grads in zip(losses, xs, expected, strict=True):
            actual = torch.autograd.grad(loss, [x, *model.parameters()])
            assert all(torch.equal(a, g) for a, g in zip(actual, grads, strict=True))


# ---------------------------------------------------------------- load table


def test_the_load_table_holds_each_values_share_of_tokens_by_expert():
    layer = sends(make(), (0, 1), (2, 3), (1, 2))
    with routing(GOOD) as scope:
        layer(make_x())
    expected = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0, 0.5, 0.5, 0]]
    assert scope.load_table().tolist() == expected


def test_the_load_table_counts_all_calls_together_by_their_tokens():
    one, other = sends(make(k=1), (0,), (1,), (2,)), sends(make(k=1), (3,), (1,), (2,))
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
            make()(make_x())
        assert scope.load_table().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_value_that_is_absent_has_a_row_of_zeros():
    layer = make(attribute_sizes=5)
    with routing([0, 3, 3, 0]) as scope:
        layer(make_x())
    table = scope.load_table()
    assert table.shape == (5, E)
    torch.testing.assert_close(table.sum(dim=1), torch.tensor([1.0, 0, 0, 1, 0]))


@pytest.mark.parametrize("unknown", ["average", "learned"])
def test_the_unknown_has_no_row_and_counts_in_none(unknown):
    layer = make(unknown=unknown)
    x = make_x()
    with routing([0, -1, 1, -1]) as scope:
        layer(x)
    with routing([0, 1]) as known:
        layer(x[[0, 2]])
    assert scope.load_table().shape == (A, E)
    assert torch.equal(scope.load_table(), known.load_table())


def test_several_attributes_have_a_table_each():
    layer = make(attribute_sizes=(3, 2), k=1)
    with torch.no_grad():
        layer.router.w_A2ED.zero_()
        layer.router.b_A2E.zero_()
        layer.router.b_A2E[:3, 0, [0, 1, 2]] = torch.diag(torch.full((3,), 5.0))
        layer.router.b_A2E[4, 0, 3] = 9.0
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
    layer = make(attribute_sizes=sizes)
    with routing(attributes) as scope:
        layer(make_x())
    with pytest.raises(ValueError, match=rf"attribute: got {index}"):
        scope.load_table(attribute=index)


def test_a_plain_layer_without_attributes_has_no_second_attribute():
    with routing() as scope:
        make(attribute_sizes=None)(make_x())
    with pytest.raises(ValueError, match="attribute: got 3"):
        scope.load_table(attribute=3)


def test_a_plain_layer_has_a_row_for_each_value_of_the_scope():
    layer = make(attribute_sizes=None)
    with routing([0, 3, 3, 0]) as scope:
        layer(make_x())
    assert scope.load_table().shape == (4, E)
    torch.testing.assert_close(scope.load_table().sum(dim=1), torch.tensor([1.0, 0, 0, 1]))


def test_a_plain_layer_without_attributes_has_one_row_for_all_tokens():
    layer = sends(make(attribute_sizes=None), (1, 3))
    with routing() as scope:
        layer(make_x())
    assert scope.load_table().tolist() == [[0, 0.5, 0, 0.5]]


def test_tokens_without_attributes_are_not_counted_as_those_of_value_0():
    plain, layer = sends(make(attribute_sizes=None), (0, 1)), sends(make(), (2, 3), (2, 3), (2, 3))
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
        make(attribute_sizes=2)(make_x())
        make(attribute_sizes=4)(make_x())
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
        make(n_experts=4)(make_x())
        make(n_experts=6)(make_x())
    with pytest.raises(ValueError, match=r"\[4, 6\]"):
        scope.load_table(per_call=per_call)


@pytest.mark.parametrize("sizes", [A, None], ids=["dmoe", "plain"])
def test_masked_tokens_are_not_counted(sizes):
    layer, x = make(attribute_sizes=sizes), make_x()
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
        make()(make_x(), mask=torch.zeros(B, T, dtype=torch.bool))
    assert torch.equal(scope.load_table(), torch.zeros(A, E))


# ---------------------------------------------------------------- copies


def test_a_routing_without_grad_can_be_copied_and_pickled():
    with torch.no_grad(), routing(GOOD) as scope:
        make()(make_x())
        make(attribute_sizes=None)(make_x())
    for r in scope.routings:
        for twin in (copy.deepcopy(r), pickle.loads(pickle.dumps(r))):
            assert type(twin) is Routing
            assert all(torch.equal(a, b) and a is not b for a, b in zip(twin, r, strict=True))


def test_a_detached_routing_of_a_training_step_can_be_pickled():
    with routing() as scope:
        make(attribute_sizes=None)(make_x())
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
