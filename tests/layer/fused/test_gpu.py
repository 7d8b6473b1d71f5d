"""What only a GPU can show of the Triton backend; all of it is skipped where there is none."""

import pytest
import torch
from harness.exactness import TOLERANCE

from dmoe_layer import DMoE, backend, routing

pytestmark = pytest.mark.gpu

SMOOTH = {"activation": "gelu", "noise": "never", "dropout": 0.0}
STAGE = 192 * 192 * 64  # tokens of the first stage of a 384 x 384 x 128 volume


def layer_and_input(batch, tokens, dim, dtype, **options):
    torch.manual_seed(0)
    options = {"attribute_sizes": 3, "device": "cuda", "dtype": dtype, **options}
    x = torch.randn(batch, tokens, dim, device="cuda", dtype=dtype, requires_grad=True)
    return DMoE(dim, **options), x, torch.arange(batch, device="cuda") % 3


def truth(layer, x, a, routed, dy):
    """y and the gradients of x, router and experts, in fp64, for the experts that were chosen.

    With GELU: among so many tokens some are always at ReLU's kink, where rounding turns a gradient
    on or off.
    """
    x_BTD = x.detach().double().requires_grad_()
    w, b, w1, b1, w2, b2 = (p.detach().double().requires_grad_() for p in weights_of(layer))
    logits_BTE = x_BTD @ w[a, 0].mT + b[a, 0, None]
    gates = logits_BTE.flatten(0, 1).gather(1, routed.expert_indices).softmax(dim=1)
    x = x_BTD.flatten(0, 1)
    y = torch.zeros_like(x)
    for e in range(layer.n_experts):
        token, slot = (routed.expert_indices == e).nonzero(as_tuple=True)
        out = torch.nn.functional.gelu(x[token] @ w1[e].mT + b1[e]) @ w2[e].mT + b2[e]
        y = y.index_add(0, token, out * gates[token, slot, None])
    inputs = (x_BTD, w, b, w1, b1, w2, b2)
    return [y, *torch.autograd.grad(y, inputs, dy.double().flatten(0, 1))]


def weights_of(layer):
    router = layer.router
    return router.w_A2ED, router.bias, layer.w1_EHD, layer.w1_bias, layer.w2_EDH, layer.w2_bias


def errors(layer, x, a):
    """Largest difference over the largest true value: y, and the gradients of x and parameters."""
    y, routed = layer(x, a, return_routing=True)
    dy = torch.randn_like(y)
    found = [y.flatten(0, 1), *torch.autograd.grad(y, (x, *weights_of(layer)), dy)]
    pairs = zip(found, truth(layer, x, a, routed, dy), strict=True)
    return [((f.double() - t).abs().max() / t.abs().max()).item() for f, t in pairs]


def test_auto_takes_the_kernels_and_gives_what_eager_gives():
    layer, x, a = layer_and_input(2, 300, 24, torch.float32, noise="never", dropout=0.0)
    assert backend.explain(layer, x).startswith("triton")
    y = layer(x, a)
    layer.backend = "eager"
    torch.testing.assert_close(y, layer(x, a), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [24, 48, 96, 128, 192, 768])
def test_kernels_equal_fp64_at_the_sizes_of_real_models(dim, dtype):
    layer, x, a = layer_and_input(3, 5000, dim, dtype, **SMOOTH)
    assert max(errors(layer, x, a)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dim", [24, 256])
def test_tf32_is_used_where_pytorch_is_told_so_and_only_there(dim):
    layer, x, a = layer_and_input(2, 2000, dim, torch.float32, **SMOOTH)
    assert max(errors(layer, x, a)) <= TOLERANCE[torch.float32]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert TOLERANCE[torch.float32] < max(errors(layer, x, a)) <= 1e-2
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dim", [24, 768])
def test_a_step_never_waits_for_the_gpu(dim):
    layer, x, a = layer_and_input(2, 1000, dim, torch.bfloat16)
    layer(x, a).sum().backward()  # compiles, and fills the allocator
    with routing(a):  # which looks at the values, once
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dim", [24, 48])
def test_a_volumes_first_stage_takes_four_times_its_input_at_most(dim):
    layer, x, a = layer_and_input(1, STAGE, dim, torch.bfloat16)
    dy = torch.ones_like(x)
    layer(x[:, :64], a).sum().backward()  # so that x and the parameters have their gradients
    torch.cuda.synchronize()
    size = x.numel() * x.element_size()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(x, a)
    held = torch.cuda.memory_allocated() - before - size  # y's own
    assert held <= 1.5 * size
    y.backward(dy)
    assert torch.cuda.max_memory_allocated() - before - size <= 4 * size


def test_tokens_beyond_two_to_the_31_numbers_are_computed_alike():
    # The pairs' slots, 2·T·d, and the logits, 8·T, have more than 2³¹ numbers.
    tokens = 2**28 + 5000
    layer, x, a = layer_and_input(1, tokens, 8, torch.bfloat16, noise="never", dropout=0.0)
    layer, x = layer.eval(), x.detach()
    with torch.no_grad():
        y = layer(x, a)
        few = slice(tokens - 3000, None)
        assert torch.equal(y[:, few], layer(x[:, few], a))
        middle = slice(2**27 - 1500, 2**27 + 1500)
        assert torch.equal(y[:, middle], layer(x[:, middle], a))


def test_gradients_beyond_two_to_the_31_numbers_are_computed_alike():
    tokens = 2**27 + 5000
    layer, x, a = layer_and_input(1, tokens, 8, torch.bfloat16, noise="never", dropout=0.0)
    dy = torch.zeros_like(x)
    few = slice(tokens - 3000, None)  # only these have a gradient
    dy[:, few] = torch.randn_like(dy[:, few])
    parameters = list(layer.parameters())
    found = torch.autograd.grad(layer(x, a), [x, *parameters], dy)
    part = x.detach()[:, few].requires_grad_()
    true = torch.autograd.grad(layer(part, a), [part, *parameters], dy[:, few])
    assert torch.equal(found[0][:, few], true[0])
    for f, t in zip(found[1:], true[1:], strict=True):
        assert (f - t).abs().max() <= TOLERANCE[torch.bfloat16] * t.abs().max()


@pytest.mark.parametrize("dim", [24, 48, 768])
def test_two_runs_give_the_same_bits(dim):
    layer, x, a = layer_and_input(2, 20_000, dim, torch.bfloat16)
    grads = []
    for _ in range(2):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(layer(x, a).square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
