"""Gated experts and quick_gelu by the Triton kernels, narrow and wide, equal the naive loop."""

import math

import pytest
import torch
from harness.kernels import (
    CALL,
    HERE,
    OPTIONS,
    assert_same_rows,
    check_all,
    expert_tiles,
    pair,
)
from harness.saved import gradients_and_largest_saved

from dmoe_layer import backend
from dmoe_layer.fused import experts, narrow, wide
from dmoe_layer.fused.call import draw_kept

pytestmark = pytest.mark.usefixtures("poisoned")

# Small, since the interpreter runs one program after the other.
SMALL = {"n_experts": 2, "k": 1}
ONE = {"batch": 2, "values": [[1], [2]], "tokens": 17}
CASES = {
    "narrow, in slices": ({**SMALL, "dim": 20, "hidden_dim": 40}, ONE),
    "narrow, odd": (
        {"dim": 5, "hidden_dim": 7, "n_experts": 3, "bias": False}, {**ONE, "masked": True}
    ),
    "wide in backward": ({**SMALL, "dim": 40, "hidden_dim": 20}, {**ONE, "training": False}),
    "wide": ({**SMALL, "dim": 130, "hidden_dim": 35, "dropout": 0.5}, ONE),
    "wide, without biases": (
        {**SMALL, "dim": 129, "hidden_dim": 5, "bias": False}, {**ONE, "masked": True}
    ),
}  # fmt: skip


def check(case, activation, dtype):
    options, call = CASES[case]
    check_all({**OPTIONS, **options, "activation": activation}, {**CALL, **call}, dtype)


@pytest.mark.parametrize("case", CASES)
def test_kernels_of_gated_experts_equal_the_naive_loop(case):
    check(case, "swiglu", torch.float32)


@pytest.mark.parametrize("activation", ["quick_gelu", "geglu", "geglu_tanh"])
@pytest.mark.parametrize("case", ["narrow, odd", "wide, without biases"])
def test_kernels_of_every_new_activation_equal_the_naive_loop(case, activation):
    check(case, activation, torch.float32)


@pytest.mark.parametrize("case", ["narrow, in slices", "wide"])
@pytest.mark.parametrize(
    ("activation", "dtype"),
    [("swiglu", torch.bfloat16), ("geglu", torch.float16), ("quick_gelu", torch.bfloat16)],
)
def test_low_precision_kernels_equal_the_naive_loop(activation, dtype, case):
    check(case, activation, dtype)


@pytest.mark.parametrize("case", ["narrow, in slices", "narrow, odd"])
def test_gradients_in_registers_equal_the_naive_loop_in_fp32_too(case, monkeypatch):
    # Compiled, they would spill in fp32, so that they are never computed so; but formulas show.
    monkeypatch.setattr(narrow, "fuses_backward", lambda *_: True)
    check(case, "swiglu", torch.float32)


@pytest.mark.parametrize(("dim", "dtype"), [(24, torch.bfloat16), (40, torch.float32)])
def test_gated_rows_in_many_tiles_and_chunks_equal_the_naive_loop(dim, dtype, monkeypatch):
    for module in (narrow, wide):
        monkeypatch.setattr(module, "PROGRAMS", 2**30)
    few = {**SMALL, "dim": dim, "hidden_dim": 40 if dim == 24 else 8, "activation": "swiglu"}
    call = {"batch": 1, "values": [[2]], "tokens": 250, "seed": 1}
    check_all({**OPTIONS, **few}, {**CALL, **call}, dtype)


def test_gated_hidden_layers_a_segment_at_a_time_equal_the_naive_loop(monkeypatch):
    monkeypatch.setattr(wide, "LEAST_ROWS", 20)
    monkeypatch.setattr(experts, "keeps_hidden", lambda *_: False)
    seen, original = [], wide.segments

    def spy(call, at_once):
        seen.append(list(original(call, at_once)))
        return seen[-1]

    monkeypatch.setattr(wide, "segments", spy)
    # Rows are fewer than x has numbers for each of both halves' 2 · 50 of a row.
    options = {"dim": 130, "hidden_dim": 50, "n_experts": 2, "activation": "geglu"}
    check_all({**OPTIONS, **options}, {**CALL, **ONE}, torch.float32)
    assert [len(segments) for segments in seen] == [2, 2]


