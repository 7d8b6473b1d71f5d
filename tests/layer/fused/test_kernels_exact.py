"""The Triton backend equals the naive loop, in Triton's interpreter or on a GPU."""

import subprocess
import sys

import pytest
import torch
from harness.kernels import CALL, HERE, OPTIONS, check_all, pair

from dmoe_layer.fused import experts, narrow, router, wide

pytestmark = pytest.mark.usefixtures("poisoned")

TWO = {"attribute_sizes": (3, 2), "unknown": "learned"}
TWO_VALUES = {"values": [[0, 1], [-1, 0], [2, -1]]}
CASES = {
    "plain": ({"attribute_sizes": None}, {}),
    "the paper's": ({}, {}),
    "one number wide": ({"dim": 1, "hidden_dim": 1, "n_experts": 1, "k": 1}, {}),
    "odd widths": ({"dim": 5, "hidden_dim": 7, "n_experts": 3, "bias": False}, {"masked": True}),
    "two attributes": ({**TWO, "activation": "gelu"}, {**TWO_VALUES, "masked": True}),
    "average, noise in eval": (
        {**TWO, "unknown": "average", "noise": "always"}, {**TWO_VALUES, "training": False}
    ),
    "many experts": ({"dim": 9, "hidden_dim": 20, "n_experts": 64, "k": 8}, {}),
    "nine experts, three chosen": ({"n_experts": 9, "k": 3, "activation": "silu"}, {}),
    "half dropped": ({"dropout": 0.5, "noise": "never", "residual": True}, {}),
    "all dropped": ({"dropout": 1.0}, {}),
    "eval": ({"activation": "gelu_tanh"}, {"training": False}),
    "narrow, in slices": ({"dim": 30, "hidden_dim": 100}, {"batch": 2, "values": [[1], [2]]}),
    "wide": ({"dim": 130, "hidden_dim": 70}, {"batch": 2, "values": [[1], [2]]}),
    "wide, gelu": (
        {"dim": 136, "hidden_dim": 150, "n_experts": 3, "activation": "gelu", "bias": False},
        {"batch": 2, "values": [[1], [2]], "masked": True},
    ),
    "no samples": ({}, {"batch": 0, "values": []}),
    "wide, no samples": ({"dim": 130, "hidden_dim": 8}, {"batch": 0, "values": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_naive_loop(case):
    options, call = CASES[case]
    check_all({**OPTIONS, **options}, {**CALL, **call}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["the paper's", "two attributes", "wide"])
def test_kernels_in_low_precision_equal_the_naive_loop(case, dtype):
    options, call = CASES[case]
    check_all({**OPTIONS, **options}, {**CALL, **call}, dtype)


@pytest.mark.parametrize("dim", [24, 130])
def test_rows_in_many_tiles_and_chunks_equal_the_naive_loop(dim, monkeypatch):
    # So few experts, so many tokens and so small chunks that an expert has several chunks, and a
    # chunk several tiles.
    for module in (narrow, wide):
        monkeypatch.setattr(module, "PROGRAMS", 2**30)
    if dim == 24:  # the narrow kernels, which in fp32 would be left to the wide ones
        monkeypatch.setattr(narrow, "fuses_backward", lambda *_: True)
    monkeypatch.setattr(router, "CHUNKS", 2)
    few = {"dim": dim, "hidden_dim": 40 if dim == 24 else 8, "n_experts": 2, "k": 1}
    tokens = 200 if dim == 24 else 700
    call = {"batch": 2, "values": [[0], [2]], "tokens": tokens, "seed": 1}
    check_all({**OPTIONS, **few}, {**CALL, **call}, torch.float32)


@pytest.mark.parametrize(("dim", "activation"), [(30, "relu"), (136, "gelu")])
def test_hidden_layers_a_segment_at_a_time_equal_the_naive_loop(dim, activation, monkeypatch):
    monkeypatch.setattr(wide, "LEAST_ROWS", 30)
    monkeypatch.setattr(experts, "keeps_hidden", lambda *_: False)
    seen, original = [], wide.segments

    def spy(call, at_once):
        seen.append(list(original(call, at_once)))
        return seen[-1]

    monkeypatch.setattr(wide, "segments", spy)
    options = {"dim": dim, "hidden_dim": 200, "n_experts": 3, "activation": activation}
    check_all({**OPTIONS, **options}, {**CALL, "tokens": 30}, torch.float32)
    # Forward and backward; up to D = 32 only the latter has the hidden layer in memory.
    assert [len(segments) > 2 for segments in seen] == [True] * (2 if dim > 32 else 1)


@pytest.mark.parametrize("dim", [16, 136])
@pytest.mark.parametrize("trained", ["x", "w1_EHD", "w2_bias", "router.w_A2ED"])
def test_only_what_is_not_frozen_gets_a_gradient_and_it_is_the_same(dim, trained):
    layer, _ = pair(dim=dim, n_experts=2, noise="never", dropout=0.0)
    x, a = torch.randn(2, 18, dim, device=HERE, requires_grad=True), torch.tensor([0, 1])
    layer(x, a.to(HERE)).square().sum().backward()
    everything = {"x": x, **dict(layer.named_parameters())}
    full = {name: tensor.grad.clone() for name, tensor in everything.items()}
    for name, tensor in everything.items():
        tensor.grad = None
        tensor.requires_grad_(name == trained)
    layer(x, a.to(HERE)).square().sum().backward()
    for name, tensor in everything.items():
        assert (tensor.grad is not None) == (name == trained), name
    torch.testing.assert_close(everything[trained].grad, full[trained])


@pytest.mark.parametrize("dim", [16, 136])
def test_the_kernels_operators_pass_opcheck(dim):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs of uninitialized outputs
    x = torch.randn(2, 17, dim, device=HERE, requires_grad=True)
    w, b = torch.randn(3, 2, 4, dim, device=HERE), torch.randn(3, 2, 4, device=HERE)
    rows, seed = torch.tensor([[0], [2]], device=HERE), torch.tensor(2**50)
    route_inputs = (x, w.requires_grad_(), b.requires_grad_(), rows, None, 2, seed, True)
    torch.library.opcheck(router._fused_route, route_inputs)
    found = (t.detach() for t in router._fused_route(*route_inputs))
    _, _, gates, *pairs, chosen, slopes = found
    given = [t.detach() for t in (x, w, b)]
    grads = (torch.randn(34, 4, device=HERE), torch.randn(34, 2, device=HERE))
    torch.library.opcheck(
        router.fused_route_backward,
        (*grads, chosen, gates, slopes, *given, rows, None, torch.randn_like(given[0])),
    )
    shapes = ((4, 20, dim), (4, 20), (4, dim, 20), (4, dim))
    weights = [torch.randn(s, device=HERE, requires_grad=True) for s in shapes]
    options = ("gelu", 0.1, experts._draw_kept(pairs[0], dim, 0.1, seed), torch.float32)
    torch.library.opcheck(experts._draw_kept, (pairs[0], dim, 0.1, seed))
    tokens = x.detach().flatten(0, 1).requires_grad_()
    inputs = (tokens, *pairs, gates.requires_grad_(), *weights)
    keep = dim == 136
    torch.library.opcheck(experts._fused_experts, (*inputs, *options, keep))
    y, hidden = (t.detach() for t in experts._fused_experts(*inputs, *options, keep))
    inputs = tuple(t.detach() for t in inputs)
    torch.library.opcheck(
        experts.fused_experts_backward, (y, hidden, *inputs, *options, True, True)
    )


@pytest.mark.parametrize("api", ["allow_tf32", "fp32_precision"])
def test_tf32_is_taken_from_either_of_pytorchs_settings(api):
    # In a process of its own: reading the old setting after the new one was written is an error.
    def ask(value):
        code = (
            f"import torch; torch.backends.cuda.matmul.{api} = {value!r}\n"
            "from dmoe_layer.fused.launch import gemm_precision; "
            "print(gemm_precision(torch.float32), gemm_precision(torch.bfloat16))"
        )
        run = [sys.executable, "-c", code]
        return subprocess.run(run, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    if not hasattr(torch.backends.cuda.matmul, api):
        pytest.skip(f"this PyTorch has no {api}")
    yes, no = (True, False) if api == "allow_tf32" else ("tf32", "ieee")
    assert (ask(yes), ask(no)) == ("tf32 tf32x3", "tf32x3 tf32x3")
