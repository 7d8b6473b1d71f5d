"""Options, x and mask that do not fit are refused in words, and a refused call changes nothing."""

import pytest
import torch
from harness.layers import make, make_x
from harness.refusals import assert_refused
from helpers import GOOD, B, D, T

from dmoe_layer import AttributeRouter, DMoE

BAD_OPTIONS = [
    ("k", {"k": 5, "n_experts": 4}, ValueError, "5"),
    ("k", {"k": 0}, ValueError, "0"),
    ("k", {"k": -1}, ValueError, "-1"),
    ("k", {"k": True}, TypeError, "True"),
    ("k", {"k": 2.0}, TypeError, "2.0"),
    ("n_experts", {"n_experts": 0}, ValueError, "0"),
    ("n_experts", {"n_experts": True}, TypeError, "True"),
    ("n_experts", {"n_experts": None}, TypeError, "None"),
    ("activation", {"activation": "swish"}, ValueError, "swish"),
    ("activation", {"activation": None}, ValueError, "None"),
    ("backend", {"backend": "cuda"}, ValueError, "cuda"),
    ("noise", {"noise": "sometimes"}, ValueError, "sometimes"),
    ("noise", {"noise": True}, ValueError, "True"),
    ("unknown", {"unknown": "ignore"}, ValueError, "ignore"),
    ("unknown", {"unknown": None}, ValueError, "None"),
    ("dropout", {"dropout": 1.5}, ValueError, "1.5"),
    ("dropout", {"dropout": -0.1}, ValueError, "-0.1"),
    ("dropout", {"dropout": float("nan")}, ValueError, "nan"),
    ("dropout", {"dropout": "0.1"}, TypeError, "0.1"),
    ("dropout", {"dropout": True}, TypeError, "True"),
    ("attribute_sizes", {"attribute_sizes": ()}, ValueError, ""),
    ("attribute_sizes", {"attribute_sizes": (3, 0)}, ValueError, "0"),
    ("attribute_sizes", {"attribute_sizes": 0}, ValueError, "0"),
    ("attribute_sizes", {"attribute_sizes": -1}, ValueError, "-1"),
    ("attribute_sizes", {"attribute_sizes": True}, TypeError, "True"),
    ("attribute_sizes", {"attribute_sizes": (3, True)}, TypeError, "True"),
    ("attribute_sizes", {"attribute_sizes": 3.0}, TypeError, "3.0"),
    ("attribute_sizes", {"attribute_sizes": "3"}, TypeError, "3"),
    ("channel_dim", {"channel_dim": 0}, ValueError, "0"),
    ("channel_dim", {"channel_dim": 1.0}, TypeError, "1.0"),
    ("channel_dim", {"channel_dim": True}, TypeError, "True"),
    ("hidden_dim", {"hidden_dim": 0}, ValueError, "0"),
    ("hidden_dim", {"hidden_dim": True}, TypeError, "True"),
    ("dim", {"dim": 0}, ValueError, "0"),
    ("dim", {"dim": -4}, ValueError, "-4"),
    ("dim", {"dim": True}, TypeError, "True"),
    ("dim", {"dim": 8.0}, TypeError, "8.0"),
    ("bias", {"bias": "false"}, TypeError, "false"),
    ("residual", {"residual": 1}, TypeError, "1"),
    ("zero_init", {"zero_init": None}, TypeError, "None"),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "quote"), BAD_OPTIONS, ids=[str(o[1]) for o in BAD_OPTIONS]
)
def test_a_bad_option_raises_at_construction_and_is_named(name, options, error, quote):
    with pytest.raises(error) as caught:
        DMoE(**{"dim": D, **options})
    assert caught.type is error
    assert str(caught.value).startswith(name)
    assert quote in str(caught.value)


def test_an_option_nobody_knows_raises_at_construction():
    with pytest.raises(TypeError, match="capacity_factor"):
        DMoE(D, capacity_factor=1.25)


ROUTER_OPTIONS = ("dim", "n_experts", "k", "attribute_sizes", "unknown", "noise")


@pytest.mark.parametrize(
    ("name", "options", "error", "quote"),
    [case for case in BAD_OPTIONS if case[0] in ROUTER_OPTIONS],
    ids=str,
)
def test_a_bad_option_of_the_router_alone_raises_too(name, options, error, quote):
    with pytest.raises(error, match=f"^{name}"):
        AttributeRouter(**{"dim": D, **options})


