"""The study's U-Net computes what it says, whatever stands in the place of its MLPs."""

import copy
import math

import naive
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dmoe_layer import DMoE, routing
from reference_models.models.unet import BLOCKS, TOLD, UNet
from reference_models.models.weight_files import WeightsError
from reference_models.models.weights import load_pretrained

WIDTHS = (4, 8)
SIZES = (3, 2)
ATTRIBUTES = torch.tensor([[2, 0], [0, 1], [1, -1]])
KNOWN = torch.tensor([[2, 0], [0, 1], [1, 1]])
KINDS = {
    **{block: {"block": block} for block in BLOCKS},
    "after": {"placement": "after"},
    "beside": {"placement": "beside"},
    "modulated": {"modulate": True},
    "merged": {"merge": True},
    "shared": {"router": "shared"},
    "sharp": {"router": "sharp"},
    "blind": {"router": "blind", "modulate": True},
    "plain": {"attribute_sizes": None},
}


def make(**options):
    return UNet(
        WIDTHS,
        **{
            "in_channels": 2, "n_classes": 3, "attribute_sizes": SIZES, "unknown": "average",
            "n_experts": 4, "hidden": 4, **options,
        },
    )  # fmt: skip


def images(batch=3, size=(8, 16)):
    return torch.randn(batch, 2, *size)


def run(model, image, attributes_BA=ATTRIBUTES):
    with routing(attributes_BA):
        return model(image, attributes_BA)


