"""Activation checkpointing: recomputed blocks give the gradients, noise and losses of kept ones."""

import threading

import pytest
import torch
from harness.layers import OTHER
from harness.recomputes import (
    WHEN,
    Block,
    assert_equal,
    both_ways,
    grads_of,
    keep,
    loss_of,
    make,
    make_x,
    step,
    with_contexts,
    wrapped,
)
from helpers import GOOD, HANG, A, E, run_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import DMoE, routing


class Everything(nn.Module):
    """Counts how often the block runs, so that a test can tell a recompute has taken place."""

    def __init__(self, block):
        super().__init__()
        self.block, self.runs = block, 0

    def forward(self, *args, **kwargs):
        self.runs += 1
        return self.block(*args, **kwargs)


@pytest.mark.parametrize("backward", WHEN)
@both_ways
def test_a_recomputed_block_gives_the_same_loss_and_gradients(recompute, backward):
    model, x = Everything(Block()), make_x()
    expected, kept = step(keep, model, x)
    assert model.runs == 1
    actual, scope = step(recompute, model, x, backward=backward)
    assert model.runs == 3
    assert_equal(actual, expected)
    assert len(scope.routings) == len(kept.routings) == 3
    for mine, true in zip(scope.routings, kept.routings, strict=True):
        assert torch.equal(mine.logits, true.logits)
        assert torch.equal(mine.expert_indices, true.expert_indices)
        assert torch.equal(mine.attributes, true.attributes)


@both_ways
def test_the_seed_decides_the_noise_of_a_recomputed_block(recompute):
    model, x = Block(), make_x()
    one, _ = step(recompute, model, x, seed=0)
    other, _ = step(recompute, model, x, seed=1)
    assert not torch.equal(one[0], other[0])
    assert_equal(step(recompute, model, x, seed=1)[0], other)


@both_ways
def test_a_loss_of_the_scope_alone_reaches_the_router(recompute):
    model, x = make(), make_x()
    grads = []
    for run in (keep, recompute):
        torch.manual_seed(0)
        with routing(GOOD) as scope:
            run(model, x)
        loss = scope.load_balancing_loss(per_attribute=True) + scope.router_z_loss()
        grads.append(grads_of(loss, model, x))
    assert_equal(*grads)


@both_ways
def test_several_attributes_and_unknowns_survive_the_recompute(recompute):
    model, x = Block(attribute_sizes=(3, 2), unknown="learned"), make_x()
    attributes = torch.tensor([[0, -1], [2, 1], [-1, -1], [1, 0]])
    expected, _ = step(keep, model, x, attributes)
    assert_equal(step(recompute, model, x, attributes, "in_another_scope")[0], expected)


@both_ways
def test_a_model_of_many_recomputed_blocks_equals_the_kept_one(recompute):
    model, x = nn.ModuleList([Block() for _ in range(3)]), make_x()

    def through(run):
        def forward(blocks, x):
            for block in blocks:
                x = run(block, x)
            return x

        return forward

    expected, kept = step(through(keep), model, x)
    actual, scope = step(through(recompute), model, x, backward="in_another_scope")
    assert_equal(actual, expected)
    assert len(scope.routings) == len(kept.routings) == 9


@both_ways
def test_attributes_changed_in_place_before_backward_change_nothing(recompute):
    model, x = Block(), make_x()
    expected, _ = step(keep, model, x)
    mine = GOOD.clone()
    torch.manual_seed(0)
    with routing(mine) as scope:
        y = recompute(model, x)
    mine.fill_(0)
    loss = loss_of(y, scope)
    assert_equal([loss.detach(), *grads_of(loss, model, x)], expected)


@both_ways
def test_backward_may_run_twice(recompute):
    model, x = Block(), make_x()
    with routing(GOOD) as scope:
        loss = loss_of(recompute(model, x), scope)
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(model.parameters()))
    assert_equal(again, once)
    assert len(scope.routings) == 3


@both_ways
def test_a_recompute_that_does_not_stop_early_records_nothing_either(recompute):
    model, x = make(), make_x()
    expected, _ = step(keep, model, x)
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        actual, scope = step(recompute, model, x, backward="inside")
    assert_equal(actual, expected)
    assert len(scope.routings) == 1


@both_ways
def test_the_first_step_of_a_lazy_layer_is_recomputed_alike(recompute):
    """Drawing its first parameters must not shift the noise between forward and recompute."""
    results, x = [], make_x()
    for run in (keep, recompute):
        torch.manual_seed(0)
        model = DMoE(n_experts=E, attribute_sizes=A, dropout=0.3, dtype=torch.float64)
        with routing(GOOD) as scope:
            y = run(model, x)
        loss = loss_of(y, scope)
        results.append([loss.detach(), *grads_of(loss, model, x)])
    assert_equal(*results)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in_order", "last_first"])