@pytest.mark.parametrize("dim", [16, 136])
def test_the_operators_of_gated_experts_pass_opcheck(dim):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs of uninitialized outputs
    x, gates = torch.randn(9, dim, device=HERE), torch.rand(9, 1, device=HERE)
    order = torch.randperm(9, device=HERE).to(torch.int32)
    shapes = ((2, 12, dim), (2, 12), (2, dim, 6), (2, dim))
    weights = [torch.randn(s, device=HERE) for s in shapes]
    kept = draw_kept(order, dim, 0.1, torch.tensor(2**50))
    options = ("swiglu", 0.1, kept, torch.float32)
    floats = [t.requires_grad_() for t in (x, gates, *weights)]
    inputs, keep = (floats[0], order, *expert_tiles([4, 5]), *floats[1:]), dim == 136
    # Without the check by torch.compile, which is no other for gated experts and slow.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(experts._fused_experts, (*inputs, *options, keep), test_utils=checks)
    y, hidden = (t.detach() for t in experts._fused_experts(*inputs, *options, keep))
    assert hidden.shape == ((9, 12) if keep else (0,))
    inputs = tuple(t.detach() for t in inputs)
    backward = (y, hidden, *inputs, *options, True, True)
    torch.library.opcheck(experts.fused_experts_backward, backward, test_utils=checks)


@pytest.mark.parametrize("dim", [16, 136])
def test_in_eval_a_sample_depends_on_no_batch_mate_nor_on_its_nans(dim):
    layer, _ = pair(dim=dim, activation="swiglu", n_experts=2, k=1, hidden_dim=6)
    layer.eval()
    x, a = torch.randn(2, 17, dim, device=HERE), torch.tensor([0, 2], device=HERE)
    clean = layer(x, a)
    assert_same_rows(layer(x[1:], a[1:])[0], clean[1])
    x[0, 2, 3] = math.nan
    x.requires_grad_()
    y = layer(x, a)
    assert torch.isnan(y[0, 2]).all()
    assert_same_rows(y[1], clean[1])
    y[1].sum().backward()
    assert torch.isfinite(x.grad[1]).all()


def test_kept_halves_give_the_same_as_halves_computed_again(monkeypatch):
    layer, _ = pair(dim=136, n_experts=2, attribute_sizes=None, activation="geglu_tanh")
    x = torch.randn(1, 20, 136, device=HERE, requires_grad=True)
    found, kept = gradients_and_largest_saved(layer, x)
    assert kept == 2 * 20 * 48
    bits = 2 * 20 * 5  # words of dropout's bits
    monkeypatch.setattr(experts, "keeps_hidden", lambda *_: False)
    again, kept = gradients_and_largest_saved(layer, x)
    assert kept == bits
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "dim", "dtype", "words"),
    [
        ("swiglu", 32, torch.bfloat16, "narrow, so that the hidden layer stays in registers"),
        ("swiglu", 33, torch.bfloat16, "registers, except in backward"),
        ("swiglu", 24, torch.float32, "registers, except in backward"),
        ("swiglu", 33, torch.float32, "is wide"),
        ("swiglu", 128, torch.float16, "registers, except in backward"),
        ("quick_gelu", 64, torch.bfloat16, "stays in registers"),
    ],
)
def test_explain_says_that_gated_experts_leave_registers_sooner(activation, dim, dtype, words):
    layer, _ = pair(dim=dim, activation=activation, dtype=dtype)
    x = torch.randn(2, 16, dim, device=HERE, dtype=dtype)
    assert backend.explain(layer, x).endswith(words) or words == "is wide"
    assert words in backend.explain(layer, x)


@pytest.mark.parametrize("dim", [8, 40, 136])
def test_biases_whose_product_overflows_leave_no_nan_where_every_row_is_small(dim):
    options = {"activation": "swiglu", "hidden_dim": 16, "dropout": 0.0, "noise": "never"}
    layer, _ = pair(**SMALL, **options, dim=dim, dtype=torch.float16, attribute_sizes=None)
    with torch.no_grad():
        layer.w1_EHD.fill_(-300 / dim)
        layer.w1_bias.fill_(300.0)  # 300 · 300 is no number of fp16
    layer(torch.ones(1, 20, dim, dtype=torch.float16, device=HERE)).sum().backward()
    assert layer.w2_EDH.grad.isfinite().all()
