"""A TransUNet takes Google's and the paper's released weights whole, or says what does not fit.

Files are made with the entries that those are known to have, spelled out one by one and not by the
loader's tables; what a network computes from them is said once more in plain functions.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness.transunets import ATTRIBUTES, TINIES, TINY_HYBRID, TINY_VIT, images, make, run, stirred
from scipy import ndimage

from dmoe_layer import routing
from reference_models.data import DataSettings
from reference_models.data.phantom import PhantomSettings
from reference_models.models import transunet
from reference_models.models.transunet import MOE
from reference_models.models.weight_files import WeightsError
from reference_models.models.weights import load_google_npz, load_released_2d
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.presets import PRESETS
from reference_models.training.checkpoints import load_model
from reference_models.training.loop import train


def google_entries(config, *, class_token=True, grid=(2, 2), channels=3):
    """Random arrays by the names and in the shapes of `ViT-B_16.npz` and `R50+ViT-B_16.npz`."""
    d, h, hidden = config.dim, config.heads, config.mlp_dim
    shapes = {
        "cls": (1, 1, d),
        "head/kernel": (d, 10),
        "head/bias": (10,),
        "pre_logits/kernel": (d, d),
        "pre_logits/bias": (d,),
        "Transformer/posembed_input/pos_embedding": (1, class_token + grid[0] * grid[1], d),
        "Transformer/encoder_norm/scale": (d,),
        "Transformer/encoder_norm/bias": (d,),
        "embedding/kernel": (16, 16, channels, d),
        "embedding/bias": (d,),
    }
    for n in range(config.depth):
        block = f"Transformer/encoderblock_{n}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            shapes[f"{attention}/{part}/kernel"] = (d, h, d // h)
            shapes[f"{attention}/{part}/bias"] = (h, d // h)
        shapes[f"{attention}/out/kernel"] = (h, d // h, d)
        shapes[f"{attention}/out/bias"] = (d,)
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes[f"{block}/{norm}/scale"] = shapes[f"{block}/{norm}/bias"] = (d,)
        shapes[f"{block}/MlpBlock_3/Dense_0/kernel"] = (d, hidden)
        shapes[f"{block}/MlpBlock_3/Dense_0/bias"] = (hidden,)
        shapes[f"{block}/MlpBlock_3/Dense_1/kernel"] = (hidden, d)
        shapes[f"{block}/MlpBlock_3/Dense_1/bias"] = (d,)
    if config.stem_width is not None:
        width = cin = config.stem_width
        shapes["embedding/kernel"] = (1, 1, 16 * width, d)
        shapes["conv_root/kernel"] = (7, 7, channels, width)
        shapes["gn_root/scale"] = shapes["gn_root/bias"] = (1, 1, 1, width)
        for stage, units in enumerate(config.stem_units):
            cmid = width * 2**stage
            for unit in range(1, units + 1):
                name, cout = f"block{stage + 1}/unit{unit}", 4 * cmid
                shapes[f"{name}/conv1/kernel"] = (1, 1, cin, cmid)
                shapes[f"{name}/conv2/kernel"] = (3, 3, cmid, cmid)
                shapes[f"{name}/conv3/kernel"] = (1, 1, cmid, cout)
                norms = {"gn1": cmid, "gn2": cmid, "gn3": cout}
                if unit == 1:
                    shapes[f"{name}/conv_proj/kernel"] = (1, 1, cin, cout)
                    norms["gn_proj"] = cout
                for norm, c in norms.items():
                    shapes[f"{name}/{norm}/scale"] = shapes[f"{name}/{norm}/bias"] = (1, 1, 1, c)
                cin = cout
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def released_entries(config, *, n_classes=2, routers=3, n_experts=8):
    """Random tensors by the names and in the shapes of the paper's released 2D checkpoints."""
    d, hidden, top = config.dim, config.mlp_dim, config.decoder[0]
    shapes = {
        "transformer.embeddings.position_embeddings": (1, 4, d),
        "transformer.embeddings.patch_embeddings.weight": (d, 3, 16, 16),
        "transformer.embeddings.patch_embeddings.bias": (d,),
        "transformer.encoder.encoder_norm.weight": (d,),
        "transformer.encoder.encoder_norm.bias": (d,),
        "segmentation_head.0.weight": (n_classes, config.decoder[-1], 3, 3),
        "segmentation_head.0.bias": (n_classes,),
    }

    def linear(name, n_in, n_out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    def convolution(name, n_in, n_out):
        shapes[f"{name}.0.weight"] = (n_out, n_in, 3, 3)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.1.{part}"] = (n_out,)
        shapes[f"{name}.1.num_batches_tracked"] = ()

    for n in range(config.depth):
        layer = f"transformer.encoder.layer.{n}"
        for norm in ("attention_norm", "ffn_norm"):
            shapes[f"{layer}.{norm}.weight"] = shapes[f"{layer}.{norm}.bias"] = (d,)
        linear(f"{layer}.ffn.fc1", d, hidden)
        linear(f"{layer}.ffn.fc2", hidden, d)
        for part in ("query", "key", "value", "out"):
            linear(f"{layer}.attn.{part}", d, d)
    for a in range(routers):
        for part in ("topkroute_linear", "noise_linear"):
            linear(f"transformer.encoder.sparseMoE.router.{a}.{part}", d, n_experts)
    for e in range(n_experts if routers else 0):
        linear(f"transformer.encoder.sparseMoE.experts.{e}.net.0", d, 4 * d)
        linear(f"transformer.encoder.sparseMoE.experts.{e}.net.2", 4 * d, d)
    convolution("decoder.conv_more", d, top)
    for n, n_out in enumerate(config.decoder[1:]):
        convolution(f"decoder.blocks.{n}.conv1", config.decoder[n], n_out)
        convolution(f"decoder.blocks.{n}.conv2", n_out, n_out)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = 0.3 * torch.randn(shape, generator=generator)
        if name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            value = value.abs() + 0.5
        state[name] = value if shape else torch.tensor(11)
    return state


def released_logits(state, config, image, attributes):
    """What the paper's network computes from such a state, said once more, sample by sample."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def convolution(name, x):
        x = F.conv2d(x, state[f"{name}.0.weight"], padding=1)
        mean, variance = state[f"{name}.1.running_mean"], state[f"{name}.1.running_var"]
        weight, bias = state[f"{name}.1.weight"], state[f"{name}.1.bias"]
        return F.batch_norm(x, mean, variance, weight, bias).relu()

    def attend(name, x):
        heads = (config.heads, config.dim // config.heads)
        q, k, v = (
            linear(f"{name}.{part}", x).unflatten(1, heads).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        share = torch.softmax(q @ k.mT / heads[1] ** 0.5, -1)
        return linear(f"{name}.out", (share @ v).transpose(0, 1).flatten(1))

    def experts(x, a):
        name = "transformer.encoder.sparseMoE"
        y = torch.zeros_like(x)
        for t, token in enumerate(x):
            scores, chosen = linear(f"{name}.router.{a}.topkroute_linear", token).topk(2)
            for gate, e in zip(scores.softmax(0), chosen.tolist(), strict=True):
                hidden = linear(f"{name}.experts.{e}.net.0", token).relu()
                y[t] += gate * linear(f"{name}.experts.{e}.net.2", hidden)
        return y

    logits = []
    for sample, a in zip(image, attributes.tolist(), strict=True):
        patches = F.conv2d(
            sample[None],
            state["transformer.embeddings.patch_embeddings.weight"],
            state["transformer.embeddings.patch_embeddings.bias"],
            stride=16,
        )
        x = patches[0].flatten(1).T + state["transformer.embeddings.position_embeddings"][0]
        for n in range(config.depth):
            layer = f"transformer.encoder.layer.{n}"
            x = x + attend(f"{layer}.attn", norm(f"{layer}.attention_norm", x))
            hidden = F.gelu(linear(f"{layer}.ffn.fc1", norm(f"{layer}.ffn_norm", x)))
            x = x + linear(f"{layer}.ffn.fc2", hidden)
            x = x + experts(x, a)
        x = norm("transformer.encoder.encoder_norm", x).T.reshape(1, -1, *patches.shape[2:])
        x = convolution("decoder.conv_more", x)
        for n in range(4):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            x = convolution(f"decoder.blocks.{n}.conv1", x)
            x = convolution(f"decoder.blocks.{n}.conv2", x)
        head = state["segmentation_head.0.weight"], state["segmentation_head.0.bias"]
        logits.append(F.conv2d(x, *head, padding=1))
    return torch.cat(logits)


def save_npz(path, entries):
    np.savez(path, **entries)
    return path


def save_pth(path, state):
    torch.save(state, path)
    return path


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def google_map(entries, config, image):
    """The ViT's normalised tokens, as a map, from Google's arrays in Google's order of axes.

    And the stem's maps: its root's and those of its stages.
    """
    w = {name: torch.from_numpy(array).double() for name, array in entries.items()}

    def norm(name, x):
        scale, bias = w[f"{name}/scale"], w[f"{name}/bias"]
        return F.layer_norm(x, scale.shape, scale, bias, 1e-6)

    def convolution(name, x, stride=1):
        kernel = w[f"{name}/kernel"].permute(3, 2, 0, 1)
        mean, std = kernel.mean((1, 2, 3)), (kernel.var((1, 2, 3), correction=0) + 1e-5).sqrt()
        kernel = (kernel - mean[:, None, None, None]) / std[:, None, None, None]
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def group_norm(name, x, groups, epsilon=1e-6):
        scale, bias = w[f"{name}/scale"].flatten(), w[f"{name}/bias"].flatten()
        return F.group_norm(x, groups, scale, bias, epsilon)

    x, maps = image, []
    if config.stem_width is not None:
        x = group_norm("gn_root", convolution("conv_root", x, 2), config.stem_groups).relu()
        maps.append(x)
        x = F.max_pool2d(x, 3, 2)
        for stage, units in enumerate(config.stem_units, start=1):
            for unit in range(1, units + 1):
                name, stride = f"block{stage}/unit{unit}", 2 if stage > 1 and unit == 1 else 1
                y = x
                for n, step in ((1, 1), (2, stride), (3, 1)):
                    y = convolution(f"{name}/conv{n}", y, step)
                    y = group_norm(f"{name}/gn{n}", y, config.stem_groups)
                    y = y.relu() if n < 3 else y
                if unit == 1:
                    x = convolution(f"{name}/conv_proj", x, stride)
                    x = group_norm(f"{name}/gn_proj", x, x.shape[1], 1e-5)
                x = (x + y).relu()
            maps.append(x)
    kernel = w["embedding/kernel"].permute(3, 2, 0, 1)
    x = F.conv2d(x, kernel, w["embedding/bias"], stride=kernel.shape[-1])
    grid = x.shape[2:]
    x = x.flatten(2).mT + w["Transformer/posembed_input/pos_embedding"][:, 1:]
    for n in range(config.depth):
        block = f"Transformer/encoderblock_{n}"
        name = f"{block}/MultiHeadDotProductAttention_1"
        y = norm(f"{block}/LayerNorm_0", x)
        q, k, v = (
            torch.einsum("btd,dhe->bhte", y, w[f"{name}/{part}/kernel"])
            + w[f"{name}/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
        y = torch.einsum("bhte,hed->btd", y, w[f"{name}/out/kernel"]) + w[f"{name}/out/bias"]
        x = x + y
        name = f"{block}/MlpBlock_3"
        y = norm(f"{block}/LayerNorm_2", x)
        y = F.gelu(y @ w[f"{name}/Dense_0/kernel"] + w[f"{name}/Dense_0/bias"])
        x = x + y @ w[f"{name}/Dense_1/kernel"] + w[f"{name}/Dense_1/bias"]
    return norm("Transformer/encoder_norm", x).mT.unflatten(2, grid), maps


def vit_of(model, image):
    """What enters the decoder from the ViT."""
    with routing(ATTRIBUTES):
        return model.vit(image if model.stem is None else model.stem(image)[0])


@pytest.mark.parametrize("moe", ["none", "mlp"])
@pytest.mark.parametrize("config", TINIES.values(), ids=TINIES)
def test_googles_arrays_give_googles_features_upcycled_too(config, moe, tmp_path):
    entries = google_entries(config)
    model = stirred(make(config, moe=moe)).double().eval()
    before = snapshot(model)
    load_google_npz(model, save_npz(tmp_path / "ViT.npz", entries))
    image = images().double()
    expected, maps = google_map(entries, config, image)
    torch.testing.assert_close(vit_of(model, image), expected, rtol=1e-9, atol=1e-9)
    if model.stem is not None:
        root, quarter, eighth, _ = maps
        skips = [eighth, F.pad(quarter, (0, 1, 0, 1)), root]
        torch.testing.assert_close(model.stem(image)[1], skips, rtol=1e-9, atol=1e-9)
    changed = {n.split(".")[0] for n, v in snapshot(model).items() if not torch.equal(v, before[n])}
    assert changed == ({"vit"} if config is TINY_VIT else {"stem", "vit"})


@pytest.mark.parametrize("moe", MOE)
def test_google_loading_replaces_all_but_decoder_head_and_experts(moe, tmp_path):
    model = stirred(make(TINY_HYBRID, moe=moe))
    before = snapshot(model)
    load_google_npz(model, save_npz(tmp_path / "R50.npz", google_entries(TINY_HYBRID)))
    kept = {n for n, v in model.state_dict().items() if torch.equal(v, before[n])}
    assert kept == {
        n for n in before if n.startswith(("decoder.", "head.", "vit.moe.")) or ".router." in n
    }


@pytest.mark.parametrize("grid", [(2, 2), (5, 3)])
@pytest.mark.parametrize("class_token", [True, False])
def test_the_position_table_is_resized_as_google_does_it(grid, class_token, tmp_path):
    entries = google_entries(TINY_VIT, grid=(3, 3), class_token=class_token)
    model = make(image_size=(16 * grid[0], 16 * grid[1]))
    load_google_npz(model, save_npz(tmp_path / "ViT.npz", entries))
    table = entries["Transformer/posembed_input/pos_embedding"][0, class_token:]
    expected = ndimage.zoom(table.reshape(3, 3, -1), (grid[0] / 3, grid[1] / 3, 1), order=1)
    expected = torch.from_numpy(expected).permute(2, 0, 1)[None]
    torch.testing.assert_close(model.vit.positions_1DHW.data, expected)


def test_group_norms_of_newer_files_have_one_axis_and_heads_may_be_missing(tmp_path):
    entries = google_entries(TINY_HYBRID)
    old, new = make(TINY_HYBRID), make(TINY_HYBRID)
    load_google_npz(old, save_npz(tmp_path / "old.npz", entries))
    newer = {n: a.reshape(-1) if "gn" in n else a for n, a in entries.items()}
    newer = {n: a for n, a in newer.items() if not n.startswith(("head", "pre_logits", "cls"))}
    load_google_npz(new, save_npz(tmp_path / "new.npz", newer))
    for name, value in old.state_dict().items():
        if name.startswith("stem."):
            assert torch.equal(value, new.state_dict()[name])


def test_an_npz_that_does_not_fit_is_one_error_that_names_everything(tmp_path):
    entries = google_entries(TINY_VIT)
    del entries["Transformer/encoderblock_2/LayerNorm_2/scale"]
    del entries["embedding/bias"]
    entries["Transformer/encoderblock_3/LayerNorm_0/scale"] = np.zeros(24, np.float32)
    entries["surprise"] = np.zeros(1, np.float32)
    entries["embedding/kernel"] = np.zeros((8, 8, 3, 24), np.float32)
    kernel = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"
    entries[kernel] = entries[kernel].reshape(24, 4, 6)  # four heads
    entries["Transformer/encoder_norm/scale"][3] = np.nan
    model = make()
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        load_google_npz(model, save_npz(tmp_path / "ViT.npz", entries))
    head, missing, left, wrong = str(caught.value).splitlines()
    assert str(tmp_path / "ViT.npz") in head
    assert missing == ("  missing: embedding/bias, Transformer/encoderblock_2/LayerNorm_2/scale.")
    assert left == "  left over: Transformer/encoderblock_3/LayerNorm_0/scale, surprise."
    assert "embedding/kernel has shape (8, 8, 3, 24), expected (16, 16, 3, 24)" in wrong
    assert f"{kernel} has shape (24, 4, 6), expected (24, 3, 8)" in wrong
    assert "Transformer/encoder_norm/scale holds NaN" in wrong
    assert_unchanged(model, before)


@pytest.mark.parametrize("positions", [(1, 7, 24), (1, 0, 24), (4, 24), (1, 5, 20), ()])
def test_a_position_table_of_no_square_is_an_error(positions, tmp_path):
    entries = google_entries(TINY_VIT)
    name = "Transformer/posembed_input/pos_embedding"
    entries[name] = np.zeros(positions, np.float32)
    with pytest.raises(WeightsError, match=f"{name} has shape"):
        load_google_npz(make(), save_npz(tmp_path / "ViT.npz", entries))


def test_the_other_networks_npz_is_an_error(tmp_path):
    plain = save_npz(tmp_path / "ViT.npz", google_entries(TINY_VIT))
    hybrid = save_npz(tmp_path / "R50.npz", google_entries(TINY_HYBRID))
    with pytest.raises(WeightsError, match=r"left over: block1/unit1/conv1/kernel.*gn_root/scale"):
        load_google_npz(make(), hybrid)
    with pytest.raises(WeightsError, match=r"missing: .*conv_root/kernel"):
        load_google_npz(make(TINY_HYBRID), plain)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_nothing_is_unpickled(tmp_path):
    mark, entries = tmp_path / "mark", google_entries(TINY_VIT)
    entries["embedding/bias"] = np.array([Trap(mark)], dtype=object)
    with pytest.raises(WeightsError, match=r"'embedding/bias'.*Pickled objects are not loaded"):
        load_google_npz(make(), save_npz(tmp_path / "ViT.npz", entries))
    state = {**released_entries(TINY_VIT), "trap": Trap(mark)}
    with pytest.raises(WeightsError, match=r"not unpickled.*state_dict"):
        load_released_2d(make(), save_pth(tmp_path / "best.pth", state))
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "bits", "text"])
@pytest.mark.parametrize("load", [load_google_npz, load_released_2d])
def test_a_damaged_file_is_an_error_that_names_it(load, damage, tmp_path):
    path = tmp_path / "weights.npz"
    if load is load_google_npz:
        save_npz(path, google_entries(TINY_VIT))
    else:
        save_pth(path, released_entries(TINY_VIT))
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(
            {
                "empty": b"",
                "cut": content[:middle],
                "bits": content[:200] + bytes(b ^ 255 for b in content[200:middle]),
                "text": b"<html>404</html>",
            }[damage]
        )
    model = make()
    before = snapshot(model)
    with pytest.raises(WeightsError, match=r"weights\.npz"):
        load(model, path)
    assert_unchanged(model, before)


def test_a_released_checkpoint_gives_the_released_networks_logits(tmp_path):
    state = {
        name: value.double() if value.ndim else value
        for name, value in released_entries(TINY_VIT).items()
    }
    prefixed = {f"module.{name}": value for name, value in state.items()}  # by DataParallel
    model = stirred(make(attribute_sizes=3)).double().eval()
    load_released_2d(model, save_pth(tmp_path / "epoch_9.pth", prefixed))
    image = images().double()
    expected = released_logits(state, TINY_VIT, image, ATTRIBUTES)
    torch.testing.assert_close(run(model, image), expected, rtol=1e-9, atol=1e-9)
    other = released_logits(state, TINY_VIT, image, torch.tensor([1, 1, 1]))
    assert (other - expected).abs().max() > 1e-2  # the experts are seen in the logits


def test_every_number_of_a_released_checkpoint_is_in_the_network(tmp_path):
    # 297 tensors: those of the three routers and the twelve blocks that the paper has.
    assert len(released_entries(dataclasses.replace(TINY_VIT, depth=12))) == 297
    state = released_entries(TINY_VIT)
    model = stirred(make(attribute_sizes=3))
    load_released_2d(model, save_pth(tmp_path / "best.pth", state))
    theirs = torch.cat([v.flatten() for v in state.values() if v.ndim]).sort().values
    ours = model.state_dict()
    batches = [v for n, v in ours.items() if n.endswith("num_batches_tracked")]
    assert batches == [11] * 9
    ours = torch.cat([v.flatten() for v in ours.values() if v.ndim]).sort().values
    assert torch.equal(theirs, ours)


def test_a_released_network_without_experts_loads_too(tmp_path):
    state = released_entries(TINY_VIT, routers=0)
    model = stirred(make(moe="none"))
    load_released_2d(model, save_pth(tmp_path / "best.pth", state))
    assert torch.equal(model.head.weight, state["segmentation_head.0.weight"])


@pytest.mark.parametrize(
    ("made", "file", "said"),
    [
        ({"attribute_sizes": 4}, {}, "3 routers.*attribute_sizes=3"),
        ({"attribute_sizes": 2, "unknown": "learned"}, {}, "3 routers.*unknown='error'"),
        ({"attribute_sizes": 3, "unknown": "learned"}, {}, "3 routers.*unknown='error'"),
        ({"attribute_sizes": None}, {}, "3 routers.*attribute_sizes=3"),
        ({"moe": "none"}, {}, "3 routers.*moe='shared'"),
        ({"moe": "mlp"}, {}, "3 routers.*moe='shared'"),
        ({}, {"routers": 0}, "0 routers.*moe='none'"),
        ({}, {"n_classes": 5}, "5 classes.*n_classes=5"),
        ({"n_experts": 4}, {}, r"left over: transformer.encoder.sparseMoE.experts.4.net.0.bias"),
        ({"variant": TINY_HYBRID}, {}, 'no stem.*variant="vit_b16"'),
    ],
)
def test_another_network_than_the_released_ones_is_told_what_differs(made, file, said, tmp_path):
    path = save_pth(tmp_path / "best.pth", released_entries(TINY_VIT, **file))
    made = dict(made)
    model = make(made.pop("variant", TINY_VIT), **made)
    before = snapshot(model)
    with pytest.raises(WeightsError, match=said):
        load_released_2d(model, path)
    assert_unchanged(model, before)


def test_released_entries_that_are_missing_or_left_over_are_listed(tmp_path):
    state = released_entries(TINY_VIT)
    del (
        state["decoder.blocks.1.conv2.1.running_var"],
        state["transformer.encoder.layer.2.attn.key.bias"],
    )
    state["optimizer"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_released_2d(make(), save_pth(tmp_path / "best.pth", state))
    assert str(caught.value).splitlines()[1:] == [
        "  missing: transformer.encoder.layer.2.attn.key.bias, "
        "decoder.blocks.1.conv2.1.running_var.",
        "  left over: optimizer.",
    ]


def test_a_checkpoint_that_holds_more_than_a_state_dict_is_an_error(tmp_path):
    path = save_pth(tmp_path / "best.pth", {"model": released_entries(TINY_VIT), "epoch": 3})
    with pytest.raises(WeightsError, match=r"a dict of model, epoch.*state_dict"):
        load_released_2d(make(), path)


def test_a_run_of_no_epochs_keeps_a_released_checkpoint_for_evaluation(tmp_path, monkeypatch):
    monkeypatch.setitem(transunet.VARIANTS, "vit_b16", TINY_VIT)
    phantom = PhantomSettings(cases=20, test_cases_per_group=1, image_size=32)
    entries = released_entries(TINY_VIT, n_classes=3)
    recipe = dataclasses.replace(
        PRESETS["small"],
        data=DataSettings("phantom", phantom=phantom),
        framing=ImageFramingSettings(32, "whole", "shift"),
        epochs=0,
        out=tmp_path / "run",
    )

    def given(path):
        model = dataclasses.replace(recipe.model, variant="vit_b16", weights=path)
        return dataclasses.replace(recipe, model=model)

    train(given(save_pth(tmp_path / "epoch_299.pth", entries)))
    _, _, model = load_model(recipe.out)
    image = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    state = {name: value.double() if value.ndim else value for name, value in entries.items()}
    expected = released_logits(state, TINY_VIT, image.expand(-1, 3, -1, -1), ATTRIBUTES)
    torch.testing.assert_close(run(model.double(), image), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(WeightsError, match=r"\.npz or \.pth"):
        train(dataclasses.replace(given(tmp_path / "weights.bin"), out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()
