"""Output and every gradient equal the naive loop, for random configurations and every dtype."""

import copy
import math
from functools import partial
from itertools import accumulate

import naive
import pytest
import torch
from harness.exactness import (
    assert_close,
    configurations,
    run_both,
)
from hypothesis import given, settings
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity

from dmoe_layer import DMoE
from dmoe_layer.eager import dispatch, experts, gemm


@settings(max_examples=150)
@given(configurations())
def test_double_precision_equals_the_naive_loop(configuration):
    options, call = configuration
    original, dispatch.BLOCK_ROWS = dispatch.BLOCK_ROWS, call["block_rows"]
    try:
        pairs = run_both(options, call, torch.float64)
    finally:
        dispatch.BLOCK_ROWS = original
    for what, (found, true) in pairs.items():
        assert_close(found, true, torch.float64, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", sorted(naive.ACTIVATIONS))
@pytest.mark.parametrize("masked", [False, True])
def test_lower_precision_equals_the_naive_loop(dtype, activation, masked):
    options = {
        "dim": 24,
        "hidden_dim": 40,
        "n_experts": 8,
        "k": 2,
        "attribute_sizes": 3,
        "unknown": "error",
        "activation": activation,
        "bias": True,
        "noise": "train",
        "dropout": 0.1,
        "residual": False,
    }
    call = {
        "batch": 3,
        "tokens": 21,
        "values": [[0], [2], [2]],
        "training": True,
        "masked": masked,
        "seed": 5,
    }
    for what, (found, true) in run_both(options, call, dtype).items():
        assert_close(found, true, dtype, what)


def test_gradcheck_of_the_whole_layer():
    layer = DMoE(4, n_experts=3, k=2, attribute_sizes=(2, 2), activation="silu", hidden_dim=5)
    layer = layer.double()
    attributes = torch.tensor([[0, 1], [1, 1]])
    names = [n for n, _ in layer.named_parameters()]

    def run(x, *parameters):
        torch.manual_seed(0)  # the same noise and dropout in every evaluation
        params = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, params, (x, attributes))

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("needs", ["x", "experts", "router"])
def test_only_what_is_not_frozen_gets_a_gradient_and_it_is_the_same(needs):
    layer = DMoE(6, attribute_sizes=2, hidden_dim=8, dropout=0.0, noise="never").double()
    x, attributes = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([0, 1])
    full_x = x.clone().requires_grad_()
    layer(full_x, attributes).square().sum().backward()
    full = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(needs == ("router" if "router" in name else "experts"))
    some_x = x.clone().requires_grad_(needs == "x")
    layer(some_x, attributes).square().sum().backward()
    if needs == "x":
        torch.testing.assert_close(some_x.grad, full_x.grad)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, full[name])
        else:
            assert parameter.grad is None


