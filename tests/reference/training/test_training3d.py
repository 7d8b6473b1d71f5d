"""The recipe for volumes, from a folder of NIfTI files to masks: the one loop that images use."""

import csv
import dataclasses
import functools
import json
import os
import signal

import nibabel
import numpy as np
import pytest
import torch
from harness.trainings import (
    assert_same_tree,
    history_of,
    in_fork,
    killed_at,
    needs_fork,
    state_of,
    train_in_ranks,
    weights_of,
)

from reference_models.__main__ import main
from reference_models.data import DataSettings
from reference_models.errors import RunError
from reference_models.models import resunet3d
from reference_models.recipes.framings import ImageFramingSettings, VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.presets import PRESETS
from reference_models.recipes.recipe import describe_grid, resolve_grid
from reference_models.training import checkpoints
from reference_models.training.loop import train
from reference_models.training.runs import Task, build_model

STAGES = ("T1", "T2", "T3")
# From the files' axes to right, front and top: as many scanners store, turned, and oblique.
AFFINES = (
    np.diag([-2.0, -2.0, 3.0, 1.0]),
    np.array([[0, 0, 3.0, 5], [-2.0, 0, 0, 7], [0, 2.0, 0, -9], [0, 0, 0, 1]]),
    np.array([[1.9, -0.6, 0, 0], [0.6, 1.9, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 1]]),
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten small CTs of a bright ball in a body, its outline the wider the later the stage."""
    root = tmp_path_factory.mktemp("ct")
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for n in range(10):
        affine = AFFINES[n % 3]
        shape = (34, 30, 22) if n % 3 != 1 else (30, 22, 34)
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        distance = np.linalg.norm((grid - np.array(shape) / 2) @ affine[:3, :3].T, axis=-1)
        image = np.where(distance < 28, 40, -1000) + 120 * (distance < 12)
        image = (image + rng.normal(0, 10, shape)).astype(np.int16)
        mask = (distance < 8 + 3 * (n % 3)).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(image, affine), root / f"imagesTr/case{n}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), root / f"labelsTr/case{n}.nii.gz")
        rows.append({"case": f"case{n}", "t_stage": STAGES[n % 3]})
    with (root / "attributes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["case", "t_stage"])
        table.writeheader()
        table.writerows(rows)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "tumour": 1},
        "numTraining": 10,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.fixture
def recipe(folder, tmp_path):
    """7 training cases, two patches of each: 3 steps an epoch."""
    return dataclasses.replace(
        PRESETS["small3d"],
        data=DataSettings("folder", root=folder, cache=tmp_path / "cache"),
        model=ResUNet3DSettings(features=2),
        framing=VolumeFramingSettings(spacing=(2.0, 2.0, 3.0), patch=(64, 32, 32), patches=2),
        out=tmp_path / "run",
        batch_size=4,
        epochs=2,
    )


@needs_fork
def test_killed_and_resumed_a_run_on_volumes_ends_as_if_it_had_never_stopped(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, checkpoint_every=2, out=tmp_path / "whole")
    whole = train(recipe)
    killed = dataclasses.replace(recipe, out=tmp_path / "killed", workers=1)
    for n, where in enumerate([1, 2, (os, "rename", 2), 4, (checkpoints, "save_last", 1)]):
        process = in_fork(killed_at, killed, n > 0, where)
        process.join()
        assert process.exitcode == -signal.SIGKILL, where
    resumed = train(killed, resume=True)
    assert_same_tree(weights_of(resumed), weights_of(whole))
    assert_same_tree(state_of(resumed), state_of(whole))
    assert (resumed / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    assert len(history_of(whole)) == 2


@needs_fork
def test_two_processes_train_on_volumes_as_one(recipe, tmp_path, monkeypatch):
    # Nothing random, and all but the loss in fp64: see test_training.
    insert_after = functools.partial(resunet3d.insert_after, dropout=0.0)
    monkeypatch.setattr(resunet3d, "insert_after", insert_after)
    forward = resunet3d.ResUNet3D.forward
    monkeypatch.setattr(
        resunet3d.ResUNet3D, "forward", lambda self, image: forward(self, image.double())
    )
    torch.set_default_dtype(torch.float64)
    try:
        quiet = dataclasses.replace(
            recipe,
            model=dataclasses.replace(recipe.model, noise="never"),
            optimizer="sgd",
            learning_rate=0.05,
        )
        one = train(dataclasses.replace(quiet, out=tmp_path / "one"))
        two = dataclasses.replace(quiet, out=tmp_path / "two", devices=2)
        codes, prints = train_in_ranks(two, tmp_path / "prints")
    finally:
        torch.set_default_dtype(torch.float32)
    assert codes == [0, 0], prints
    for row, other in zip(history_of(one), history_of(two.out), strict=True):
        assert row == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(weights_of(two.out), weights_of(one), rtol=1e-5, atol=1e-6)


def test_recomputing_in_backward_trains_to_the_same_weights(recipe, tmp_path):
    plain = train(dataclasses.replace(recipe, epochs=1))
    model = dataclasses.replace(recipe.model, gradient_checkpointing=True)
    saving = train(dataclasses.replace(recipe, epochs=1, out=tmp_path / "saving", model=model))
    torch.testing.assert_close(weights_of(saving), weights_of(plain), rtol=1e-3, atol=1e-4)


def test_the_median_spacing_becomes_numbers_of_the_run(recipe):
    framing = dataclasses.replace(recipe.framing, spacing="median")
    run = train(dataclasses.replace(recipe, framing=framing, epochs=0))
    kept = json.loads((run / "recipe.json").read_text(encoding="utf-8"))["recipe"]["framing"][
        "spacing"
    ]
    assert kept == [2.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": DataSettings("phantom")}, "phantom has 2D images, but the preset is for volumes"),
        ({"framing": VolumeFramingSettings(patch=(40, 32, 32))}, "patch: .*multiples of 32"),
        ({"framing": VolumeFramingSettings(patch=(32, 32, 32))}, "patch: .*not all of them 32"),
        ({"framing": VolumeFramingSettings(spacing=(0.0, 1.0, 1.0))}, "spacing: .*above 0"),
        ({"framing": VolumeFramingSettings(overlap=1.0)}, "overlap: got 1.0"),
        ({"framing": VolumeFramingSettings(foreground=1.5)}, "foreground: got 1.5"),
        ({"framing": VolumeFramingSettings(patches=0)}, "patches: got 0"),
        (
            {"framing": ImageFramingSettings(64, "whole")},
            "one of them is for 2D images and the other for volumes",
        ),
        ({"strategy": "fsdp"}, "got fsdp, which is for images only"),
        ({"model": ResUNet3DSettings(stages=(6,))}, "stages"),
    ],
)
def test_what_does_not_fit_volumes_is_said_before_anything_is_written(recipe, change, words):
    with pytest.raises(RunError, match=words):
        train(dataclasses.replace(recipe, **change))
    assert not recipe.out.exists()


def test_the_commands_lead_from_a_folder_of_cts_to_masks_that_lie_on_them(folder, tmp_path, capsys):
    run, cache = tmp_path / "run", str(tmp_path / "cache")
    data = ["--data", "folder", "--root", str(folder), "--cache", cache]
    assert main(["check", *data]) == 0
    flags = "--features=2 --spacing 2 2 3 --patch 64 32 32 --patches=2 --body --epochs=2 --out"
    assert main(["train", "small3d", *data, *flags.split(), str(run)]) == 0
    printed = capsys.readouterr().out
    assert "data.ct_window=" in printed
    assert "data.mni152" not in printed
    assert "patches of 64 x 32 x 32 voxels of 2 x 2 x 3 mm; a training step takes" in printed
    assert "data.phantom" not in printed
    assert main(["evaluate", "run", "--run", str(run)]) == 0
    assert main(["predict", "--run", str(run), "--split", "all"]) == 0
    summary = json.loads((run / "evaluation-test" / "summary.json").read_text(encoding="utf-8"))
    assert summary["unit"] == "mm"
    assert {c["name"] for c in summary["conditions"]} == {
        "as given", "shuffled", "wrong", "unknown",
    }  # fmt: skip
    masks = run / "predictions-all" / "masks"
    assert len(list(masks.iterdir())) == 10
    for n in range(10):
        image = nibabel.load(folder / f"imagesTr/case{n}_0000.nii.gz")
        mask = nibabel.load(masks / f"case{n}.nii.gz")
        assert mask.shape == image.shape
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert set(np.unique(mask.dataobj)) <= {0, 1}
    scored = ["evaluate", "predictions", "--folder", str(run / "evaluation-test" / "masks"), *data]
    assert main([*scored, "--out", str(tmp_path / "scored")]) == 0
    rows = [
        (path / "cases.csv").read_text(encoding="utf-8")
        for path in (run / "evaluation-test", tmp_path / "scored")
    ]
    assert rows[0] == rows[1]
    assert "error" not in capsys.readouterr().err


def test_the_median_spacing_is_rounded_but_never_to_nothing():
    recipe = PRESETS["paper3d"]
    grid = resolve_grid(recipe, (0.97656251, 2.9999999, 2e-5), (512, 512, 100)).framing
    assert grid.spacing == (0.976563, 3.0, 2e-5)


@pytest.mark.parametrize(
    ("median_size", "spacing", "patch"),
    [
        ((512, 512, 200), "median", (384, 384, 128)),
        ((120, 130, 30), "median", (128, 160, 32)),
        ((120, 130, 30), (2.0, 2.0, 2.0), (64, 96, 64)),  # voxels of 1 x 1 x 4 mm
        ((20, 31, 8), "median", (32, 64, 32)),  # the network needs one axis of more than 32
    ],
)
def test_the_papers_patch_is_no_larger_than_holds_the_median_volume(median_size, spacing, patch):
    recipe = PRESETS["paper3d"]
    recipe = dataclasses.replace(recipe, framing=VolumeFramingSettings(spacing=spacing))
    found = resolve_grid(recipe, (1.0, 1.0, 4.0), median_size)
    assert found.framing.patch == found.framing.shape == patch
    assert f"patches of {' x '.join(map(str, patch))} voxels of" in describe_grid(found)
    own = dataclasses.replace(found, framing=VolumeFramingSettings(patch=(384, 384, 128)))
    assert resolve_grid(own, (1.0, 1.0, 4.0), median_size).framing.patch == (384, 384, 128)


def test_a_recipe_edited_into_two_kinds_is_refused_when_its_run_is_read(recipe):
    edited = dataclasses.replace(recipe, framing=ImageFramingSettings(64, "whole"))
    with pytest.raises(RunError, match="one of them is for 2D images and the other for volumes"):
        build_model(edited, Task(1, ("background", "tumour"), (), ("CT",)))