def stirred(model):
    """No two parameters alike, and all of them seen in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


# What it computes, once more


def members(values, unknown):
    """Which of the values of all attributes a sample belongs to, and how much."""
    found, start = [], 0
    for value, size in zip(values, SIZES, strict=True):
        if value >= 0:
            found.append((start + value, 1.0))
        elif unknown == "learned":
            found.append((start + size, 1.0))
        else:
            found += [(start + v, 1 / size) for v in range(size)]
        start += size + (unknown == "learned")
    return found


def naive_logits(model, image_BCHW, attributes_BA, kind, unknown):
    """Sample by sample and, between the convolutions, token by token."""
    state = model.state_dict()

    def convolution(name, place, x, stride=1):
        x = F.conv2d(x, state[f"{name}.{place}.weight"], None, stride, 1)
        grouped = x.reshape(4, -1)
        grouped = grouped - grouped.mean(1, keepdim=True)
        x = (grouped / (grouped.square().mean(1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        scale, shift = (state[f"{name}.{place + 1}.{p}"] for p in ("weight", "bias"))
        x = x * scale[:, None, None] + shift[:, None, None]
        return torch.where(x > 0, x, 0.1 * x)

    def dense(name, x):
        hidden = state[f"{name}.0.weight"] @ x + state[f"{name}.0.bias"]
        return state[f"{name}.2.weight"] @ hidden.clamp(min=0) + state[f"{name}.2.bias"]

    def experts(name, x_TD, values):
        params = {
            key.removeprefix(f"{name}."): value
            for key, value in state.items()
            if key.startswith(f"{name}.")
        }
        if kind == "shared":
            one = params.pop("router.parametrizations.w_A2ED.original")
            params["router.w_A2ED"] = one.expand(len(params["router.b_A2E"]), -1, -1, -1)
        if kind == "sharp":
            for weight in ("w_A2ED", "b_A2E"):
                own = params.pop(f"router.parametrizations.{weight}.original")
                params[f"router.{weight}"] = 4 * own
        sizes = None if kind in ("plain", "blind") else SIZES
        return naive.dmoe(
            x_TD[None], [values], params, sizes=sizes, unknown=unknown, k=2, activation="relu",
        )[0][0]  # fmt: skip

    def merged(name, x_TD, values):
        w1, b1, w2, b2, w_A2ED, b_A2E = (
            state[f"{name}.{p}"]
            for p in ("w1_EHD", "b1_EH", "w2_EDH", "b2_ED", "router.w_A2ED", "router.b_A2E")
        )
        w_2ED, b_2E = naive.router_weights(w_A2ED, b_A2E, SIZES, unknown, values)
        scores = w_2ED[0] @ x_TD.mean(0) + b_2E[0]
        best = scores.topk(2).indices
        gates = scores[best].softmax(0)
        w1, b1, w2, b2 = (
            sum(gate * p[expert] for gate, expert in zip(gates, best, strict=True))
            for p in (w1, b1, w2, b2)
        )
        return torch.stack([w2 @ (w1 @ x + b1).clamp(min=0) + b2 for x in x_TD])

    def answer(stage, x_TD, values, member):
        name = f"stages.{stage}.mlp"
        if kind == "merged":
            return x_TD + merged(f"{name}.experts", x_TD, values)
        if kind in ("moe", "shared", "sharp", "plain"):
            return x_TD + experts(name, x_TD, values)
        if kind in ("modulated", "blind"):
            table = state[f"stages.{stage}.film.scale_shift.weight"]
            scale, shift = sum(share * table[:, v] for v, share in member).chunk(2)
            return x_TD + experts(name, x_TD * (1 + scale) + shift, values)
        if kind == "beside":
            always = torch.stack([dense(f"{name}.0", x) for x in x_TD])
            return x_TD + always + experts(f"{name}.1", x_TD, values)
        if kind == "after":
            x_TD = x_TD + torch.stack([dense(name, x) for x in x_TD])
            return x_TD + experts(f"stages.{stage}.after", x_TD, values)
        answers = []
        for x in x_TD:
            if kind == "film":
                table = state[f"stages.{stage}.film.scale_shift.weight"]
                scale, shift = sum(share * table[:, v] for v, share in member).chunk(2)
                answers.append(x + dense(name, x * (1 + scale) + shift))
            elif kind == "per_value":
                w1, b1, w2, b2 = (
                    sum(share * state[f"{name}.{p}"][v] for v, share in member) / len(SIZES)
                    for p in ("w1_VMD", "b1_VM", "w2_VDM", "b2_VD")
                )
                answers.append(x + w2 @ (w1 @ x + b1).clamp(min=0) + b2)
            else:
                answers.append(x + dense(name, x))
        return torch.stack(answers)

    logits = []
    for image_CHW, values in zip(image_BCHW, attributes_BA.tolist(), strict=True):
        x, maps = image_CHW[None], []
        member = members(values, unknown)
        if kind == "channels":
            n_values = sum(SIZES) + len(SIZES) * (unknown == "learned")
            planes = torch.zeros(1, n_values, *x.shape[2:], dtype=x.dtype)
            for value, share in member:
                planes[:, value] = share
            x = torch.cat([x, planes], 1)
        for stage in range(len(WIDTHS)):
            x = convolution(f"stages.{stage}.convolutions", 0, x, stride=2)
            x = convolution(f"stages.{stage}.convolutions", 3, x)
            x = answer(stage, x[0].flatten(1).T, values, member).T.reshape(x.shape)
            maps.append(x)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = convolution("decoder.0", 0, torch.cat([x, maps[0]], 1))
        logits.append(F.conv_transpose2d(x, state["head.weight"], state["head.bias"], stride=2))
    return torch.cat(logits)


@pytest.mark.parametrize("unknown", ["average", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_a_loop_over_its_tokens_does(kind, unknown):
    model = stirred(make(**KINDS[kind], unknown=unknown)).double().eval()
    image = images().double()
    expected = naive_logits(model, image, ATTRIBUTES, kind, unknown)
    torch.testing.assert_close(run(model, image), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(4, 4), (12, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_have_the_images_size(kind, size):
    assert run(make(**KINDS[kind]), images(size=size)).shape == (3, 3, *size)


@pytest.mark.parametrize("unknown", ["average", "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind, unknown):
    model = make(**KINDS[kind], unknown=unknown)
    told = torch.tensor([[2, 0], [0, -1], [1, 1], [-1, 0]])
    run(model, images(4), told).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    for name, parameter in model.named_parameters():
        rows = parameter.grad.flatten(1) if "_V" in name or "_A2E" in name else parameter.grad
        seen = rows.any(1).all() if "_V" in name or "_A2E" in name else rows.any()
        assert seen, name


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_repeats_itself_and_leaves_batch_mates_alone(kind):
    model, image = stirred(make(**KINDS[kind])).eval(), images()
    first = run(model, image)
    assert torch.equal(first, run(model, image))
    alone = [run(model, image[[i]], ATTRIBUTES[[i]]) for i in range(3)]
    torch.testing.assert_close(first, torch.cat(alone), rtol=1e-4, atol=1e-4)
    other = ATTRIBUTES.clone()
    other[1] = torch.tensor([1, 0])
    changed = (run(model, image, other) - first).flatten(1).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, kind not in ("mlp", "plain"), False]


@pytest.mark.parametrize("kind", KINDS)
def test_training_under_autocast_is_finite(kind):
    model = make(**KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(model, images())
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_the_last_thing_that_an_mlp_does(kind):
    """Drawn away entirely, each MLP adds nothing, and each token is what the convolutions made."""
    model, image = stirred(make(**KINDS[kind], dropout=1.0)), images()
    maps = {}
    for n, stage in enumerate(model.stages):
        stage.convolutions.register_forward_hook(lambda *c, n=n: maps.update({n: c[-1]}))
        stage.register_forward_hook(lambda *c, n=n: maps.update({(n, "out"): c[-1]}))
    run(model, image)
    for n in range(2):
        torch.testing.assert_close(maps[n, "out"], maps[n])


# Equal multiply-adds


def multiply_adds(model):
    """Of all that FlopCounterMode sees, which is all but experts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model.eval(), images(1, (16, 16)), KNOWN[:1])
    return counter.get_total_flops() // 2