def test_second_derivatives_are_refused_in_words():
    layer = DMoE(4, attribute_sizes=2, noise="never")
    x = torch.randn(2, 3, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x, 0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        dx.sum().backward()


def eval_layer(**options):
    return DMoE(16, attribute_sizes=3, **options).eval()


def test_in_eval_a_sample_does_not_depend_on_its_batch_mates():
    layer, x, a = eval_layer(), torch.randn(6, 11, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    together = layer(x, a)
    alone = torch.cat([layer(x[i : i + 1], a[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
    if torch.backends.mkl.is_available():  # whose GEMMs keep a row's bits: see eager/gemm.py
        assert torch.equal(alone, together)


def test_permuting_tokens_permutes_the_output():
    layer, x, order = eval_layer(), torch.randn(2, 50, 16), torch.randperm(50)
    torch.testing.assert_close(layer(x[:, order], 1), layer(x, 1)[:, order], rtol=1e-6, atol=1e-6)


def test_all_tokens_to_one_expert_and_idle_experts_get_zero_gradients():
    layer = eval_layer(n_experts=4, k=1)
    with torch.no_grad():
        layer.router.w_A2ED.zero_()
        layer.router.b_A2E.copy_(torch.tensor([0.0, 9.0, 0.0, 0.0]))
    x = torch.randn(2, 7, 16)
    y, routing = layer(x, 0, return_routing=True)
    assert (routing.expert_indices == 1).all()
    h = torch.relu(x @ layer.w1_EHD[1].mT + layer.b1_EH[1])
    torch.testing.assert_close(y, h @ layer.w2_EDH[1].mT + layer.b2_ED[1], rtol=1e-5, atol=1e-6)
    y.sum().backward()
    for parameter in (layer.w1_EHD, layer.b1_EH, layer.w2_EDH, layer.b2_ED):
        assert parameter.grad[1].abs().sum() > 0
        assert not parameter.grad[[0, 2, 3]].any()
    assert not layer.router.w_A2ED.grad[1:].any()


def test_with_all_experts_chosen_the_output_is_the_softmax_mixture():
    layer, x = eval_layer(n_experts=3, k=3), torch.randn(1, 5, 16)
    y, routing = layer(x, 2, return_routing=True)
    every = [
        torch.relu(x[0] @ layer.w1_EHD[e].mT + layer.b1_EH[e]) @ layer.w2_EDH[e].mT + layer.b2_ED[e]
        for e in range(3)
    ]
    gates = routing.logits.softmax(dim=-1)
    mixture = sum(gates[:, e, None] * every[e] for e in range(3))
    torch.testing.assert_close(y[0], mixture, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 16), (3, 0, 16), (0, 0, 16), (3, 16), (1, 1, 16)])
def test_empty_and_tiny_batches_run_forward_and_backward(shape):
    layer, x = eval_layer().train(), torch.randn(shape, requires_grad=True)
    y = layer(x, torch.zeros(shape[0], dtype=torch.int64))
    assert y.shape == shape
    y.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters())


def test_a_mask_that_keeps_nothing_gives_zero_and_zero_gradients():
    layer, x = eval_layer().train(), torch.randn(2, 4, 16, requires_grad=True)
    y = layer(x, 0, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert not y.any()
    y.sum().backward()
    assert not x.grad.any()


def test_the_mask_gives_the_same_as_computing_the_kept_tokens_alone():
    layer, x = eval_layer(), torch.randn(3, 9, 16)
    mask, a = torch.rand(3, 9) < 0.4, torch.tensor([2, 0, 1])
    y = layer(x, a, mask=mask)
    for b in range(3):
        alone = layer(x[b : b + 1, mask[b]], a[b])
        torch.testing.assert_close(y[b, mask[b]], alone[0], rtol=1e-6, atol=1e-6)
    assert not y[~mask].any()
    residual = eval_layer(residual=True)
    assert torch.equal(residual(x, a, mask=mask)[~mask], x[~mask])


@pytest.mark.parametrize("residual", [False, True])
def test_nan_outside_the_mask_reaches_nothing(residual):
    layer = DMoE(8, attribute_sizes=2, residual=residual)
    x, mask = torch.randn(2, 6, 8), torch.rand(2, 6) < 0.5
    results = []
    for fill in (0.0, math.nan, math.inf):
        layer.zero_grad()
        torch.manual_seed(0)
        spoiled = x.masked_fill(~mask[..., None], fill).requires_grad_()
        y, routing = layer(spoiled, torch.tensor([0, 1]), mask=mask, return_routing=True)
        (y[mask].square().sum() + routing.logits.square().sum()).backward()
        results.append(
            [y[mask], routing.logits, spoiled.grad, *(p.grad for p in layer.parameters())]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_nan_in_one_sample_stays_in_that_sample():
    layer, x, a = eval_layer(), torch.randn(3, 5, 16), torch.tensor([0, 1, 2])
    clean = layer(x, a)
    x[1, 2, 3] = math.nan
    x.requires_grad_()
    y = layer(x, a)
    assert torch.isnan(y[1, 2]).all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    y[[0, 2]].sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()
    assert torch.isfinite(layer.router.w_A2ED.grad[[0, 2]]).all()


def test_noise_is_normal_and_scaled_by_the_softplus_of_its_own_scores():
    layer = DMoE(4, n_experts=2, k=1)
    x = torch.randn(1, 1, 4).expand(1, 200_000, 4)
    _, routing = layer(x, return_routing=True)
    clean, noise = (
        (layer.router.w_A2ED[0, i] @ x[0, 0] + layer.router.b_A2E[0, i]).detach() for i in (0, 1)
    )
    z = (routing.logits.detach() - clean) / torch.nn.functional.softplus(noise)
    assert z.mean().abs() < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z.abs() < 1).float().mean() - 0.6827) < 0.01


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_the_share_p_of_the_entries_and_keeps_the_mean(p):
    layer = DMoE(32, n_experts=2, k=1, dropout=p, noise="never")
    x = torch.randn(1, 1, 32).expand(1, 20_000, 32)
    y, kept = layer(x)[0], layer.eval()(x)[0, 0]
    dropped = (y == 0).float().mean()
    assert abs(dropped - p) < 0.005
    torch.testing.assert_close(
        y.max(dim=0).values.abs() + y.min(dim=0).values.abs(),
        kept.abs() / (1 - p),
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("noise", "in_train", "in_eval"),
    [("train", True, False), ("always", True, True), ("never", False, False)],
)
def test_noise_modes(noise, in_train, in_eval):
    layer, x = DMoE(8, noise=noise, dropout=0.0), torch.randn(1, 20, 8)
    assert (not torch.equal(layer(x), layer(x))) == in_train
    layer.eval()
    assert (not torch.equal(layer(x), layer(x))) == in_eval


def test_the_seed_decides_noise_and_dropout():
    layer, x = DMoE(8), torch.randn(1, 20, 8)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


def test_deterministic_algorithms_are_honoured():
    layer, x = DMoE(8, attribute_sizes=2), torch.randn(2, 30, 8, requires_grad=True)
    # Refuses operators that are not deterministic, and fills torch.empty with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            torch.manual_seed(0)
            mask = torch.ones(2, 30, dtype=torch.bool)
            y = layer(x, torch.tensor([0, 1]), mask=mask)
            grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.isfinite(g).all() for g in grads[0])


@pytest.mark.parametrize("attribute_sizes", [None, 3])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("shape", "channel_dim", "masked"),
    [((2, 2048, 64), -1, False), ((2, 2048, 64), -1, True), ((4096, 64), -1, False),
     ((2, 64, 32, 64), 1, False)],
    ids=["tokens", "masked", "one token a sample", "channels first"],
)  # fmt: skip
def test_what_is_saved_for_backward_is_about_x(
    shape, channel_dim, masked, autocast, attribute_sizes
):
    layer = DMoE(64, attribute_sizes=attribute_sizes, channel_dim=channel_dim)
    x = torch.randn(shape, requires_grad=True)
    mask = torch.ones(shape[:-1], dtype=torch.bool) if masked else None
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:1] != (layer.n_experts,):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        y = layer(x, None if attribute_sizes is None else 0, mask=mask)
    # x itself; then 12 bytes for each of 2 slots a token: an index and a gate, beside 4·64 of x.
    assert sum(saved.values()) <= 1.2 * x.nbytes
    y.sum().backward()