X, YES = torch.ones(B, T, D), torch.ones(B, T, dtype=torch.bool)
LAZY, CHANNEL_1 = {"dim": None}, {"channel_dim": 1}

# name: options, x, error, what the message quotes
BAD_X = {
    "integers": ({}, X.long(), TypeError, "int64 | floating"),
    "bools": ({}, X > 0, TypeError, "bool | floating"),
    "complex": ({}, X + 0j, TypeError, "complex64 | floating"),
    "numpy": ({}, X.numpy(), TypeError, "ndarray"),
    "one_dimension": ({}, X[0, 0], ValueError, "(6,) | (batch, ..., dim)"),
    "scalar": ({}, X[0, 0, 0], ValueError, "()"),
    "another_width": ({}, torch.ones(B, T, 7), ValueError, "(4, 3, 7) | has 7 | 6."),
    "another_dtype": ({}, X.double(), TypeError, "torch.float64 | torch.float32"),
    "half_for_single": ({}, X.half(), TypeError, "torch.float16 | torch.float32"),
    "channels_elsewhere": (CHANNEL_1, X, ValueError, "(4, 3, 6) | has 3 | 6. | channel_dim=1"),
    "channel_dim_too_large": ({"channel_dim": 3}, X, ValueError, "(4, 3, 6) | channel_dim=3"),
    "channel_dim_is_batch": ({"channel_dim": -3}, X, ValueError, "(4, 3, 6) | channel_dim=-3"),
    "lazy_integers": (LAZY, X.long(), TypeError, "int64"),
    "lazy_one_dimension": (LAZY, X[0, 0], ValueError, "(6,)"),
    "lazy_another_dtype": (LAZY, X.double(), TypeError, "torch.float64"),
    "lazy_no_width": (LAZY, torch.ones(B, T, 0), ValueError, "(4, 3, 0)"),
}


@pytest.mark.parametrize("case", BAD_X.values(), ids=BAD_X.keys())
def test_bad_x_is_refused_and_nothing_changes(case):
    options, x, error, quotes = case
    layer = make(**options)
    assert_refused(layer, lambda: layer(x, GOOD), error, "x: ", *quotes.split(" | "))


BAD_MASK = {
    "too_short": ({}, YES[:, :2], ValueError, "(4, 2) | (4, 3)"),
    "transposed": ({}, YES.mT, ValueError, "(3, 4) | (4, 3)"),
    "for_one_sample": ({}, YES[0], ValueError, "(3,) | (4, 3)"),
    "broadcast": ({}, YES[:1], ValueError, "(1, 3) | (4, 3)"),
    "with_channels": ({}, YES[..., None], ValueError, "(4, 3, 1) | (4, 3)"),
    "floats": ({}, YES.float(), TypeError, "float32 | bool"),
    "integers": ({}, YES.long(), TypeError, "int64 | bool"),
    "a_list": ({}, YES.tolist(), TypeError, "list | bool"),
    "numpy": ({}, YES.numpy(), TypeError, "ndarray | bool"),
    "lazy_too_short": (LAZY, YES[:, :2], ValueError, "(4, 2) | (4, 3)"),
    "lazy_floats": (LAZY, YES.float(), TypeError, "float32 | bool"),
}


@pytest.mark.parametrize("case", BAD_MASK.values(), ids=BAD_MASK.keys())
def test_a_bad_mask_is_refused_and_nothing_changes(case):
    options, mask, error, quotes = case
    layer = make(**options)
    refusal = error, "mask: ", *quotes.split(" | ")
    assert_refused(layer, lambda: layer(X, GOOD, mask=mask), *refusal)


def test_a_flat_mask_of_an_image_is_refused():
    layer, image = make(channel_dim=1), torch.ones(B, D, 2, 5)
    mask = torch.ones(B, 10, dtype=torch.bool)
    quotes = "mask: ", "(4, 10)", "(4, 2, 5)"
    assert_refused(layer, lambda: layer(image, GOOD, mask=mask), ValueError, *quotes)


def test_a_refused_call_leaves_the_next_good_one_as_if_it_had_not_been():
    layers, x = [], make_x()
    for bad_first in (False, True):
        torch.manual_seed(0)
        layer = make(None)
        if bad_first:
            with pytest.raises(ValueError, match="got 3"):
                layer(make_x(B, T, 2 * D, generator=torch.Generator()), 3)
        layers.append(layer(x, GOOD))
    assert torch.equal(*layers)
