"""DMoE is a good nn.Module: layouts, dtypes, autocast, lazy width, copies, state_dicts, compile."""

import copy
import io
import pickle
import threading

import pytest
import torch
from helpers import HANG, masks_in_full_graphs, needs_compiler, run_threads
from monai.data import MetaTensor
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import AttributeRouter, DMoE, carry_routing, routing

A3 = torch.tensor([0, 2, 1])


def layouts():
    """(name, x of width 6, channel_dim)"""
    x = torch.randn(3, 6, 4, 5)
    volume = torch.randn(3, 6, 2, 3, 4)
    yield "tokens", torch.randn(3, 7, 6), -1
    yield "tokens of a grid", torch.randn(3, 4, 5, 6), -1
    yield "tokens, transposed", torch.randn(3, 6, 7).mT, -1
    yield "tokens, every other one", torch.randn(3, 14, 6)[:, ::2], -1
    yield "tokens, expanded", torch.randn(3, 1, 6).expand(3, 7, 6), -1
    yield "one token a sample", torch.randn(3, 6), -1
    yield "sequence, channels first", torch.randn(3, 6, 7), 1
    yield "image", x, 1
    yield "image, channels last", x.to(memory_format=torch.channels_last), 1
    yield "volume", volume, 1
    yield "volume, channels last", volume.to(memory_format=torch.channels_last_3d), 1
    yield "image, negative axis", x, -3


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("name", "x", "channel_dim"), [pytest.param(*c, id=c[0]) for c in layouts()]
)
def test_every_layout_gives_what_its_tokens_give(name, x, channel_dim, residual):
    layer = DMoE(6, attribute_sizes=3, channel_dim=channel_dim, residual=residual).eval()
    x = x.detach().requires_grad_()
    y, weights = layer(x, A3), torch.randn(x.shape)
    layer.channel_dim = -1
    tokens = x.movedim(channel_dim, -1).reshape(3, -1, 6)
    expected = layer(tokens, A3).reshape(x.movedim(channel_dim, -1).shape)
    expected = expected.movedim(-1, channel_dim)
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()]),
        torch.autograd.grad((expected * weights).sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # What element-wise operators of PyTorch do with the memory format.
    assert y.stride() == (x + 0).stride()


def test_channels_last_stays_channels_last_under_compile():
    layer = DMoE(8, attribute_sizes=3, channel_dim=1).eval()
    x = torch.randn(3, 8, 4, 5).to(memory_format=torch.channels_last)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, A3)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x, A3))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_x_and_routes_in_fp32(x_dtype, dtype):
    # GELU: where bf16 moves a hidden unit over ReLU's kink, gradients rightly differ.
    layer = DMoE(16, attribute_sizes=3, activation="gelu", dropout=0.0, noise="never")
    x = torch.randn(3, 9, 16, dtype=x_dtype, requires_grad=True)
    true = layer(x.float(), A3)
    with torch.autocast("cpu", dtype=dtype), routing(A3) as r:
        y = layer(x)
        loss = y.float().square().mean() + r.load_balancing_loss() + r.router_z_loss()
    routed = r.routings[0]
    assert y.dtype == x_dtype
    assert routed.logits.dtype == routed.gates.dtype == loss.dtype == torch.float32
    exact = x.detach().float()[0] @ layer.router.w_A2ED[0, 0].mT + layer.router.b_A2E[0, 0]
    torch.testing.assert_close(routed.logits[:9], exact, rtol=1e-5, atol=1e-6)
    assert (y.float() - true).abs().max() < 2e-2 * true.abs().max()
    inputs = [x, *layer.parameters()]
    with routing(A3) as exact:
        true = layer(x.float())
    true_loss = true.square().mean() + exact.load_balancing_loss() + exact.router_z_loss()
    for found, gradient in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(true_loss, inputs), strict=True
    ):
        assert found.dtype == gradient.dtype
        assert (found - gradient).abs().max() <= 2e-2 * gradient.abs().max()


