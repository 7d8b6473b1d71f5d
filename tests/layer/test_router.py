"""The router's scores: a sum over several attributes, and a policy for the unknown value."""

import itertools
from math import e, log

import naive
import pytest
import torch
from harness.layers import GOOD_PAIRS, make, make_x
from helpers import A, B, D, E, T

from dmoe_layer import DMoE


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


def make_double(**options):
    return make(dtype=torch.float64, **options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_the_logits_of_several_attributes_are_the_sum_of_their_routers():
    layer = make_double(attribute_sizes=(3, 2), noise="never")
    x = make_x(dtype=torch.float64)
    expected, _ = naive_logits(layer, x, GOOD_PAIRS)
    assert_close(logits_of(layer, x, GOOD_PAIRS), expected)


def test_the_noise_of_several_attributes_is_the_sum_of_their_routers():
    layer = make_double(attribute_sizes=(3, 2), noise="always")
    x = make_x(dtype=torch.float64)
    # The draws themselves: what a router gives whose score is 0 and whose softplus is 1.
    draws = make_double(attribute_sizes=None, noise="always")
    with torch.no_grad():
        draws.router.w_A2ED.zero_()
        draws.router.bias[0, 0] = 0
        draws.router.bias[0, 1] = log(e - 1)
    torch.manual_seed(3)
    noise_TE = logits_of(draws, x, None).detach()
    assert 0.3 < noise_TE.std() < 3
    torch.manual_seed(3)
    logits = logits_of(layer, x, GOOD_PAIRS)
    expected, _ = naive_logits(layer, x, GOOD_PAIRS, noise_TE.reshape(B, T, E))
    assert_close(logits, expected)
    clean, _ = naive_logits(layer, x, GOOD_PAIRS)
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
    for name in ("router.w_A2ED", "router.bias"):
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


def test_experts_follow_the_routing_that_the_routers_hooks_have_left():
    layer = DMoE(6, n_experts=4, k=2, noise="never", dropout=0.0).eval()
    x = torch.randn(2, 3, 6)
    expected = layer(x)
    layer.router.register_forward_hook(
        lambda module, inputs, routing: routing._replace(
            expert_indices=routing.expert_indices.flip(1), gates=routing.gates.flip(1)
        )
    )
    torch.testing.assert_close(layer(x), expected)