@both_ways
def test_two_pending_forwards_are_recomputed_with_their_own_attributes(recompute, order):
    model, xs, attributes = Block(), (make_x(), make_x()), (GOOD, OTHER)
    expected = [step(keep, model, xs[i], attributes[i], seed=i)[0] for i in range(2)]
    pending = []
    for i, (x, values) in enumerate(zip(xs, attributes, strict=True)):
        torch.manual_seed(i)
        with routing(values) as scope:
            y = recompute(model, x)
        pending.append((y, scope))
    for i in order:
        loss = loss_of(*pending[i])
        assert_equal([loss.detach(), *grads_of(loss, model, xs[i])], expected[i])
    assert [len(scope.routings) for _, scope in pending] == [3, 3]


@both_ways
def test_two_pending_forwards_may_share_one_backward(recompute):
    model, xs = Block(), (make_x(), make_x())
    totals = []
    for run in (keep, recompute):
        torch.manual_seed(0)
        with routing(GOOD) as first:
            y_first = run(model, xs[0])
        with routing(OTHER) as second:
            y_second = run(model, xs[1])
        loss = loss_of(y_first, first) + loss_of(y_second, second)
        totals.append([loss.detach(), *grads_of(loss, model, *xs)])
    assert_equal(*totals)


@both_ways
def test_two_threads_recompute_their_own_attributes(recompute):
    model, xs, attributes = Block(), (make_x(), make_x()), (GOOD, OTHER)
    # The global generator is shared by threads: without noise and dropout.
    model.first.router.noise = model.last.router.noise = "never"
    model.eval()
    expected = [step(keep, model, x, a)[0] for x, a in zip(xs, attributes, strict=True)]
    barrier = threading.Barrier(2, timeout=HANG)

    def work(i):
        with routing(attributes[i]) as scope:
            barrier.wait()
            y = recompute(model, xs[i])
            loss = loss_of(y, scope)
            barrier.wait()
            return [loss.detach(), *grads_of(loss, model, xs[i])], len(scope.routings)

    results = run_threads(lambda: work(0), lambda: work(1), meeting=barrier)
    for i in range(2):
        assert_equal(results[i][0], expected[i])
        assert results[i][1] == 3


class Outer(nn.Module):
    """A block whose middle part is checkpointed again."""

    def __init__(self, run):
        super().__init__()
        self.before, self.middle, self.after, self.run = make(), Block(), make(), run

    def forward(self, x):
        x = torch.tanh(self.before(x))
        x = self.run(self.middle, x)
        return torch.tanh(self.after(x))


@pytest.mark.parametrize("backward", WHEN)
@pytest.mark.parametrize("inner", [wrapped, with_contexts])
@pytest.mark.parametrize("outer", [wrapped, with_contexts])
def test_checkpoints_inside_checkpoints_give_the_same_gradients(outer, inner, backward):
    model, x = Outer(inner), make_x()
    model.run = keep
    expected, kept = step(keep, model, x)
    model.run = inner
    actual, scope = step(outer, model, x, backward=backward)
    assert_equal(actual, expected)
    assert len(scope.routings) == len(kept.routings) == 5


@both_ways
def test_a_scope_opened_inside_the_block_is_opened_again_by_the_recompute(recompute):
    layer, x, results = make(), make_x(), []

    def block(x):
        with routing(OTHER) as inner:
            y = layer(x)
        assert len(inner.routings) == 1
        return torch.tanh(layer(x) + y) * inner.load_balancing_loss()

    for run in (keep, recompute):
        torch.manual_seed(0)
        with routing(GOOD) as scope:
            y = run(block, x)
        results.append(grads_of(y.square().sum(), layer, x))
        assert len(scope.routings) == 1
    assert_equal(*results)


@both_ways
def test_a_compiled_block_is_recomputed_alike(recompute):
    model, x = make(), make_x()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, _ = step(lambda _, x: torch.tanh(run(x)), model, x)

    def recomputed(_, x):
        return recompute(lambda x: torch.tanh(run(x)), x)

    actual, scope = step(recomputed, model, x, backward="in_another_scope")
    assert_equal(actual, expected)
    assert len(scope.routings) == 1


def test_a_checkpoint_without_carry_routing_inside_the_scope_records_once():
    layer = DMoE(8, attribute_sizes=3)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with routing(torch.tensor([0, 2])) as r:
        y = checkpoint(lambda x: torch.sin(layer(x)), x, use_reentrant=False)
        y.sum().backward()
    assert len(r.routings) == 1
