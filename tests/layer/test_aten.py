"""The plain ATen forms, of which exported programs are made, compute what the layer does."""

import naive
import pytest
import torch
from harness.exactness import assert_close, configurations, run_both
from harness.exports import as_exported
from harness.layers import OTHER, eval_layer, make_quiet, make_x
from helpers import GOOD, A, E, T
from hypothesis import given, settings

from dmoe_layer import DMoE, aten

both_forms = pytest.mark.parametrize("form", ["sparse", "dense"])
QUIET = {"noise": "never", "dropout": 0.0}


@both_forms
@settings(max_examples=60)
@given(configurations())
def test_double_precision_equals_the_naive_loop(form, configuration):
    options, call = configuration
    with as_exported(form):
        pairs = run_both({**options, **QUIET}, call, torch.float64)
    for what, (found, true) in pairs.items():
        assert_close(found, true, torch.float64, what)


@both_forms
@pytest.mark.parametrize("activation", sorted(naive.ACTIVATIONS))
def test_lower_precision_equals_the_naive_loop(form, activation):
    options = {
        "dim": 24,
        "hidden_dim": 40,
        "n_experts": 8,
        "k": 2,
        "attribute_sizes": 3,
        "unknown": "error",
        "activation": activation,
        "bias": True,
        "residual": False,
        **QUIET,
    }
    call = {"batch": 3, "tokens": 21, "values": [[0], [2], [2]], "training": False}
    for dtype in (torch.float32, torch.bfloat16):
        with as_exported(form):
            pairs = run_both(options, {**call, "masked": False, "seed": 5}, dtype)
        for what, (found, true) in pairs.items():
            assert_close(found, true, dtype, what)


@both_forms
def test_any_layout_and_residual_give_what_the_layer_gives(form):
    layer = DMoE(6, attribute_sizes=A, channel_dim=1, residual=True).eval()
    x = torch.randn(4, 6, 3, 2, 5).to(memory_format=torch.channels_last_3d)
    expected = layer(x, GOOD)
    with as_exported(form):
        found = layer(x, GOOD)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


@both_forms
@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_stays_in_its_sample(form, masked):
    layer, x, mask = make_quiet().eval(), make_x(), torch.ones(4, T, dtype=torch.bool)
    options = {"mask": mask} if masked else {}
    with as_exported(form):
        expected = layer(x, GOOD, **options)
        x[1, 2, 3] = torch.nan
        found = layer(x, GOOD, **options)
    assert found[1, 2].isnan().all()
    found[1, 2] = expected[1, 2]
    torch.testing.assert_close(found, expected)


@both_forms
def test_a_nan_outside_of_the_mask_reaches_nothing(form):
    layer, x, mask = make_quiet().eval(), make_x(), torch.ones(4, T, dtype=torch.bool)
    mask[1, 2], x[1, 2] = False, torch.nan
    with as_exported(form):
        found = layer(x, GOOD, mask=mask)
    torch.testing.assert_close(found, layer(x, GOOD, mask=mask))
    assert not found[1, 2].any()


@both_forms
def test_a_nan_in_one_values_router_stays_there(form):
    layer, x = make_quiet().eval().requires_grad_(False), make_x()
    expected = layer(x, torch.tensor([0, 1, 1, 0]))
    layer.router.w_A2ED[2] = torch.nan
    with as_exported(form):
        found = layer(x, torch.tensor([0, 2, 1, 0]))
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2, 3]], expected[[0, 2, 3]])


@both_forms
def test_an_expert_that_overflows_spoils_only_the_tokens_sent_to_it(form):
    layer, x = make_quiet().eval().requires_grad_(False), make_x()
    layer.w1_bias[0] = torch.inf
    expected = layer(x, GOOD)
    sent = (layer.router(x, GOOD).expert_indices == 0).any(dim=1)
    assert sent.any()
    assert not sent.all()
    with as_exported(form):
        found = layer(x, GOOD)
    found, expected = found.flatten(0, 1), expected.flatten(0, 1)
    assert not found[sent].isfinite().any()
    torch.testing.assert_close(found[~sent], expected[~sent])