def test_blocks_have_the_mlps_multiply_adds_and_what_reading_the_attribute_takes():
    dense, values = multiply_adds(make(block="mlp")), sum(SIZES)
    further_channels = 8 * 8 * 9 * values * WIDTHS[0]
    assert multiply_adds(make(block="channels")) - dense == further_channels
    assert multiply_adds(make(block="film")) - dense == sum(2 * values * w for w in WIDTHS)
    # Its weights are put together for each sample: those of an MLP, from all values'.
    mixing = sum(values * (2 * 4 * w * w + 4 * w + w) for w in WIDTHS)
    assert multiply_adds(make(block="per_value")) - dense == mixing


@pytest.mark.parametrize("placement", ["mlp", "after"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_tokens_experts_have_the_mlps_hidden_units_together(k, placement):
    model = make(k=k, placement=placement, hidden=8)
    for width, stage in zip(WIDTHS, model.stages, strict=True):
        layer = stage.mlp if placement == "mlp" else stage.after
        units = layer.k * layer.w1_EHD.shape[1]
        if placement == "after":
            assert stage.mlp[0].out_features == units
            units += stage.mlp[0].out_features
        assert layer.k == k
        assert units == 8 * width


# Attributes


@pytest.mark.parametrize("kind", ["channels", "film", "per_value", "moe", "after", "shared"])
def test_what_is_not_known_is_an_error_unless_there_is_a_policy(kind):
    model, image = make(**KINDS[kind], unknown="error"), images()
    with pytest.raises(ValueError, match=r"attributes.*-1 .*unknown='error'.*unknown='average'"):
        run(model, image)
    assert run(model, image, KNOWN).isfinite().all()


@pytest.mark.parametrize("kind", ["mlp", "plain"])
def test_a_network_that_is_told_nothing_does_not_look_at_what_is_not_known(kind):
    model, image = make(**KINDS[kind], unknown="error").eval(), images()
    torch.testing.assert_close(run(model, image), run(model, image, KNOWN))


@pytest.mark.parametrize("block", TOLD)
@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ([[3, 0], [0, 0], [0, 0]], r"\[3, 0, 0\], expected 0 .. 2, or -1"),
        ([[0, 0], [0, -2], [0, 0]], r"\[0, -2, 0\], expected 0 .. 1, or -1"),
        ([[0], [0], [0]], r"shape \(3, 1\), expected int64 of shape \(3, 2\)"),
        ([[0, 0]], r"shape \(1, 2\), expected int64 of shape \(3, 2\)"),
        ([0, 0, 0], r"shape \(3,\)"),
        ([[0.0, 1.0]] * 3, r"torch.float32"),
    ],
)
def test_attributes_of_another_kind_are_errors(block, attributes, words):
    with pytest.raises(ValueError, match=f"attributes: got .*{words}"):
        make(block=block)(images(), torch.tensor(attributes))


