"""The balance losses: against values worked out by hand, and against the slow loop."""

from math import log

import naive
import pytest
import torch
from harness.layers import make, make_x
from helpers import GOOD, A, B, D, E, T
from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_layer import (
    Routing,
    importance_loss,
    load_balancing_loss,
    router_z_loss,
    routing,
)

LOSSES = [load_balancing_loss, importance_loss, router_z_loss]


def by_attribute(r):
    return load_balancing_loss(r, per_attribute=True)


ALL = [*LOSSES, by_attribute]


def routed(logits, k=2, attributes=None, dtype=torch.float64):
    """The routing that these logits lead to."""
    logits = torch.as_tensor(logits, dtype=dtype)
    scores, experts = logits.topk(k)
    attributes = None if attributes is None else torch.tensor(attributes)
    return Routing(experts, scores.softmax(dim=-1), logits, attributes)


def one_hot(experts, n_experts=E, **options):
    """Every token sure of its expert."""
    return routed(1e3 * torch.eye(n_experts)[experts], k=1, **options)


def only(r, tokens):
    return Routing(*(None if t is None else t[tokens] for t in r))


def assert_is(loss, value):
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.tensor(value, dtype=loss.dtype), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- by hand


def test_load_balancing_is_what_it_is_by_hand():
    # Both tokens choose expert 0: f = (1, 0). Softmax rows (3/4, 1/4) and (1/2, 1/2), the second
    # a tie: P = (5/8, 3/8). 2 · 5/8.
    r = routed([[log(3), 0.0], [0.0, 0.0]], k=1)._replace(expert_indices=torch.zeros(2, 1).long())
    assert_is(load_balancing_loss(r), 1.25)


def test_load_balancing_with_two_experts_a_token_is_what_it_is_by_hand():
    # Softmax rows (4, 2, 1)/7 and (1, 2, 4)/7: f = (1, 2, 1)/4, P = (5, 4, 5)/14.
    # 3 · (5 + 8 + 5)/56.
    r = routed([[log(4), log(2), 0.0], [0.0, log(2), log(4)]])
    assert_is(load_balancing_loss(r), 27 / 28)


def test_importance_is_what_it_is_by_hand():
    # Gates summed by expert: (3/4, 1/4 + 2/3, 1/3) -> with denominators 12: (9, 11, 4), mean 8,
    # variance (1 + 9 + 16)/3, over 64.
    gates = torch.tensor([[3 / 4, 1 / 4], [2 / 3, 1 / 3]], dtype=torch.float64)
    r = Routing(torch.tensor([[0, 1], [1, 2]]), gates, torch.zeros(2, 3, dtype=torch.float64))
    assert_is(importance_loss(r), 26 / 192)


def test_importance_counts_idle_experts():
    # (1, 1, 0, 0): mean 1/2, variance 1/4, over 1/4.
    assert_is(importance_loss(one_hot([0, 1])), 1.0)


def test_router_z_is_what_it_is_by_hand():
    # logsumexp of (0, 0) is ln 2, of (ln 3, 0) is ln 4 = 2 ln 2.
    r = routed([[0.0, 0.0], [log(3), 0.0]], k=1)
    assert_is(router_z_loss(r), 2.5 * log(2) ** 2)


# ---------------------------------------------------------------- at the ends of the range


@pytest.mark.parametrize("n_experts", [1, 2, 8])
def test_perfect_balance_is_1(n_experts):
    even = one_hot(list(range(n_experts)) * 3, n_experts)
    assert_is(load_balancing_loss(even), 1.0)
    assert_is(importance_loss(even), 0.0)


def test_perfect_balance_is_1_with_undecided_routers():
    experts = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    r = Routing(experts, torch.full((4, 2), 0.5), torch.zeros(4, E))
    assert_is(load_balancing_loss(r), 1.0)
    assert_is(importance_loss(r), 0.0)