def test_functional_derivatives_are_refused_in_words():
    layer, x = eval_layer(), torch.randn(1, 3, 16)

    def run(x):
        return layer(x, 0).sum()

    for derivative in (
        lambda: torch.func.jvp(run, (x,), (x,)),
        lambda: torch.func.jacfwd(run)(x),
        lambda: torch.func.grad(run)(x),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func's derivatives"):
            derivative()
    layer.requires_grad_(False)  # then autograd has no say, and the tangent would be lost
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        layer(forward_ad.make_dual(x, x), 0)
    head = torch.nn.Linear(16, 1)
    with torch.no_grad():
        features = layer(x, 0)
    call = partial(torch.func.functional_call, head)
    grads = torch.func.grad(lambda p: call(p, features).sum())(dict(head.named_parameters()))
    assert grads["weight"].any()


def test_a_sample_of_few_tokens_keeps_its_bits_beside_longer_ones():
    plain, layer = DMoE(16).eval(), eval_layer()
    x, a = torch.randn(5, 40, 16), torch.tensor([0, 1, 2, 0, 1])
    mask = torch.ones(5, 40, dtype=torch.bool)
    mask[0, 3:] = False
    pairs = (
        (plain(x[:1, :1]), plain(x[:, :1])[:1]),
        (layer(x[:1], a[:1], mask=mask[:1]), layer(x, a, mask=mask)[:1]),
    )
    for alone, together in pairs:
        torch.testing.assert_close(alone, together, rtol=1e-6, atol=1e-6)
        if torch.backends.mkl.is_available():
            assert torch.equal(alone, together)


def grads_of(layer, x):
    """Output and gradients, and the numbers beside x and the parameters that backward found."""
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])], max(kept.values())


@pytest.mark.parametrize("activation", sorted(naive.ACTIVATIONS))
def test_a_kept_hidden_layer_gives_the_same_as_one_computed_again(activation, monkeypatch):
    layer = DMoE(128, hidden_dim=160, n_experts=3, activation=activation, noise="never")
    x = torch.randn(2, 100, 128, requires_grad=True)
    monkeypatch.setattr(dispatch, "BLOCK_ROWS", 40)
    found, kept = grads_of(layer, x)
    assert kept == 2 * 200 * 160
    monkeypatch.setattr(experts, "keeps_hidden", lambda *_: False)
    again, kept = grads_of(layer, x)
    assert kept <= 2 * 200
    for a, b in zip(found, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dim", "tokens", "keeps"), [(128, 500, True), (128, 520, False), (96, 40, False)]
)
def test_the_hidden_layer_is_kept_where_it_is_wide_and_no_larger_than_weights_and_gradients(
    dim, tokens, keeps
):
    layer = DMoE(dim, n_experts=2, k=2, noise="never")
    _, kept = grads_of(layer, torch.randn(1, tokens, dim, requires_grad=True))
    assert (kept == 2 * tokens * 4 * dim) == keeps


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_no_hidden_layer_is_kept(mode, monkeypatch):
    calls, original = [], experts._experts
    monkeypatch.setattr(experts, "_experts", lambda *a: calls.append(a[-1]) or original(*a))
    layer, x = DMoE(128), torch.randn(1, 9, 128)
    with mode():
        layer(x)
    layer.requires_grad_(False)(x)
    assert calls == [False, False]
    layer.requires_grad_(True)(x)
    assert calls[2]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize(("inner", "out"), [(16, 64), (24, 96), (96, 24), (200, 40), (768, 192)])
