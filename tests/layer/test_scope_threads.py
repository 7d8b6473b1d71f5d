"""Threads and pending forwards each keep their own scope."""

import threading

import pytest
import torch
from harness.layers import OTHER, make_quiet, make_x
from harness.scopes import Model, by_token, recorded
from helpers import GOOD, HANG, A, E, run_threads

from dmoe_layer import DMoE, MissingAttributesError, carry_routing, routing


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
    layer, plain = make_quiet(), make_quiet(attribute_sizes=None)

    def stranger():
        with pytest.raises(MissingAttributesError):
            layer(make_x())
        plain(make_x())
        return plain(make_x(), return_routing=True)[1].attributes

    with routing(GOOD) as scope:
        assert run_threads(stranger) == [None]
    assert scope.routings == []


def test_a_scope_closed_in_one_thread_leaves_the_others_open():
    layer = make_quiet()
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
    layer, x = make_quiet(), make_x()
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
