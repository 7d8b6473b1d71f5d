"""A TransUNet takes Google's and the paper's released weights whole, or says what does not fit.

Files are made with the entries that those are known to have, spelled out one by one and not by the
loader's tables; what a network computes from them is said once more in plain functions.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness.transunet_weights import (
    assert_unchanged,
    google_entries,
    google_map,
    released_entries,
    released_logits,
    save_npz,
    save_pth,
    snapshot,
    vit_of,
)
from harness.transunets import ATTRIBUTES, TINIES, TINY_HYBRID, TINY_VIT, images, make, run, stirred
from scipy import ndimage

from reference_models.data import DataSettings
from reference_models.data.phantom import PhantomSettings
from reference_models.models import transunet
from reference_models.models.transunet import MOE
from reference_models.models.weight_files import WeightsError
from reference_models.models.weights2d import load_google_npz, load_released_2d
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.presets import PRESETS
from reference_models.training.checkpoints import load_model
from reference_models.training.loop import train


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