def test_autocast_leaves_double_precision_alone():
    layer, x = DMoE(8, dtype=torch.float64).eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = layer(x)
    assert torch.equal(under_autocast, layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_converted_layer_works_in_its_dtype(dtype):
    layer = DMoE(attribute_sizes=3).to(dtype)
    x = torch.randn(3, 4, 8, dtype=dtype)
    y, routed = layer(x, A3, return_routing=True)
    assert y.dtype == dtype
    assert routed.gates.dtype == torch.promote_types(dtype, torch.float32)
    y.sum().backward()
    assert layer.w1_EHD.grad.dtype == dtype


def test_zero_init_with_residual_starts_as_the_identity_and_learns():
    layer, x = DMoE(8, residual=True, zero_init=True), torch.randn(2, 5, 8)
    y = layer(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert layer.w2_EDH.grad.any()


def test_experts_and_routers_start_different_and_in_the_range_of_nn_linear():
    layer = DMoE(64, attribute_sizes=3)
    for parameter, fan_in in ((layer.w1_EHD, 64), (layer.w2_EDH, 256), (layer.router.w_A2ED, 64)):
        bound = fan_in**-0.5
        assert 0.95 * bound < parameter.abs().max() <= bound
        assert not torch.equal(parameter[0], parameter[1])


def test_an_attribute_value_costs_2e_times_d_plus_1_numbers():
    def count(size):
        return sum(p.numel() for p in DMoE(24, attribute_sizes=size).parameters())

    assert count(4) - count(3) == 2 * 8 * (24 + 1)


def test_the_names_of_the_state_dict_are_these():
    expected = ["w1_EHD", "b1_EH", "w2_EDH", "b2_ED", "router.w_A2ED", "router.b_A2E"]
    for noise in ("train", "always", "never"):
        layer = DMoE(4, attribute_sizes=2, noise=noise)
        assert list(layer.state_dict()) == expected
        assert layer.router.w_A2ED.shape == (2, 2, 8, 4)
    assert list(DMoE(4, bias=False).state_dict()) == [
        n for n in expected if "b1" not in n and "b2" not in n
    ]


def test_a_lazy_layer_learns_its_width_from_the_first_input():
    for channel_dim, shape in ((-1, (3, 5, 6)), (1, (3, 6, 4, 4))):
        layer = DMoE(n_experts=8, k=2, attribute_sizes=3, channel_dim=channel_dim)
        assert layer.dim is None
        y = layer(torch.randn(shape), A3)
        assert y.shape == shape
        assert layer.dim == layer.router.dim == 6
        assert layer.w1_EHD.shape == (8, 24, 6)
        y.sum().backward()
        assert layer.router.w_A2ED.grad is not None
    router = AttributeRouter(None, attribute_sizes=3)
    assert router(torch.randn(3, 5, 6), A3).logits.shape == (15, 8)


def test_an_optimizer_made_before_the_first_call_trains_a_lazy_layer():
    layer = DMoE(attribute_sizes=3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    x = torch.randn(3, 5, 6)
    layer(x, A3).sum().backward()
    before = layer.w1_EHD.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.w1_EHD, before)


def test_a_lazy_layer_loads_a_state_dict_and_learns_its_width_from_it():
    trained = DMoE(6, attribute_sizes=3).eval()
    x = torch.randn(3, 5, 6)
    lazy = DMoE(attribute_sizes=3).eval()
    lazy.load_state_dict(trained.state_dict())
    assert lazy.dim == 6
    assert torch.equal(lazy(x, A3), trained(x, A3))
    model, lazy_model = (
        nn.Sequential(nn.Linear(6, 6), d) for d in (trained, DMoE(attribute_sizes=3))
    )
    lazy_model.load_state_dict(model.state_dict())
    assert torch.equal(lazy_model[1].w1_EHD, trained.w1_EHD)


@pytest.mark.parametrize("other", [{"n_experts": 4}, {"hidden_dim": 5}, {"attribute_sizes": 2}])
def test_a_lazy_layer_refuses_a_state_dict_of_other_options(other):
    lazy = DMoE(attribute_sizes=3)
    with pytest.raises(RuntimeError, match=r"w1_EHD: found|w_A2ED: found"):
        lazy.load_state_dict(DMoE(6, **{"attribute_sizes": 3, **other}).state_dict())


def test_bad_input_leaves_a_layer_alone_of_which_only_the_router_knows_the_width():
    layer = DMoE(attribute_sizes=3)
    layer.router.load_state_dict(DMoE(8, attribute_sizes=3).router.state_dict())
    with pytest.raises(ValueError, match="expected dim=8"):
        layer(torch.randn(3, 5, 12), A3)
    assert layer.dim is None
    assert layer(torch.randn(3, 5, 8), A3).shape == (3, 5, 8)


def test_a_lazy_layer_first_called_in_inference_mode_trains_later():
    layer, x = DMoE(attribute_sizes=3), torch.randn(3, 5, 6)
    with torch.inference_mode():
        layer(x, A3)
    layer(x, A3).sum().backward()
    assert layer.w1_EHD.grad is not None


def test_reset_parameters_draws_anew_and_leaves_a_lazy_layer_lazy():
    layer, lazy = DMoE(8), DMoE()
    before = layer.w1_EHD.detach().clone()
    for module in (*layer.modules(), *lazy.modules()):
        module.reset_parameters()
    assert not torch.equal(layer.w1_EHD, before)
    assert lazy.dim is None


def test_replication_is_open_to_a_layer_that_knows_its_width():
    assert DMoE(6)._replicate_for_data_parallel() is not None
    with pytest.raises(RuntimeError, match="uninitialized"):
        DMoE()._replicate_for_data_parallel()


def test_a_state_dict_of_an_uninitialised_layer_loads_into_another():
    lazy = DMoE(attribute_sizes=3)
    lazy.load_state_dict(DMoE(attribute_sizes=3).state_dict())
    assert lazy.dim is None
    assert lazy(torch.randn(3, 5, 6), A3).shape == (3, 5, 6)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_and_share_nothing(how, lazy):
    layer = DMoE(None if lazy else 6, attribute_sizes=3).eval()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    x = torch.randn(3, 5, 6)
    y = layer(x, A3)
    if lazy:
        assert twin.dim is None
        twin(x, A3)
        twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x, A3), y)
    with torch.no_grad():
        twin.w1_EHD.zero_()
    assert torch.equal(layer(x, A3), y)