@both_forms
@pytest.mark.parametrize("masked", [False, True])
def test_a_runtime_that_does_not_look_at_indices_answers_nan(form, masked, monkeypatch):
    monkeypatch.setattr("dmoe_layer.attributes.assert_in_program", lambda *_: None)

    def unchecked(tensor, dim, index):
        return torch.gather_rows(tensor, dim, index.clamp(max=tensor.shape[dim] - 1))

    monkeypatch.setattr(torch, "gather_rows", torch.Tensor.index_select, raising=False)
    monkeypatch.setattr(torch.Tensor, "index_select", unchecked)
    if masked:
        original = torch.Tensor.gather
        monkeypatch.setattr(
            torch.Tensor, "gather", lambda t, d, i: original(t, d, i.clamp(max=t.shape[d] - 1))
        )
    layer, x = make_quiet().eval(), make_x()
    mask = torch.ones(4, T, dtype=torch.bool)
    options = {"mask": mask} if masked else {}
    for wrong in (-1, A):
        with as_exported(form):
            found = layer(x, torch.tensor([0, wrong, 1, 2]), **options)
        assert found[1].isnan().all()
        others = [0, 2, 3]
        expected = layer(x, torch.tensor([0, 0, 1, 2]), **options)
        torch.testing.assert_close(found[others], expected[others])


@pytest.mark.parametrize("unknown", ["average", "learned"])
@both_forms
def test_unknown_takes_its_own_row_and_what_is_no_value_is_refused(form, unknown):
    layer, x = make_quiet(unknown=unknown).eval(), make_x()
    attributes = torch.tensor([0, -1, 2, -1])
    with as_exported(form):
        torch.testing.assert_close(layer(x, attributes), layer(x, attributes))
        found = layer(x, attributes)
        for wrong in (-2, A):
            with pytest.raises(RuntimeError, match=rf"out of range, expected -1 \.\. {A - 1} "):
                layer(x, torch.tensor([0, wrong, 1, 2]))
    torch.testing.assert_close(found, layer(x, attributes))


def test_each_of_several_attributes_is_named():
    layer, x = make_quiet(attribute_sizes=(3, 2)).eval(), make_x()
    wrong = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 0]])
    with as_exported("sparse"), pytest.raises(RuntimeError) as caught:
        layer(x, wrong)
    assert "attributes[:, 1]: got a value out of range, expected 0 .. 1" in str(caught.value)


@both_forms
def test_under_autocast_it_routes_in_fp32(form):
    layer, x = eval_layer(), torch.randn(3, 7, 16)
    attributes = torch.tensor([0, 2, 1])
    with torch.autocast("cpu", torch.bfloat16):
        expected, routed = layer(x, attributes, return_routing=True)
        with as_exported(form):
            found, program = layer(x, attributes, return_routing=True)
    assert (found.dtype, program.gates.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(program.logits, routed.logits)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_in_training_noise_and_dropout_are_drawn_at_each_call():
    layer, x = DMoE(6, n_experts=E, attribute_sizes=A, dropout=0.5), make_x(tokens=50)
    with as_exported("sparse"):
        first, second = layer(x, GOOD, return_routing=True), layer(x, GOOD, return_routing=True)
    assert not torch.equal(first[1].logits, second[1].logits)
    quiet = DMoE(6, n_experts=E, attribute_sizes=A, dropout=0.5, k=E, noise="never")
    with as_exported("sparse"):
        assert not torch.equal(quiet(x, GOOD), quiet(x, GOOD))
    with as_exported("dense"), pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        layer(x, GOOD)


def form_of(layer, x, attributes=GOOD):
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for form in ("sparse", "dense"):
            original = getattr(aten, f"_{form}")
            patch.setattr(
                aten, f"_{form}", lambda *a, form=form, f=original: taken.append(form) or f(*a)
            )
        with as_exported("auto"):
            layer(x, attributes)
    return taken


def test_few_tokens_of_narrow_experts_and_tokens_that_take_all_are_computed_densely():
    weights = 2 * E * 6 * 5
    most = aten.DENSE_MULTIPLY_ADDS // weights // 4
    assert form_of(make_quiet(), make_x(tokens=most)) == ["dense"]
    assert form_of(make_quiet(), make_x(tokens=most + 1)) == ["sparse"]
    assert form_of(make_quiet(k=E), make_x(tokens=most + 1)) == ["dense"]


def test_a_form_that_was_asked_for_holds_inside_and_no_longer():
    layer, x = make_quiet(), make_x()
    with aten.expert_form("dense"):
        with aten.expert_form("sparse"):
            assert aten._form.chosen == "sparse"
        assert aten._form.chosen == "dense"
    assert form_of(layer, x, OTHER) == ["dense"]  # by the rule
    with as_exported("sparse"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "_dense", None)
        layer(x, GOOD)
