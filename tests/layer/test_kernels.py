"""The Triton backend equals the naive loop, in Triton's interpreter or on a GPU."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from harness.exactness import TOLERANCE, assert_close, run_both
from helpers import masks_in_full_graphs
from monai.data import MetaTensor

from dmoe_layer import DMoE, backend, carry_routing, routing
from dmoe_layer.activations import ACTIVATIONS
from dmoe_layer.operators import draw_seed

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from dmoe_layer.fused import experts, narrow, router, wide  # noqa: E402
from dmoe_layer.fused.kernels import common  # noqa: E402
from dmoe_layer.fused.launch import block_size, launch  # noqa: E402

HERE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows that a test's own kernel takes at once: a GPU's compiler needs minutes for thousands.
BLOCK = 256


@pytest.fixture(autouse=True)
def _poisoned():
    """Fills torch.empty with NaN (integers with their largest), so that what is unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@triton.jit
def _noise_kernel(out_ptr, seed, n_experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    noise = common.normal_noise(seed, t, EXPERTS)
    at = t[:, None] * n_experts + e[None, :]
    tl.store(out_ptr + at, noise, mask=(e < n_experts)[None, :])


@triton.jit
def _kept_kernel(out_ptr, seed, threshold, dim, PAIRS: tl.constexpr, DIM: tl.constexpr):
    p = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    d = tl.arange(0, DIM)
    kept = common.kept(seed, p, 0, threshold, DIM).to(tl.float32)
    tl.store(out_ptr + p[:, None] * dim + d[None, :], kept, mask=(d < dim)[None, :])


def kernel_noise(noisy, tokens, n_experts, dtype):
    """What the routing kernel draws in the call that follows, (T, E)."""
    if not noisy:
        return None
    blocks, seed = -(-tokens // BLOCK), int(draw_seed())
    noise = torch.empty(blocks * BLOCK, n_experts, device=HERE)
    sizes = {"TOKENS": BLOCK, "EXPERTS": block_size(n_experts, 8)}
    launch(_noise_kernel, (blocks,), noise, noise, seed, n_experts, **sizes)
    return noise[:tokens].cpu()


def kernel_dropout(p, indices_TK, n_experts, dim, dtype):
    """The factors of dropout in the call that follows, (T, k, D)."""
    pairs, dropped, seed = indices_TK.numel(), round(p * 2**16), int(draw_seed())
    blocks = -(-pairs // BLOCK)
    kept = torch.empty(blocks * BLOCK, dim, device=HERE)
    sizes = {"PAIRS": BLOCK, "DIM": block_size(dim)}
    launch(_kept_kernel, (blocks,), kept, kept, seed, dropped, dim, **sizes)
    scale = 2**16 / (2**16 - dropped) if dropped < 2**16 else 1.0
    return kept[:pairs].cpu().to(dtype).view(*indices_TK.shape, dim) * scale


run_kernels = partial(run_both, device=HERE, noise=kernel_noise, dropout=kernel_dropout)

OPTIONS = {
    "dim": 24, "hidden_dim": None, "n_experts": 8, "k": 2, "attribute_sizes": 3,
    "unknown": "error", "activation": "relu", "bias": True, "noise": "train", "dropout": 0.1,
    "residual": False, "backend": "triton",
}  # fmt: skip
CALL = {
    "batch": 3, "tokens": 21, "values": [[0], [2], [2]], "training": True, "masked": False,
    "seed": 5,
}  # fmt: skip
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
    "narrow, in slices": ({"dim": 40, "hidden_dim": 100}, {"batch": 2, "values": [[1], [2]]}),
    "wide": ({"dim": 130, "hidden_dim": 70}, {"batch": 2, "values": [[1], [2]]}),
    "wide, gelu": (
        {"dim": 136, "hidden_dim": 150, "n_experts": 3, "activation": "gelu", "bias": False},
        {"batch": 2, "values": [[1], [2]], "masked": True},
    ),
    "no samples": ({}, {"batch": 0, "values": []}),
    "wide, no samples": ({"dim": 130, "hidden_dim": 8}, {"batch": 0, "values": []}),
}  # fmt: skip


def assert_same_rows(found, true):
    """Bits on a GPU; in the interpreter, whose GEMM is numpy's, what rounding allows."""
    if HERE == "cuda":
        assert torch.equal(found, true)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def check_all(options, call, dtype):
    for what, (found, true) in run_kernels(options, call, dtype).items():
        assert_close(found, true, dtype, what)


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
    monkeypatch.setattr(router, "CHUNKS", 2)
    few = {"dim": dim, "hidden_dim": 40 if dim == 24 else 8, "n_experts": 2, "k": 1}
    tokens = 200 if dim == 24 else 700
    call = {"batch": 2, "values": [[0], [2]], "tokens": tokens, "seed": 1}
    check_all({**OPTIONS, **few}, {**CALL, **call}, torch.float32)


def pair(**options):
    """A layer with the kernels, and the same with the eager backend."""
    ours = DMoE(**{"dim": 16, "hidden_dim": 24, "attribute_sizes": 3, **options}, backend="triton")
    eager = DMoE(**{"dim": 16, "hidden_dim": 24, "attribute_sizes": 3, **options}, backend="eager")
    eager.load_state_dict(ours.state_dict())
    return ours.to(HERE), eager.to(HERE)


@pytest.mark.parametrize("dim", [16, 136])
@pytest.mark.parametrize("attribute_sizes", [3, None])
def test_monais_metatensors_give_what_plain_tensors_give(dim, attribute_sizes):
    layer, _ = pair(dim=dim, attribute_sizes=attribute_sizes, channel_dim=1)
    plain, site = torch.randn(2, dim, 5, 4, device=HERE), torch.tensor([0, 2], device=HERE)
    found = []
    for image, a in ((plain, site), (MetaTensor(plain), MetaTensor(site))):
        image = image.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(1)
        with routing(a if attribute_sizes else None):
            y = layer(image)
        y.square().sum().backward()
        assert type(y) is type(image)
        found.append([torch.Tensor(t) for t in (y.detach(), image.grad)])
        found[-1] += [p.grad.clone() for p in layer.parameters()]
    assert all(torch.equal(*two) for two in zip(*found, strict=True))


def test_autocast_computes_in_its_dtype_and_keeps_that_of_x():
    ours, eager = (m.eval() for m in pair())
    x, a = torch.randn(2, 20, 16, device=HERE), torch.tensor([0, 2], device=HERE)
    with torch.autocast(HERE, dtype=torch.bfloat16):
        (y, r), true = ours(x, a, return_routing=True), eager(x, a)
    assert y.dtype == torch.float32
    assert r.gates.dtype == r.logits.dtype == torch.float32
    assert (y - true).abs().max() <= TOLERANCE[torch.bfloat16] * true.abs().max()
    assert not torch.allclose(y, ours(x, a), rtol=1e-4)  # it did compute in bf16


@pytest.mark.parametrize("dim", [16, 136])
def test_operators_pass_opcheck(dim):
    torch.use_deterministic_algorithms(False)  # opcheck compares runs of uninitialized outputs
    x = torch.randn(2, 17, dim, device=HERE, requires_grad=True)
    w, b = torch.randn(3, 2, 4, dim, device=HERE), torch.randn(3, 2, 4, device=HERE)
    rows, seed = torch.tensor([[0], [2]], device=HERE), torch.tensor(2**50)
    route_inputs = (x, w.requires_grad_(), b.requires_grad_(), rows, None, 2, seed)
    torch.library.opcheck(router._fused_route, route_inputs)
    _, indices, gates, order, offsets = (t.detach() for t in router._fused_route(*route_inputs))
    given = [t.detach() for t in (x, w, b)]
    grads = (torch.randn(34, 4, device=HERE), torch.randn(34, 2, device=HERE))
    torch.library.opcheck(
        router.fused_route_backward, (*grads, indices, gates, *given, rows, None, seed)
    )
    shapes = ((4, 20, dim), (4, 20), (4, dim, 20), (4, dim))
    weights = [torch.randn(s, device=HERE, requires_grad=True) for s in shapes]
    options = ("gelu", 0.1, seed, torch.float32)
    tokens = x.detach().flatten(0, 1).requires_grad_()
    inputs = (tokens, order, offsets, gates.requires_grad_(), *weights)
    keep = dim == 136
    torch.library.opcheck(experts._fused_experts, (*inputs, *options, keep))
    y, hidden = (t.detach() for t in experts._fused_experts(*inputs, *options, keep))
    inputs = tuple(t.detach() for t in inputs)
    torch.library.opcheck(
        experts.fused_experts_backward, (y, hidden, *inputs, *options, True, True)
    )


def test_pairs_are_sorted_by_expert_and_then_by_token():
    x = torch.randn(3, 200, 8, device=HERE)
    w, b = torch.randn(2, 2, 5, 8, device=HERE), torch.zeros(2, 2, 5, device=HERE)
    rows = torch.tensor([[0], [1], [0]], device=HERE)
    counts = torch.tensor([140, 0, 460], device=HERE)
    for tokens, per_sample in ((x, None), (x.flatten(0, 1), counts)):
        logits, indices, gates, order, offsets = router._fused_route(
            tokens, w, b, rows, per_sample, 3, None
        )
        assert torch.equal(order.long(), indices.flatten().argsort(stable=True))
        assert offsets.diff().tolist() == indices.flatten().bincount(minlength=5).tolist()
        top = logits.topk(3)
        assert torch.equal(indices, top.indices)
        torch.testing.assert_close(gates, top.values.softmax(dim=-1))


def test_scores_that_are_equal_infinite_or_nan_choose_k_different_experts():
    w = torch.zeros(1, 2, 6, 8, device=HERE)
    for bias in ([0.0] * 6, [-math.inf] * 6, [math.nan] * 6, [1, math.inf, -math.inf, 0, 1, 1],
                 [-1, -2, math.nan, -3, -4, -5], [-1, -2, -math.nan, -3, -4, -5]):  # fmt: skip
        b = torch.zeros(1, 2, 6, device=HERE)
        b[0, 0] = torch.tensor(bias)
        x = torch.zeros(1, 3, 8, device=HERE)
        logits, indices, gates, *_ = router._fused_route(x, w, b, None, None, 4, None)
        torch.testing.assert_close(logits[0], b[0, 0], equal_nan=True)
        assert all(len(set(row)) == 4 and max(row) < 6 for row in indices.tolist())
        top = logits.topk(4).values
        torch.testing.assert_close(logits.gather(1, indices), top, equal_nan=True)
        torch.testing.assert_close(gates, top.softmax(dim=-1), equal_nan=True)


def test_noise_is_normal():
    noise = kernel_noise(True, 2**15, 8, torch.float32).double()
    assert noise.mean().abs() < 0.01
    assert abs(noise.std() - 1) < 0.01
    for quantile in (0.001, 0.05, 0.3, 0.7, 0.95, 0.999):
        z = math.sqrt(2) * torch.erfinv(torch.tensor(2 * quantile - 1.0)).item()
        assert abs((noise < z).double().mean() - quantile) < 4 * math.sqrt(quantile / 2**18)
    # Neither neighbours nor tokens nor experts go together.
    assert torch.corrcoef(noise.T).sub(torch.eye(8)).abs().max() < 0.03
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_it_should_and_columns_are_independent(p):
    kept = kernel_dropout(p, torch.zeros(2**12, 2), 8, 24, torch.float64).view(-1, 24) > 0
    share = kept.double().mean()
    assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    assert torch.corrcoef(kept.double().T).sub(torch.eye(24)).abs().max() < 0.06


@pytest.mark.parametrize("dim", [16, 136])
def test_nan_in_one_sample_stays_in_that_sample(dim):
    layer, _ = pair(dim=dim)
    layer.eval()
    x, a = torch.randn(3, 17, dim, device=HERE), torch.tensor([0, 1, 2], device=HERE)
    clean = layer(x, a)
    x[1, 2, 3] = math.nan
    x.requires_grad_()
    y = layer(x, a)
    assert torch.isnan(y[1, 2]).all()
    assert_same_rows(y[[0, 2]], clean[[0, 2]])
    y[[0, 2]].sum().backward()
    assert torch.isfinite(x.grad[[0, 2]]).all()
    assert torch.isfinite(layer.router.w_A2ED.grad[[0, 2]]).all()


@pytest.mark.parametrize("dim", [16, 136])
def test_in_eval_a_sample_keeps_its_bits_beside_others(dim):
    layer, _ = pair(dim=dim)
    layer.eval()
    x, a = torch.randn(4, 19, dim, device=HERE), torch.tensor([0, 1, 2, 0], device=HERE)
    together = layer(x, a)
    for i in range(4):
        assert_same_rows(layer(x[i : i + 1], a[i : i + 1])[0], together[i])


@pytest.mark.parametrize("dim", [16, 136])
def test_the_same_seed_gives_the_same_bits_and_a_second_backward_the_same_gradient(dim):
    layer, _ = pair(dim=dim)
    x, a = torch.randn(2, 18, dim, device=HERE, requires_grad=True), torch.tensor([0, 1])
    inputs, grads = [x, *layer.parameters()], []
    for _ in range(2):
        torch.manual_seed(3)
        loss = layer(x, a.to(HERE)).square().sum()
        grads.append(torch.autograd.grad(loss, inputs, retain_graph=True))
    grads.append(torch.autograd.grad(loss, inputs))
    for other in grads[1:]:
        assert all(torch.equal(g, o) for g, o in zip(grads[0], other, strict=True))


def test_a_recomputed_block_gives_the_same_gradients():
    layer, _ = pair()
    x = torch.randn(2, 18, 16, device=HERE, requires_grad=True)
    grads = []
    for block in (layer, None):
        torch.manual_seed(0)
        with routing(torch.tensor([0, 1])):
            if block is None:
                wrapped = carry_routing(layer)
                y = torch.utils.checkpoint.checkpoint(wrapped, x, use_reentrant=False)
            else:
                y = block(x)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dim", [16, 136])
def test_compile_takes_the_layer_whole(dim):
    # Inductor draws the seeds otherwise than eager PyTorch: without them the two are comparable.
    layer, _ = pair(dim=dim, noise="never", dropout=0.0)
    x, a = torch.randn(2, 18, dim, device=HERE, requires_grad=True), torch.tensor([0, 1])
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        y = call(x, a.to(HERE))
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_compile_takes_masks_and_other_shapes():
    layer, eager = pair(dim=8, attribute_sizes=None, noise="never", dropout=0.0)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (20, 30, 40):
        x, mask = torch.randn(2, tokens, 8, device=HERE), torch.rand(2, tokens, device=HERE) < 0.5
        with masks_in_full_graphs():
            y = compiled(x.requires_grad_(), mask=mask)
        y.sum().backward()
        torch.testing.assert_close(y, eager(x, mask=mask))


@pytest.mark.parametrize(
    ("dim", "tokens", "hidden"),
    [(24, 128, 0), (100, 128, 0), (136, 300, 0), (136, 128, 2 * 24 / 136)],
    ids=["narrow", "wide, but not wide enough", "wide, but too many tokens", "wide"],
)
def test_only_the_hidden_layer_of_wide_experts_with_few_tokens_is_kept(dim, tokens, hidden):
    layer, _ = pair(dim=dim, n_experts=2)  # with weights of 2·24·dim, four times that may be kept
    x = torch.randn(2, tokens, dim, device=HERE, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in (x, *layer.parameters())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape[:1] != (2,):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    a = torch.tensor([0, 1], device=HERE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, a)
    # Beside x 24 bytes and the hidden layer for each of 2 slots a token, and a few offsets.
    routing = 2 * 24 / (4 * dim)
    assert hidden * x.nbytes <= sum(saved.values()) <= (hidden + routing) * x.nbytes + 1000
    y.sum().backward()


@pytest.mark.parametrize(("dim", "activation"), [(100, "relu"), (136, "gelu")])
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
    # Forward and backward; up to D = 128 only the latter has the hidden layer in memory.
    assert [len(segments) > 2 for segments in seen] == [True] * (2 if dim > 128 else 1)


@pytest.mark.parametrize("dim", [16, 136])
@pytest.mark.parametrize("trained", ["x", "w1_EHD", "b2_ED", "router.w_A2ED"])
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


@pytest.mark.parametrize("api", ["allow_tf32", "fp32_precision"])
def test_tf32_is_taken_from_either_of_pytorchs_settings(api):
    # In a process of its own: reading the old setting after the new one was written is an error.
    def ask(value):
        code = (
            f"import torch; torch.backends.cuda.matmul.{api} = {value!r}\n"
            "from dmoe_layer.fused.launch import precision; print(precision())"
        )
        run = [sys.executable, "-c", code]
        return subprocess.run(run, check=True, capture_output=True, encoding="utf-8").stdout.strip()

    if not hasattr(torch.backends.cuda.matmul, api):
        pytest.skip(f"this PyTorch has no {api}")
    yes, no = (True, False) if api == "allow_tf32" else ("tf32", "ieee")
    assert (ask(yes), ask(no)) == ("tf32", "tf32x3")


REFUSED = [
    ({"dtype": torch.float64}, (2, 16, 16), "float64"),
    ({"n_experts": 65}, (2, 16, 16), "n_experts is 65"),
    ({"n_experts": 9, "k": 9}, (2, 16, 16), "k is 9"),
    ({}, (2, 15, 16), "15 tokens a sample"),
    ({}, (4097, 16, 16), "4097 samples"),
]


def test_an_activation_that_the_kernels_lack_is_left_to_the_eager_backend(monkeypatch):
    plain = ACTIVATIONS["silu"]._replace(fused=False)
    monkeypatch.setitem(ACTIVATIONS, "swish", plain)
    layer, x = DMoE(16, activation="swish", backend="triton"), torch.randn(2, 16, 16)
    with pytest.raises(RuntimeError, match="activation is swish, which the kernels do not have"):
        layer(x)
    layer.backend = "auto"
    assert layer(x).shape == x.shape
    # A row that says otherwise than the kernels is an error of theirs, and no other activation.
    monkeypatch.setitem(ACTIVATIONS, "swish", plain._replace(fused=True))
    layer.backend = "triton"
    with pytest.raises(Exception, match="no such activation"):
        layer.to(HERE)(x.to(HERE))


@pytest.mark.parametrize(("options", "shape", "words"), REFUSED)
def test_what_the_kernels_cannot_take_is_said_and_auto_takes_eager(options, shape, words):
    layer, _ = pair(**options)
    x = torch.randn(shape, device=HERE, dtype=layer.w1_EHD.dtype)
    with pytest.raises(RuntimeError, match=rf"backend='triton': .*{words}.*backend='auto'"):
        layer(x, 0)
    assert words in backend.explain(layer, x)
    layer.backend = "auto"
    assert layer(x, 0).shape == shape
    assert backend.explain(layer, x).startswith("eager: ")
    if HERE == "cuda":
        assert words in backend.explain(layer, x)


def test_explain_says_which_backend_and_why():
    narrow, eager = pair()
    x = torch.randn(2, 16, 16, device=HERE)
    assert backend.explain(narrow, x).startswith("triton: D = 16 is narrow")
    assert backend.explain(eager, x) == "eager: the layer was told to use it"
    wide = DMoE(200, channel_dim=1, backend="triton").to(HERE)
    volume = torch.randn(1, 200, 4, 2, 2, device=HERE)
    assert backend.explain(wide, volume).startswith("triton: D = 200 is wide")
    with pytest.raises(ValueError, match="dim=16"):
        backend.explain(narrow, torch.randn(2, 16, 17, device=HERE))
    eager.backend = "egaer"
    with pytest.raises(ValueError, match="expected one of 'auto', 'eager', 'triton'"):
        eager(x, 0)
    auto = DMoE(16).to(HERE)
    where = "triton" if HERE == "cuda" else "eager: x is on cpu"
    assert backend.explain(auto, x).startswith(where)


@pytest.mark.parametrize(
    ("machine", "words"),
    [("triton", "Triton is not installed"), ("interpreter", "x is on cpu; the kernels need a GPU")],
)
def test_a_machine_without_triton_or_gpu_is_told_so(machine, words, monkeypatch):
    if machine == "triton":
        monkeypatch.setattr(backend, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=words):
        DMoE(16, backend="triton")(torch.randn(1, 16, 16))
