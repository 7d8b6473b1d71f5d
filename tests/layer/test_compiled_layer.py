"""torch.compile and torch.export take the layer whole, and it computes and draws the same."""

import pytest
import torch
from harness.layers import A3
from helpers import masks_in_full_graphs, needs_compiler
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import DMoE, carry_routing, routing

COMPILED = [
    {"attribute_sizes": 3},
    {"attribute_sizes": (3, 2), "unknown": "learned", "activation": "gelu"},
    {"attribute_sizes": 3, "unknown": "average", "residual": True, "bias": False},
    {},
]


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_compile_takes_the_layer_whole_and_gives_the_same(options):
    layer = DMoE(8, dropout=0.0, noise="never", **options)
    n = len(options["attribute_sizes"]) if isinstance(options.get("attribute_sizes"), tuple) else 1
    a = torch.tensor([[0, 1], [2, 0], [1, 1]])[:, :n] if options else None
    x = torch.randn(3, 7, 8, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for call in (layer, compiled):
        with routing(a) as r:
            y = call(x)
        loss = y.square().sum() + r.load_balancing_loss()
        results.append(
            [y, r.routings[0].gates, *torch.autograd.grad(loss, [x, *layer.parameters()])]
        )
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_trains_with_noise_and_dropout_and_other_batch_sizes():
    layer = DMoE(8, attribute_sizes=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (3, 4, 7):
        torch.manual_seed(1)
        a = torch.arange(batch) % 3
        y = compiled(torch.ones(batch, 6, 8), a)
        torch.manual_seed(1)
        assert torch.equal(y, layer(torch.ones(batch, 6, 8), a))
        y.sum().backward()


def test_compile_takes_a_lazy_layer_and_a_model_that_shares_one():
    lazy = torch.compile(DMoE(attribute_sizes=3), fullgraph=True, backend="aot_eager")
    assert lazy(torch.randn(3, 5, 6), A3).shape == (3, 5, 6)

    shared = DMoE(6, attribute_sizes=3, residual=True)
    model = nn.Sequential(nn.Linear(6, 6), shared, nn.ReLU(), shared, shared)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with routing(A3) as r:
        compiled(torch.randn(3, 5, 6)).sum().backward()
    assert len(r.routings) == 3
    assert all(routed.logits.requires_grad for routed in r.routings)


def test_blocks_compiled_one_by_one_are_recorded_without_a_recompile_each():
    blocks = [
        torch.compile(DMoE(6, attribute_sizes=3), fullgraph=True, backend="aot_eager")
        for _ in range(3)
    ]
    x = torch.randn(3, 5, 6)
    with routing(A3) as warm_up:
        for block in blocks:
            block(x)
    # In a later place of a later scope, no block may need another graph.
    with torch._dynamo.config.patch(error_on_recompile=True), routing(A3) as r:
        for block in [*blocks, *blocks[::-1]]:
            block(x)
    assert len(warm_up.routings) == 3
    assert len(r.routings) == 6


def test_a_compiled_layer_takes_masks_of_any_size():
    layer = DMoE(8, attribute_sizes=3).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with masks_in_full_graphs():
        for share in (0.5, 0.0, 0.2, 1.0):
            x, mask = torch.randn(3, 7, 8), torch.rand(3, 7) < share
            assert torch.equal(compiled(x, A3, mask=mask), layer(x, A3, mask=mask))


def test_a_checkpoint_inside_a_compiled_model_gives_the_same_and_records_once():
    layer = DMoE(8, attribute_sizes=3)
    x = torch.randn(3, 7, 8)

    class Model(nn.Module):
        def forward(self, x):
            return checkpoint(carry_routing(layer), x, use_reentrant=False)

    results = []
    for model in (layer, torch.compile(Model(), backend="aot_eager")):
        torch.manual_seed(0)
        with routing(A3) as r:
            y = model(x)
        assert len(r.routings) == 1
        loss = y.square().sum() + r.load_balancing_loss()
        results.append([y, *torch.autograd.grad(loss, list(layer.parameters()))])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager)


@needs_compiler
def test_inductor_draws_the_same_noise_and_dropout_in_backward_as_in_forward():
    layer = DMoE(8, attribute_sizes=3, dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True)
    x, direction = torch.randn(3, 7, 8), torch.randn(3, 7, 8)

    def run(x):
        torch.manual_seed(4)
        return compiled(x, A3).sum()

    assert run(x) == run(x)
    leaf = x.clone().requires_grad_()
    run(leaf).backward()
    step = 1e-3 * direction
    slope = (run((x + step).requires_grad_()) - run((x - step).requires_grad_())) / 2e-3
    torch.testing.assert_close(slope, (leaf.grad * direction).sum(), rtol=0.05, atol=0.05)


def test_the_registered_operators_pass_opcheck():
    x, a = torch.randn(2, 5, 6, requires_grad=True), torch.tensor([0, 2])
    layer = DMoE(6, attribute_sizes=3)
    weights = [
        p.detach().requires_grad_()
        for p in (layer.w1_EHD, layer.w1_bias, layer.w2_EDH, layer.w2_bias)
    ]
    w1, _, w2, _ = weights
    seed = torch.tensor(5)
    indices = torch.randint(0, 8, (10, 2))
    gates = torch.rand(10, 2, requires_grad=True)
    flat = x.detach().flatten(0, 1).requires_grad_()
    ops = torch.ops.dmoe_layer
    w = layer.router.w_A2ED.detach().requires_grad_()
    b = layer.router.bias.detach().requires_grad_()
    rows = torch.tensor([[0, 2], [1, 1]])
    counts = torch.tensor([4, 6])
    for op, args in (
        (ops.check_attributes, (x.detach(), 2, a, None, [3], "error")),
        (ops.router_logits, (x, w, b, rows, None, seed)),
        (ops.router_logits, (flat, w, b, rows, counts, None)),
        (ops.experts, (flat, indices, gates, *weights, "gelu", 0.1, seed, torch.float32)),
        (ops.experts, (flat, indices, gates, w1, None, w2, None, "relu", 0.0, None, torch.float32)),
    ):
        torch.library.opcheck(op.default, args)


def test_channels_last_stays_channels_last_under_compile():
    layer = DMoE(8, attribute_sizes=3, channel_dim=1).eval()
    x = torch.randn(3, 8, 4, 5).to(memory_format=torch.channels_last)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, A3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x, A3))


def test_export_takes_a_layer_with_attributes_and_mask():
    layer = DMoE(8, attribute_sizes=3).eval()
    x, mask = torch.randn(3, 7, 8), torch.rand(3, 7) < 0.5
    program = torch.export.export(layer, (x, A3), {"mask": mask}).module()
    torch.testing.assert_close(program(x, A3, mask=~mask), layer(x, A3, mask=~mask))