def test_a_shared_router_has_one_set_of_weights_and_biases_of_each_value():
    model, own = make(router="shared"), make()
    for width, stage, other in zip(WIDTHS, model.stages, own.stages, strict=True):
        routers = stage.mlp.router
        w_A2ED = routers.w_A2ED
        assert w_A2ED.shape == other.mlp.router.w_A2ED.shape == (5, 2, 4, width)
        assert all(torch.equal(w_A2ED[0], w) for w in w_A2ED)
        assert not any(torch.equal(routers.b_A2E[0], b) for b in routers.b_A2E[1:])
        counts = [sum(p.numel() for p in r.parameters()) for r in (other.mlp.router, routers)]
        assert counts[0] - counts[1] == 4 * 2 * 4 * width
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    run(model, images(), KNOWN).square().mean().backward()
    optimizer.step()
    routers = model.stages[1].mlp.router
    assert all(torch.equal(routers.w_A2ED[0], w) for w in routers.w_A2ED)
    names = [n for n in before if ".router." in n]
    assert len(names) == 4
    assert not any(torch.equal(before[n], model.state_dict()[n]) for n in names)


# What is not there


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"block": "moes"}, "block: got 'moes', expected one of mlp, channels"),
        ({"placement": "before"}, "placement: got 'before'"),
        ({"router": "none"}, "router: got 'none'"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"hidden": 4, "k": 3}, "hidden: got 4, .* by 3"),
        ({"hidden": 1, "k": 4, "placement": "after"}, "hidden: got 1, .* by 8"),
        ({"k": 0}, "k: got 0"),
        ({"k": 5, "hidden": 5}, "k: got 5"),
        ({"unknown": "guess"}, "unknown: got 'guess'"),
        ({"block": "film", "unknown": "guess"}, "unknown: got 'guess'"),
        *(
            ({"block": b, "attribute_sizes": None}, f"block: {b}, modulate=False: has to be told")
            for b in TOLD
        ),
        ({"block": "film", "attribute_sizes": ()}, "block: film, modulate=False: has to be told"),
    ],
)
def test_options_that_are_not_there_or_do_not_divide_are_errors(wrong, words):
    with pytest.raises(ValueError, match=words):
        make(**wrong)


@pytest.mark.parametrize("widths", [(), (6, 8), (0, 4), (-4,)])
def test_widths_that_the_norms_groups_do_not_divide_are_errors(widths):
    with pytest.raises(ValueError, match=r"widths: got .*multiples of 4"):
        UNet(widths, in_channels=1, n_classes=2, attribute_sizes=SIZES)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 3, 8, 8), (1, 2, 10, 8), (1, 2, 8, 6)])
def test_images_of_another_kind_are_errors(shape):
    with pytest.raises(
        ValueError, match=r"image: got shape .*expected \(batch, 2, rows, columns\)"
    ):
        run(make(), torch.randn(shape), KNOWN[:1])