@pytest.mark.parametrize("n_experts", [2, 4, 8])
def test_all_tokens_to_one_expert_is_the_number_of_experts(n_experts):
    collapsed = one_hot([1] * 5, n_experts)
    assert_is(load_balancing_loss(collapsed), float(n_experts))
    # (0, 5, 0, …): mean 5/E, variance 25/E - 25/E², so CV² = E - 1.
    assert_is(importance_loss(collapsed), float(n_experts - 1))


@pytest.mark.parametrize("loss_of", LOSSES)
def test_the_order_of_tokens_does_not_matter(loss_of):
    r = routed(torch.randn(9, E))
    assert_is(loss_of(only(r, torch.randperm(9))), loss_of(r).item())


# ---------------------------------------------------------------- against the slow loop


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    n_experts=st.integers(1, 7),
    k=st.integers(1, 7),
    seed=st.integers(0, 999),
)
def test_load_balancing_equals_the_slow_loop_to_1e_9(tokens, n_experts, k, seed):
    torch.manual_seed(seed)
    logits = (3 * torch.randn(tokens, n_experts, dtype=torch.float64)).requires_grad_()
    r = routed(logits, min(k, n_experts))
    expected = naive.load_balancing_loss(list(logits), list(r.expert_indices), n_experts)
    actual = load_balancing_loss(r)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    (grad,), (true_grad,) = (torch.autograd.grad(l, logits) for l in (actual, expected))  # noqa: E741
    torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-12)


