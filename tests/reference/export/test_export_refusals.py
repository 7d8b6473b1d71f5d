"""`export` says what is wrong in one sentence, before anything is written."""

import builtins
import json

import pytest
import torch
from harness.exported_runs import small_recipe, write_untrained

from reference_models.__main__ import main
from reference_models.data import DataSettings
from reference_models.data.cases import Attribute
from reference_models.data.datasets import DATASETS
from reference_models.data.intensities import scale
from reference_models.errors import RunError
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.export.command import ExportSettings, export
from reference_models.export.description import SCALES, describe
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.runs import Task


def refused(settings, *quotes):
    before = sorted(settings.to.parent.iterdir()) if settings.to.parent.is_dir() else None
    with pytest.raises(RunError) as caught:
        export(settings)
    for quote in quotes:
        assert quote in str(caught.value), str(caught.value)
    if before is not None:
        assert sorted(settings.to.parent.iterdir()) == before


def test_a_target_that_cannot_be_written_is_refused_first(tmp_path):
    run, to = tmp_path / "no-run", tmp_path / "model.onnx"
    refused(ExportSettings(run, tmp_path / "model.bin"), "model.bin", ".onnx or .pt2")
    to.write_bytes(b"mine")
    refused(ExportSettings(run, to), "model.onnx: is there already", "remove it")
    assert to.read_bytes() == b"mine"
    refused(ExportSettings(run, tmp_path / "no" / "model.pt2"), "cannot be written", "another --to")
    refused(ExportSettings(run, to / "model.pt2"), "cannot be written")


def test_what_is_no_run_or_has_no_checkpoint_is_refused(tmp_path):
    to = tmp_path / "model.pt2"
    refused(ExportSettings(tmp_path / "nothing", to), "no run here")
    run = write_untrained(tmp_path / "run", small_recipe())
    refused(ExportSettings(run, to, which="last"), "no last checkpoint yet", "there is a best one")
    (run / "recipe.json").write_text('{"of": "another tool"}', encoding="utf-8")
    refused(ExportSettings(run, to), "recipe.json: not a run's recipe")


NOT_TOLD = "has no experts that are told attributes"


@pytest.mark.parametrize(
    ("settings", "quote"),
    [
        ({"block": "mlp"}, NOT_TOLD),
        ({"aware": False}, NOT_TOLD),
        ({"block": "film"}, NOT_TOLD),
        ({"noise": "always"}, "--noise always"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_network_that_is_told_nothing_or_draws_noise_is_refused(settings, quote, tmp_path):
    run = write_untrained(tmp_path / "run", small_recipe(**settings))
    refused(ExportSettings(run, tmp_path / "model.pt2"), str(run), quote)


def test_a_missing_onnxruntime_is_one_sentence_of_what_to_install(tmp_path, monkeypatch, capsys):
    run = write_untrained(tmp_path / "run", small_recipe())
    (tmp_path / "there.onnx").write_bytes(b"")
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("onnxruntime"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(ExportSettings(run, tmp_path / "m.onnx"), "onnxruntime cannot", "'.[export]'")
    with pytest.raises(RunError, match=r"onnxruntime cannot be imported"):
        predict(PredictSettings(run, onnx=tmp_path / "there.onnx"))
    assert main(["export", "--run", str(run), "--to", str(tmp_path / "m.onnx")]) == 1
    told = capsys.readouterr().err
    assert "onnxruntime cannot be imported here" in told
    assert "Traceback" not in told


SITE = Attribute("site", ("A", "B"))
CHANNELS = ("CT", "noNorm", "rescale_to_0_1", "rgb_to_0_1", "T1")


def test_the_files_numbers_are_what_the_data_sets_do(tmp_path):
    assert SCALES.keys() == DATASETS.keys() - {"folder"}  # whose channels have names
    recipe = Recipe(
        DataSettings("folder", ct_window=(-100.0, 300.0)),
        ResUNet3DSettings(unknown="learned"),
        VolumeFramingSettings((1.0, 2.0, 3.0), (64, 32, 32), overlap=0.25, body=True),
    )
    task = Task(4, ("background", "tumour"), (SITE,), CHANNELS)
    said = {k: json.loads(v) for k, v in described(recipe, task).items()}
    assert said["dmoe_layer.attributes"] == [
        {"name": "site", "size": 2, "values": ["A", "B"], "unknown": "learned"}
    ]
    assert said["reference_models.classes"] == ["background", "tumour"]
    assert said["reference_models.framing"] == {
        "kind": "volume", "spacing_mm": [1.0, 2.0, 3.0], "window": [64, 32, 32], "overlap": 0.25,
    }  # fmt: skip
    *channels, body = said["reference_models.channels"]
    assert body == {"name": "body", "scale": "body"}
    for channel in channels:
        voxels = torch.randn(4, 5, 6).mul(200).round().numpy()
        voxels[0] = 0
        if channel["scale"] == "divide":
            voxels = abs(voxels) % 256
        true = scale(channel["name"], "a.nii", voxels.copy(), recipe.data.ct_window)
        torch.testing.assert_close(scaled(voxels, channel), true, rtol=1e-4, atol=1e-5)


def described(recipe, task):
    said = describe(recipe, task, torch.nn.Linear(1, 1))
    return {key: text for key, text in said.items() if not key.endswith("weights")}


def scaled(voxels, channel):
    """As docs/recipes/export.md shows it."""
    if channel["scale"] == "clip":
        low, high = channel["low"], channel["high"]
        return (voxels.clip(low, high) - low) / (high - low)
    if channel["scale"] == "divide":
        return voxels / channel["by"]
    if channel["scale"] == "range":
        return (voxels - voxels.min()) / (voxels.max() - voxels.min())
    if channel["scale"] == "z-score":
        inside = voxels[voxels != 0]
        return (voxels - inside.mean()) / inside.std()
    assert channel["scale"] == "none"
    return voxels