# Upcycling


def saved(model, path):
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize("options", [{}, {"router": "shared"}, {"k": 1}, {"unknown": "learned"}])
def test_experts_that_start_as_a_dense_network_compute_what_it_does(tmp_path, options):
    model, image = stirred(make(hidden=8, **options)).eval(), images()
    dense = make(block="mlp", hidden=8 // options.get("k", 2)).eval()
    routers = {n: v.clone() for n, v in model.state_dict().items() if ".router." in n}
    load_pretrained(model, saved(dense, tmp_path / "model.safetensors"))
    torch.testing.assert_close(run(model, image), run(dense, image), rtol=1e-4, atol=1e-5)
    assert len(routers) == 4
    assert all(torch.equal(model.state_dict()[n], value) for n, value in routers.items())


@pytest.mark.parametrize(
    ("model", "file", "words"),
    [
        ({}, {"hidden": 8}, "Its first MLP has 32 hidden units, an expert has 8.*hidden=2"),
        ({}, {"n_classes": 2}, r"not as expected: head.weight has shape \(4, 2, 2, 2\), expected"),
        ({}, {"block": "film"}, r"left over: stages.0.film.scale_shift.weight"),
        ({}, {"block": "moe"}, "holds no MLP for experts to start as"),
        ({}, {"block": "per_value"}, "holds no MLP for experts to start as"),
        ({"placement": "after"}, {}, "no experts in place of its MLPs"),
        ({"block": "mlp"}, {}, "no experts in place of its MLPs"),
        ({}, "nan", "NaN or infinity"),
        ({}, "cut", "no safetensors file, or damaged"),
        ({}, "missing", "no safetensors file, or damaged"),
    ],
)
def test_a_file_that_is_no_dense_one_of_its_sizes_leaves_the_network_as_it_was(
    tmp_path, model, file, words
):
    network, path = make(**model), tmp_path / "model.safetensors"
    before = copy.deepcopy(network.state_dict())
    dense = make(**{"block": "mlp", "hidden": 2, **(file if isinstance(file, dict) else {})})
    if file == "nan":
        dense.head.bias.data[0] = math.nan
    if file != "missing":
        saved(dense, path)
    if file == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=words) as caught:
        load_pretrained(network, path)
    assert str(path) in str(caught.value)
    assert all(torch.equal(before[n], value) for n, value in network.state_dict().items())


def test_other_files_of_weights_are_not_for_it(tmp_path):
    with pytest.raises(WeightsError, match=r"a UNet takes a file that ends in .safetensors"):
        load_pretrained(make(), tmp_path / "ViT-B_16.npz")


# Names


def test_the_names_of_a_state_dict_stay():
    def names(model, part):
        return {n.split(part)[1] for n in model.state_dict() if n.startswith(part)}

    mlp = {"0.weight", "0.bias", "2.weight", "2.bias"}
    experts = {"w1_EHD", "b1_EH", "w2_EDH", "b2_ED", "router.w_A2ED", "router.b_A2E"}
    assert names(make(block="mlp"), "stages.1.mlp.") == mlp
    assert names(make(), "stages.1.mlp.") == experts
    after = make(placement="after")
    assert names(after, "stages.0.mlp.") == mlp
    assert names(after, "stages.0.after.") == experts
    assert isinstance(after.stages[0].after, DMoE)
    block = {f"convolutions.{n}.weight" for n in (0, 1, 3, 4)}
    block |= {"convolutions.1.bias", "convolutions.4.bias", *(f"mlp.{n}" for n in mlp)}
    assert {*make(block="film").state_dict()} == {
        *(f"stages.{n}.{name}" for n in (0, 1) for name in (*block, "film.scale_shift.weight")),
        *(f"decoder.0.{name}" for name in ("0.weight", "1.weight", "1.bias")),
        "head.weight",
        "head.bias",
    }
