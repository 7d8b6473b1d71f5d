"""DMoE is a good nn.Module: layouts, dtypes, autocast, state_dicts, copies and devices."""

import copy
import io
import pickle

import pytest
import torch
from harness.layers import A3
from monai.data import MetaTensor

from dmoe_layer import DMoE, routing


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
    exact = x.detach().float()[0] @ layer.router.w_A2ED[0, 0].mT + layer.router.bias[0, 0]
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
    expected = ["w1_EHD", "w1_bias", "w2_EDH", "w2_bias", "router.w_A2ED", "router.bias"]
    for noise in ("train", "always", "never"):
        layer = DMoE(4, attribute_sizes=2, noise=noise)
        assert list(layer.state_dict()) == expected
        assert layer.router.w_A2ED.shape == (2, 2, 8, 4)
    assert list(DMoE(4, bias=False).state_dict()) == [
        n for n in expected if n not in ("w1_bias", "w2_bias")
    ]


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
    with pytest.raises(
        ValueError, match=f"x: got a tensor on cpu, but the {owner}'s .* are on meta"
    ):
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


def test_the_meta_device_gives_shapes_and_to_empty_makes_it_real():
    layer = DMoE(6, attribute_sizes=3, device="meta")
    y = layer(torch.empty(3, 5, 6, device="meta"), A3)
    assert y.shape == (3, 5, 6)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer.router.reset_parameters()
    assert torch.isfinite(layer(torch.randn(3, 5, 6), A3)).all()
