"""A folder of 2D images goes all the way: training, resuming, scores, predictions, an export."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from harness.evaluations import FEW, read_json
from harness.exported_runs import masks_in, write_untrained
from harness.image_folders import nnunet_images, nodule
from harness.trainings import weights_of
from PIL import Image

from reference_models.data import DataSettings, open_dataset
from reference_models.errors import RunError
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
    EvaluateRun,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.export.command import ExportSettings, export
from reference_models.export.description import describe
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.networks import UNetSettings
from reference_models.recipes.presets import PRESETS
from reference_models.recipes.recipe import Recipe, resolve
from reference_models.training.loop import train
from reference_models.training.runs import Task, read_run


def recipe_of(root, crop="whole", **changes):
    network = UNetSettings(widths=(4,), hidden=2, n_experts=3)
    framing = ImageFramingSettings(16, crop, "none")
    recipe = Recipe(DataSettings("folder", root), network, framing, batch_size=4, epochs=1)
    return dataclasses.replace(recipe, **changes)


@pytest.fixture
def settings(tmp_path):
    return nnunet_images(tmp_path / "data", n=12)


def test_a_run_is_trained_scored_and_resumed_by_the_former_name_too(tmp_path, settings, capsys):
    recipe = recipe_of(settings.root, "paper", out=tmp_path / "run")
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, cache=tmp_path / "cache")
    )
    run = train(recipe)
    assert "2 steps in all, which is few to learn by" in capsys.readouterr().out
    assert read_run(run)[0].framing.crop == "whole"
    weights = weights_of(run)
    content = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    assert content["recipe"]["data"]["data"] == "folder"
    for name, where in (("recipe.json", ("recipe", "data", "data")), ("splits.json", ("dataset",))):
        content = json.loads((run / name).read_text(encoding="utf-8"))
        *rooms, last = where
        place = content
        for room in rooms:
            place = place[room]
        assert place[last] == "folder"
        place[last] = "nifti"  # as earlier versions wrote it
        (run / name).write_text(json.dumps(content), encoding="utf-8")
    train(recipe, resume=True)
    assert all((value == weights_of(run)[name]).all() for name, value in weights.items())
    summary = evaluate_run(EvaluateRun(run, scoring=FEW))
    assert (summary.dataset, summary.unit) == ("folder", "px")
    assert read_json(run / "evaluation-test")["dataset"] == "folder"
    assert "data:image" in (run / "evaluation-test/report.html").read_text(encoding="utf-8")
    masks = masks_in(run / "evaluation-test/masks")
    assert {mask.shape for mask in masks.values()} == {(20, 30)}


def test_images_without_masks_are_predicted_as_they_are_with_them(tmp_path, settings):
    run = write_untrained(tmp_path / "run", recipe_of(settings.root))
    there = masks_in(predict(PredictSettings(run, split="all", out=tmp_path / "a")) / "masks")
    bare = tmp_path / "bare"
    bare.mkdir()
    (settings.root / "imagesTr").rename(bare / "imagesTs")
    (settings.root / "dataset.json").rename(bare / "dataset.json")
    (settings.root / "attributes.csv").rename(bare / "attributes.csv")
    again = predict(PredictSettings(run, root=bare, split="all", out=tmp_path / "b"))
    found = masks_in(again / "masks")
    assert found.keys() == there.keys() == {f"u{i}.png" for i in range(12)}
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, there[name])
        with Image.open(again / "overlays" / name) as seen:
            assert (seen.size, seen.mode) == ((30, 30), "RGB")  # the prediction and its title


def test_an_exported_file_tells_how_a_folders_images_are_framed_and_scaled(settings):
    task = Task.of(open_dataset(settings))
    said = describe(recipe_of(settings.root), task, torch.nn.Linear(1, 1))
    assert json.loads(said["reference_models.channels"]) == [
        {"name": "ultrasound", "scale": "z-score"}
    ]
    assert json.loads(said["reference_models.framing"]) == {
        "kind": "image", "crop": None, "size": [16, 16],
    }  # fmt: skip


@pytest.mark.slow
def test_an_exported_file_predicts_a_folders_images_as_its_network_does(tmp_path, settings):
    pytest.importorskip("onnxruntime")
    run = write_untrained(tmp_path / "run", recipe_of(settings.root))
    export(ExportSettings(run, tmp_path / "m.onnx"))
    own = masks_in(predict(PredictSettings(run, out=tmp_path / "a")) / "masks")
    with_onnx = PredictSettings(run, out=tmp_path / "b", onnx=tmp_path / "m.onnx")
    for name, mask in masks_in(predict(with_onnx) / "masks").items():
        assert (mask != own[name]).mean() < 0.01


def test_masks_of_other_tools_are_scored_in_any_ending_that_keeps_labels(tmp_path, settings):
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(12):
        Image.fromarray(nodule(i)).save(masks / f"u{i}{('.png', '.tif', '.bmp', '.TIFF')[i % 4]}")
    summary = evaluate_predictions(
        EvaluatePredictions(masks, settings, "all", out=tmp_path / "out", scoring=FEW)
    )
    assert summary.n_cases == 12
    (condition,) = summary.conditions
    regions = {scores.region: scores for scores in condition.scores["site"]}
    assert all(
        group.metrics["dice"].value == 1 for scores in regions.values() for group in scores.groups
    )


def test_whether_a_preset_fits_is_found_in_the_folder(settings):
    for name in ("paper", "small"):
        recipe = resolve(dataclasses.replace(PRESETS[name], data=settings))
        assert recipe.framing.crop == "whole"
    assert resolve(dataclasses.replace(PRESETS["paper"], data=settings)).epochs == 100
    with pytest.raises(RunError, match=r"^data: .*data has 2D images, but the preset is for volu"):
        resolve(dataclasses.replace(PRESETS["small3d"], data=settings))
    path = settings.root / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"file_ending": ".nii.gz"}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=r"^data: .*data has volumes, but the preset is for 2D im"):
        resolve(dataclasses.replace(PRESETS["small"], data=settings))
    assert resolve(dataclasses.replace(PRESETS["small3d"], data=settings)).model.axes == 3