@pytest.mark.parametrize("rows", [16, 80, 1024])
def test_onednns_products_are_exact_and_keep_a_rows_bits(inner, out, rows):
    x, w, b = torch.randn(rows + 64, inner), torch.randn(out, inner), torch.randn(out)
    true = (x.double() @ w.double().mT + b.double()).relu()
    for weight in (w, w.mT.contiguous().mT):
        assert gemm._by_onednn(x, weight) == gemm.ONEDNN_KEEPS_BITS
        y = gemm.linear(x, weight, b, relu=True)
        assert_close(y, true, torch.float32, "linear")
        assert torch.equal(gemm.linear(x[7 : 7 + rows], weight, b, relu=True), y[7 : 7 + rows])
    x[0, 0] = math.nan
    assert torch.isnan(gemm.linear(x, w, b, relu=True)[0]).all()
    g, x = torch.randn(rows, out), x[64:]
    dw = gemm.sum_of_products(g, x[:rows])
    assert_close(dw, g.double().mT @ x[:rows].double(), torch.float32, "dw")


def test_without_onednn_the_layer_gives_the_same():
    layer, x = DMoE(24, noise="never"), torch.randn(2, 300, 24, requires_grad=True)
    found, _ = grads_of(layer, x)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not gemm._by_onednn(layer.w1_EHD[0], layer.w1_EHD[0])
        other, _ = grads_of(layer, x)
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_rows_of_padded_blocks_are_few_sizes_and_little_more():
    for rows in range(1, 10_000):
        assert rows <= gemm.round_rows(rows) <= max(rows + 15, rows * 33 / 32)
        assert gemm.round_rows(rows) % 16 == 0
    assert len({gemm.round_rows(rows) for rows in range(4097, 8193)}) == 32


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_a_nan_in_one_expert_reaches_no_gradient_of_the_other(spoiled, keep, monkeypatch):
    monkeypatch.setattr(dispatch, "BLOCK_ROWS", 50)
    monkeypatch.setattr(experts, "keeps_hidden", lambda *_: keep)
    layer, x = DMoE(128, n_experts=2, k=1, noise="never"), torch.randn(1, 301, 128)
    with torch.no_grad():
        layer.b1_EH[spoiled] = math.nan
    y, routing = layer(x, return_routing=True)
    assert len(routing.expert_indices.unique()) == 2
    y.sum().backward()
    for parameter in (layer.w1_EHD, layer.b1_EH, layer.w2_EDH, layer.b2_ED):
        assert torch.isfinite(parameter.grad[1 - spoiled]).all()
    assert torch.isnan(layer.w2_EDH.grad[spoiled]).all()


class BooleanMaskLoop(torch.nn.Module):
    """Noisy top-2 routing with one router, and its experts one by one over the tokens of a mask."""

    def __init__(self, d, n_experts=8):
        super().__init__()
        Linear, ModuleList = torch.nn.Linear, torch.nn.ModuleList
        self.router = ModuleList(Linear(d, n_experts) for _ in range(2))
        parts = Linear(d, 4 * d), torch.nn.ReLU(), Linear(4 * d, d), torch.nn.Dropout(0.1)
        expert = torch.nn.Sequential(*parts)
        self.experts = ModuleList(copy.deepcopy(expert) for _ in range(n_experts))

    def forward(self, x):
        x_TD = x.flatten(0, 1)
        clean, noise = (linear(x_TD) for linear in self.router)
        logits = clean + torch.randn_like(clean) * torch.nn.functional.softplus(noise)
        scores, indices = logits.topk(2)
        gates = torch.full_like(logits, -torch.inf).scatter(-1, indices, scores).softmax(-1)
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            mask = (indices == e).any(-1)
            y_TD[mask] += expert(x_TD[mask]) * gates[mask, e, None]
        return y_TD.view_as(x)


def peak_memory(layer, x):
    """The most bytes that a forward and backward held at a time, beside x and the parameters."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(x).sum().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def test_the_peak_memory_of_a_volume_is_a_quarter_of_a_boolean_mask_loops():
    x = torch.randn(2, 131072, 24, requires_grad=True)
    loop, layer = (peak_memory(kind(24), x) for kind in (BooleanMaskLoop, DMoE))
    assert layer <= 0.25 * loop