def test_the_scopes_loss_equals_the_slow_loop_on_the_whole_layer():
    layer = make(noise="never", dtype=torch.float64)
    x, values = make_x(dtype=torch.float64), [[v] for v in GOOD.tolist()]
    params = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    _, logits, experts, _ = naive.dmoe(
        x, values, params, sizes=(A,), unknown="error", k=2, activation="relu"
    )
    expected = naive.load_balancing_loss(logits, experts, E)
    with routing(GOOD) as scope:
        layer(x)
    loss = scope.load_balancing_loss()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    loss.backward()
    expected.backward()
    for name in ("router.w_A2ED", "router.bias"):
        actual = layer.get_parameter(name).grad
        torch.testing.assert_close(actual, params[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss_of", ALL)
def test_every_loss_passes_gradcheck(loss_of):
    r = routed(torch.randn(7, E), attributes=[0, 1, 1, 0, 2, 0, 0])
    logits, gates = r.logits.requires_grad_(), r.gates.requires_grad_()

    def loss(logits, gates):
        return loss_of(r._replace(logits=logits, gates=gates))

    assert torch.autograd.gradcheck(loss, (logits, gates))


def test_each_loss_has_a_gradient_by_what_it_is_made_of_alone():
    """Only the full softmax (balance), the gates (importance), the logits (z)."""
    for loss_of, of_logits, of_gates in zip(ALL, (1, 0, 1, 1), (0, 1, 0, 0), strict=True):
        r = routed(torch.randn(7, E), attributes=[0, 1, 1, 0, 2, 0, 0])
        logits, gates = r.logits.requires_grad_(), r.gates.requires_grad_()
        loss = loss_of(r._replace(logits=logits, gates=gates))
        grads = torch.autograd.grad(loss, (logits, gates), allow_unused=True)
        reached = [g is not None and bool(g.any()) for g in grads]
        assert reached == [bool(of_logits), bool(of_gates)], loss_of


# ---------------------------------------------------------------- per attribute


def test_per_attribute_is_the_unweighted_mean_over_values():
    values = [0] * 20 + [1] * 3 + [2] * 1
    r = routed(torch.randn(24, E), attributes=values)
    groups = [[i for i, v in enumerate(values) if v == value] for value in (0, 1, 2)]
    expected = sum(load_balancing_loss(only(r, tokens)).item() for tokens in groups) / 3
    assert_is(by_attribute(r), expected)


def test_a_minority_counts_like_the_majority():
    # 98 tokens of value 0 in perfect balance, 2 of value 1 collapsed: (1 + E) / 2.
    fair, collapsed = [0, 1] * 49, [0, 0]
    r = one_hot(fair + collapsed, 2, attributes=[0] * 98 + [1] * 2)
    assert_is(by_attribute(r), 1.5)
    # Together 51 of 100 tokens go to expert 0: 2 · (.51² + .49²).
    assert_is(load_balancing_loss(r), 1.0004)


def test_two_values_with_opposite_tastes_balance_together_but_not_alone():
    r = one_hot([0, 0, 1, 1], 2, attributes=[0, 0, 1, 1])
    assert_is(load_balancing_loss(r), 1.0)
    assert_is(by_attribute(r), 2.0)


def test_absent_values_do_not_count():
    r = one_hot([0, 0, 1, 1], 2, attributes=[3, 3, 7, 7])
    assert_is(by_attribute(r), 2.0)


def test_one_value_alone_is_the_plain_loss():
    r = routed(torch.randn(9, E), attributes=[4] * 9)
    assert_is(by_attribute(r), load_balancing_loss(r).item())


def test_every_value_of_several_attributes_counts_alike():
    # Attribute 0 (a: tokens 0 1, b: 2 3) collapses twice; attribute 1 (one value) is balanced:
    # (2 + 2 + 1) / 3.
    r = one_hot([0, 0, 1, 1], 2, attributes=[[0, 5], [0, 5], [1, 5], [1, 5]])
    assert_is(by_attribute(r), 5 / 3)


def test_per_attribute_without_attributes_is_refused():
    with pytest.raises(ValueError, match=r"per_attribute.*no attributes"):
        by_attribute(routed(torch.randn(5, E)))


def test_per_attribute_in_a_scope_without_attributes_is_refused():
    with routing() as scope:
        make(attribute_sizes=None)(make_x())
    with pytest.raises(ValueError, match="routing"):
        scope.load_balancing_loss(per_attribute=True)


# ---------------------------------------------------------------- no tokens


@pytest.mark.parametrize("attributes", [None, (), ((), ())], ids=["plain", "one", "two"])
@pytest.mark.parametrize("loss_of", ALL)
def test_no_tokens_is_0_and_differentiable(loss_of, attributes):
    if loss_of is by_attribute and attributes is None:
        return
    shape = {None: None, (): (0,), ((), ()): (0, 2)}[attributes]
    logits = torch.zeros(0, E, requires_grad=True)
    gates = torch.zeros(0, 2, requires_grad=True)
    values = None if shape is None else torch.zeros(shape, dtype=torch.int64)
    loss = loss_of(Routing(torch.zeros(0, 2, dtype=torch.int64), gates, logits, values))
    assert loss.item() == 0
    loss.backward()
    assert gates.grad is not None or logits.grad is not None


@pytest.mark.parametrize("nothing", ["empty_batch", "no_tokens", "all_masked"])
def test_a_scope_without_tokens_trains_on(nothing):
    layer = make()
    x = {
        "empty_batch": torch.randn(0, T, D),
        "no_tokens": torch.randn(B, 0, D),
        "all_masked": torch.full((B, T, D), float("nan")),
    }[nothing]
    mask = torch.zeros(x.shape[:2], dtype=torch.bool) if nothing == "all_masked" else None
    with routing(GOOD[: len(x)]) as scope:
        y = layer(x, mask=mask)
    losses = [
        scope.load_balancing_loss(),
        scope.load_balancing_loss(per_attribute=True),
        scope.importance_loss(),
        scope.router_z_loss(),
    ]
    assert [loss.item() for loss in losses] == [0, 0, 0, 0]
    (sum(losses) + y.sum()).backward()
    assert all(not p.grad.any() for p in layer.parameters())


# ---------------------------------------------------------------- over a scope


def of_scope(scope):
    return [
        scope.load_balancing_loss(),
        scope.importance_loss(),
        scope.router_z_loss(),
        scope.load_balancing_loss(per_attribute=True),
    ]


def test_a_scopes_loss_is_the_mean_over_its_calls():
    one, other = make(), make(n_experts=6, k=3)
    with routing(GOOD) as scope:
        one(make_x(tokens=2))
        other(make_x(tokens=9))
        one(make_x(tokens=1))
    for loss, loss_of in zip(of_scope(scope), ALL, strict=True):
        expected = torch.stack([loss_of(r) for r in scope.routings]).mean()
        torch.testing.assert_close(loss, expected)


def test_a_scope_without_calls_has_loss_0():
    with routing(GOOD) as scope:
        pass
    assert [loss.item() for loss in of_scope(scope)] == [0, 0, 0, 0]


def test_masked_tokens_count_in_no_loss():
    layer, x = make(noise="never"), make_x()
    mask = torch.rand(B, T) < 0.6
    mask[:, 0] = True
    with routing(GOOD) as whole:
        layer(x)
    x[~mask] = float("nan")
    with routing(GOOD) as masked:
        layer(x, mask=mask)
    kept = only(whole.routings[0], mask.reshape(-1))
    for loss, loss_of in zip(of_scope(masked), ALL, strict=True):
        torch.testing.assert_close(loss, loss_of(kept))


def test_the_losses_count_the_noise_that_ranked_the_tokens():
    layer, x = make(noise="always"), make_x()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with routing(GOOD) as scope:
            layer(x)
        values.append(scope.router_z_loss().item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("name", ["load_balancing_loss", "importance_loss", "router_z_loss"])
def test_every_loss_trains_the_router_clean_and_noise_and_nothing_else(name):
    layer = make().train()
    with routing(GOOD) as scope:
        layer(make_x(tokens=20))
    getattr(scope, name)().backward()
    for parameter in layer.router.parameters():
        assert parameter.grad.isfinite().all()
        for value in range(A):
            for clean_or_noise in (0, 1):
                assert parameter.grad[value, clean_or_noise].any()
    assert all(
        p.grad is None or not p.grad.any() for n, p in layer.named_parameters() if "router" not in n
    )


def test_descending_the_losses_balances_the_router():
    torch.manual_seed(0)
    layer, x = make(attribute_sizes=None, noise="never"), torch.randn(1, 200, D)
    with torch.no_grad():
        layer.router.bias[0, 0, 0] = 4.0
    history = []
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
    for _ in range(60):
        with routing() as scope:
            layer(x)
        loss = scope.load_balancing_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] > 1.5
    assert history[-1] < 1.1


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_losses_are_fp32_under_autocast(amp_dtype):
    layer = make(noise="never")
    x = make_x()
    with routing(GOOD) as reference:
        layer(x)
    with torch.autocast("cpu", amp_dtype), routing(GOOD) as scope:
        layer(x)
        inside = of_scope(scope)
    for r, full in zip(scope.routings, reference.routings, strict=True):
        assert r.logits.dtype == r.gates.dtype == torch.float32
        torch.testing.assert_close(r.logits, full.logits)
    for loss, after, full in zip(inside, of_scope(scope), of_scope(reference), strict=True):
        assert loss.dtype == after.dtype == torch.float32
        torch.testing.assert_close(loss, full)
        torch.testing.assert_close(after, full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_a_half_precision_layer_are_fp32(dtype):
    layer = make(dtype=dtype)
    with routing(GOOD) as scope:
        layer(make_x(dtype=dtype))
    (r,) = scope.routings
    assert r.logits.dtype == r.gates.dtype == torch.float32
    losses = of_scope(scope)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    sum(losses).backward()
    assert layer.router.w_A2ED.grad.dtype == dtype
    assert layer.router.w_A2ED.grad.any()


def test_large_logits_overflow_nothing():
    r = routed(torch.tensor([[3e4, -3e4, 0.0], [-3e4, 3e4, 0.0]]), dtype=torch.float32)
    for loss_of in LOSSES:
        assert loss_of(r).isfinite()
