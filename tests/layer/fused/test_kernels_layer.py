"""A layer with the Triton backend keeps the promises of any: NaNs, bits, seeds, memory, compile."""

import math

import pytest
import torch
from harness.exactness import TOLERANCE
from harness.kernels import HERE, assert_same_rows, pair
from harness.saved import bytes_of, saved_for_backward
from helpers import masks_in_full_graphs

from dmoe_layer import carry_routing, routing

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dim", [16, 136])
@pytest.mark.parametrize("attribute_sizes", [3, None])
def test_monais_metatensors_give_what_plain_tensors_give(dim, attribute_sizes):
    MetaTensor = pytest.importorskip("monai.data").MetaTensor
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
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_under_autocast_are_those_of_fp32_but_for_rounding(dim, activation):
    ours, eager = pair(dim=dim, activation=activation, noise="never", dropout=0.0)
    x = torch.randn(2, 150, dim, device=HERE, requires_grad=True)
    a = torch.tensor([0, 2], device=HERE)
    with torch.autocast(HERE, dtype=torch.bfloat16):
        y = ours(x, a)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    expected = torch.autograd.grad(eager(x, a), [x, *eager.parameters()], dy)
    for gradient, true in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - true).abs().max() <= TOLERANCE[torch.bfloat16] * true.abs().max()
        assert not torch.allclose(gradient, true, rtol=1e-4)


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
    a = torch.tensor([0, 1], device=HERE)
    with saved_for_backward(x, *layer.parameters(), n_experts=2) as saved:
        y = layer(x, a)
    # Beside x 24 bytes, a bit for each output and the hidden layer for each of 2 slots a token, and
    # a few offsets.
    routing = 2 * (24 + 4 * -(-dim // 32)) / (4 * dim)
    assert hidden * x.nbytes <= bytes_of(saved) <= (hidden + routing) * x.nbytes + 1000
    y.sum().backward()
