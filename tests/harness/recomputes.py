"""What the checkpointing tests share: noisy blocks, both ways to recompute, and a training step."""

import pytest
import torch
from helpers import GOOD, A, B, D, E, T, in_a_thread
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import DMoE, carry_routing, routing

from .layers import OTHER


def make(**options):
    """A noisy layer with dropout: a recompute that drew anew would be found out."""
    options = {"n_experts": E, "attribute_sizes": A, "hidden_dim": 5, "dropout": 0.3, **options}
    return DMoE(D, **{"noise": "always", "dtype": torch.float64, **options})


def make_x(tokens=T):
    return torch.randn(B, tokens, D, dtype=torch.float64, requires_grad=True)


class Block(nn.Module):
    """Several DMoEs, one of them shared, dropout, and an operation after the last of them.

    That last operation matters: a recompute stops as soon as it has all saved tensors, and would
    otherwise end before the last layer could record anything.
    """

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(D, dtype=torch.float64)
        self.first, self.last = make(**options), make(attribute_sizes=None, k=3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = x + self.first(self.norm(x))
        x = x + self.dropout(self.last(x))
        return torch.tanh(x + self.first(x))


def keep(fn, *args, **kwargs):
    return fn(*args, **kwargs)


def wrapped(fn, *args, **kwargs):
    return checkpoint(carry_routing(fn), *args, use_reentrant=False, **kwargs)


def with_contexts(fn, *args, **kwargs):
    return checkpoint(fn, *args, use_reentrant=False, context_fn=carry_routing, **kwargs)


both_ways = pytest.mark.parametrize("recompute", [wrapped, with_contexts])


def loss_of(y, scope):
    loss = y.square().sum()
    if scope is not None and scope.routings:
        loss = loss + scope.load_balancing_loss() + scope.importance_loss() + scope.router_z_loss()
    return loss


def grads_of(loss, model, *xs):
    return torch.autograd.grad(loss, [*xs, *model.parameters()], allow_unused=True)


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    assert any(e is not None and e.any() for e in expected)


def step(run, model, x, attributes=GOOD, backward="after", seed=0):
    """One training step: the loss, every gradient, and what the scope recorded."""
    torch.manual_seed(seed)
    with routing(attributes) as scope:
        y = run(model, x)
        loss = loss_of(y, scope)
        n_calls = len(scope.routings)
        grads = grads_of(loss, model, x) if backward == "inside" else None
    if backward == "after":
        grads = grads_of(loss, model, x)
    elif backward == "in_another_scope":
        with routing(OTHER) as other:
            grads = grads_of(loss, model, x)
        assert other.routings == []
    elif backward == "in_another_thread":
        grads = in_a_thread(lambda: grads_of(loss, model, x))
    elif backward == "in_another_threads_scope":

        def work():
            with routing(OTHER) as other:
                return grads_of(loss, model, x), other.routings

        grads, of_other = in_a_thread(work)
        assert of_other == []
    assert len(scope.routings) == n_calls
    return [loss.detach(), *grads], scope


WHEN = ["inside", "after", "in_another_scope", "in_another_thread", "in_another_threads_scope"]