def test_two_threads_may_make_the_first_call_of_a_lazy_layer():
    for _ in range(20):
        layer, barrier = DMoE(attribute_sizes=3).eval(), threading.Barrier(2, timeout=HANG)
        x = torch.randn(3, 5, 6)

        def call(layer=layer, barrier=barrier, x=x):
            barrier.wait()
            return layer(x, A3)

        assert torch.equal(*run_threads(call, call, meeting=barrier))


@pytest.mark.parametrize("part", ["experts", "router", "all"])
def test_parameters_on_another_device_are_refused_instead_of_read(part):
    layer, meta = DMoE(6, attribute_sizes=3), DMoE(6, attribute_sizes=3, device="meta")
    if part == "experts":
        layer.w1_EHD = meta.w1_EHD
    elif part == "router":
        layer.router = meta.router
    else:
        layer = meta
    owner = "router" if part == "router" else "layer"
    with pytest.raises(ValueError, match=f"x: is on cpu, but the {owner}'s .* are on meta"):
        layer(torch.randn(3, 5, 6), A3)
    with pytest.raises(ValueError, match="the router's parameters are on meta"):
        meta.router(torch.randn(3, 5, 6), A3)


def test_a_router_that_is_brought_in_when_it_is_called_is_found_there():
    layer, x = DMoE(6).eval(), torch.randn(3, 5, 6)
    expected, weights = layer(x), layer.router.state_dict()
    layer.router.to("meta")  # as offloading does between calls
    layer.router.register_forward_pre_hook(
        lambda router, args: router.load_state_dict(weights, assign=True) and None
    )
    assert torch.equal(layer(x), expected)


def test_a_layer_called_many_times_under_autocast_keeps_no_copies_of_its_weights():
    layer, x = DMoE(48, attribute_sizes=3), torch.randn(3, 2, 48)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        for _ in range(12):
            x = layer(x, A3)
    assert sum(saved.values()) < 0.1 * layer.w1_EHD.nbytes
    x.sum().backward()
    assert layer.w1_EHD.grad.dtype == torch.float32


def test_export_takes_a_layer_with_attributes_and_mask():
    layer = DMoE(8, attribute_sizes=3).eval()
    x, mask = torch.randn(3, 7, 8), torch.rand(3, 7) < 0.5
    program = torch.export.export(layer, (x, A3), {"mask": mask}).module()
    assert torch.equal(program(x, A3, mask=~mask), layer(x, A3, mask=~mask))


def test_the_meta_device_gives_shapes_and_to_empty_makes_it_real():
    layer = DMoE(6, attribute_sizes=3, device="meta")
    y = layer(torch.empty(3, 5, 6, device="meta"), A3)
    assert y.shape == (3, 5, 6)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer.router.reset_parameters()
    assert torch.isfinite(layer(torch.randn(3, 5, 6), A3)).all()


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


def test_compile_of_a_lazy_layer_and_of_a_model_that_shares_one():
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


def test_opcheck_of_the_registered_operators():
    x, a = torch.randn(2, 5, 6, requires_grad=True), torch.tensor([0, 2])
    layer = DMoE(6, attribute_sizes=3)
    weights = [
        p.detach().requires_grad_() for p in (layer.w1_EHD, layer.b1_EH, layer.w2_EDH, layer.b2_ED)
    ]
    w1, _, w2, _ = weights
    seed = torch.tensor(5)
    indices = torch.randint(0, 8, (10, 2))
    gates = torch.rand(10, 2, requires_grad=True)
    flat = x.detach().flatten(0, 1).requires_grad_()
    ops = torch.ops.dmoe_layer
    w = layer.router.w_A2ED.detach().requires_grad_()
    b = layer.router.b_A2E.detach().requires_grad_()
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_monais_metatensors_give_what_plain_tensors_give(dtype):
    layer = DMoE(6, attribute_sizes=3, channel_dim=1, dtype=dtype)
    plain = torch.randn(3, 6, 5, 4, dtype=dtype)
    found = []
    for image, site in ((plain, A3), (MetaTensor(plain), MetaTensor(A3))):
        image = image.clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(1)
        with routing(site) as r:
            y = layer(image)
        (y.square().sum() + r.load_balancing_loss()).backward()
        assert type(y) is type(image)
        found.append([torch.Tensor(t) for t in (y.detach(), image.grad)])
        found[-1] += [p.grad.clone() for p in layer.parameters()]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
