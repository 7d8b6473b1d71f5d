"""Volumes by a trained run's own way, from files to files: scores in mm, masks, pictures."""

import dataclasses
import itertools
import json

import nibabel
import numpy as np
import pytest
from harness.evaluations import FEW
from harness.volumes import Threshold, stored_as

from reference_models.data import DataSettings
from reference_models.data.folder import Folder
from reference_models.data.splits import Splits
from reference_models.errors import DataError
from reference_models.evaluation import masks as mask_files
from reference_models.evaluation import trained_run
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
    EvaluateRun,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.runs import Task

pytestmark = pytest.mark.usefixtures("one_thread")


# A plate across the axis from left to right, back to front or below to above, found one voxel
# further along it, and how the file stores the axes.
PLATES = {"a.1": (0, "LPS"), "b": (1, "SAR"), "c": (2, "AIL")}


SPACING = (0.5, 1.5, 4.0)


@pytest.fixture
def folder(tmp_path):
    """Three volumes with a plate each, stored each its own way, and a fourth without a label."""
    root = tmp_path / "data"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (root / name).mkdir(parents=True)
    rows = ["case,stage"]
    for number, (case, (axis, axes)) in enumerate(PLATES.items()):
        truth, found = np.zeros((2, 24, 20, 36), np.int16)
        plate = [slice(5, 9)] * 3
        plate[axis] = slice(10, 11)
        truth[tuple(plate)] = 1
        plate[axis] = slice(11, 12)
        found[tuple(plate)] = 1
        for name, array in ((f"imagesTr/{case}_0000", found), (f"labelsTr/{case}", truth)):
            stored, affine = stored_as(axes, SPACING, array)
            nibabel.save(nibabel.Nifti1Image(stored, affine), root / f"{name}.nii.gz")
        rows.append(f"{case},T{number + 1}")
    nibabel.save(nibabel.Nifti1Image(stored * 0, affine), root / "imagesTs/new_0000.nii.gz")
    (root / "attributes.csv").write_text("\n".join([*rows, "new,T1"]) + "\n", encoding="utf-8")
    layout = {"channel_names": {"0": "noNorm"}, "labels": {"background": 0, "plate": 1}}
    (root / "dataset.json").write_text(
        json.dumps({**layout, "file_ending": ".nii.gz"}), encoding="utf-8"
    )
    return root


@pytest.fixture
def run_of(folder, tmp_path, monkeypatch):
    """Puts a network in the place of a trained run; returns the run's folder, and its network."""

    def place(model=None, test=(*PLATES,)):
        dataset = Folder(folder, (), None)
        recipe = Recipe(
            data=DataSettings("folder", root=folder),
            model=ResUNet3DSettings(),
            framing=VolumeFramingSettings(spacing=SPACING, patch=(32, 32, 32)),
            batch_size=2,
        )
        model = model or Threshold(3)
        loaded = (recipe, Task.of(dataset), model)
        monkeypatch.setattr(trained_run, "load_model", lambda run, which, **_: loaded)
        splits = Splits("nifti", 0, (), (), test)
        monkeypatch.setattr(trained_run, "read_splits", lambda *_, **__: splits)
        monkeypatch.setattr(mask_files, "choose_splits", lambda *_, **__: splits)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        return run, model

    return place


def test_volumes_are_scored_in_mm_by_a_run_and_by_its_files_alike(run_of, folder, tmp_path):
    run, _ = run_of()
    own = evaluate_run(EvaluateRun(run, scoring=FEW))
    masks = run / "evaluation-test" / "masks"
    assert sorted(path.name for path in masks.iterdir()) == ["a.1.nii.gz", "b.nii.gz", "c.nii.gz"]
    again = evaluate_predictions(
        EvaluatePredictions(
            masks, DataSettings("folder", root=folder), out=tmp_path / "again", scoring=FEW
        )
    )
    assert again.conditions[0].scores == own.conditions[0].scores
    (region,) = own.conditions[0].scores["stage"]
    # Each voxel of a plate is one voxel across from the other plate.
    assert [group.metrics["hd95"].value for group in region.groups] == pytest.approx(SPACING)
    assert [group.metrics["dice"].value for group in region.groups] == [0, 0, 0]
    # Within 1 mm is the first alone.
    assert [group.metrics["surface_dice"].value for group in region.groups] == [1, 0, 0]
    assert own.unit == "mm"
    assert [row.count(0) for row in own.conditions[0].load["stage"]] != [2, 2, 2]
    for out in (run / "evaluation-test", tmp_path / "again"):
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "axial, coronal and sagittal" in page
        assert "millimetres" in page


def test_predicted_masks_lie_where_their_images_do_and_need_no_label(run_of, folder):
    run, _ = run_of()
    out = predict(PredictSettings(run, split="all"))
    assert sorted(path.name for path in (out / "overlays").iterdir()) == [
        "a.1.png", "b.png", "c.png", "new.png",
    ]  # fmt: skip
    for case in PLATES:
        image = nibabel.load(folder / f"imagesTr/{case}_0000.nii.gz")
        mask = nibabel.load(out / "masks" / f"{case}.nii.gz")
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.get_fdata(), image.get_fdata())
    assert not nibabel.load(out / "masks" / "new.nii.gz").get_fdata().any()


def test_every_volume_is_told_its_own_attribute(run_of):
    told = []

    class Listening(Threshold):
        def forward(self, image_BCS):
            _, routed = self.layer(image_BCS, return_routing=True)
            told.append(routed.attributes.unique().tolist())
            return super().forward(image_BCS)

    run, _ = run_of(Listening(3))
    predict(PredictSettings(run))
    assert [values for values, _ in itertools.groupby(told)] == [[0], [1], [2]]


def test_what_other_data_cannot_be_is_said_in_one_line(run_of, folder):
    run, _ = run_of()
    path = folder / "imagesTr/b_0000.nii.gz"
    image = nibabel.load(path)
    metres = nibabel.affines.from_matvec(image.affine[:3, :3] * 1000)
    for name in ("imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"):
        voxels = np.asarray(nibabel.load(folder / name).dataobj)
        nibabel.save(nibabel.Nifti1Image(voxels, metres), folder / name)
    with pytest.raises(DataError, match=r"b: its .* voxels of .* mm would become .* not in mm"):
        predict(PredictSettings(run, split="all"))
    # By the channel's name it is known how a volume's intensities are scaled.
    layout = folder / "dataset.json"
    layout.write_text(layout.read_text(encoding="utf-8").replace("noNorm", "CT"), encoding="utf-8")
    with pytest.raises(
        DataError,
        match=r"trained for other data: channel_names: .*noNorm.*, the data .*CT.\]\. Correct",
    ):
        predict(PredictSettings(run, split="all"))


def test_a_case_without_a_label_is_never_scored(run_of, folder, tmp_path):
    run, _ = run_of(test=("a.1", "new"))
    words = r"test: 1 cases have no true mask to be scored by \(new\)\. Take them out of the splits"
    with pytest.raises(DataError, match=words):
        evaluate_run(EvaluateRun(run, scoring=FEW))
    settings = EvaluatePredictions(
        folder / "labelsTr", DataSettings("folder", root=folder), out=tmp_path / "out", scoring=FEW
    )
    with pytest.raises(DataError, match=words):
        evaluate_predictions(settings)
    assert [*run.iterdir()] == []


def test_another_tools_masks_of_volumes_are_nifti(run_of, folder, tmp_path):
    run_of()
    settings = EvaluatePredictions(
        folder / "labelsTr", DataSettings("folder", root=folder), out=tmp_path / "out", scoring=FEW
    )
    assert dice_of(evaluate_predictions(settings)) == [1, 1, 1]
    # A mask that is turned, but not as its image, has the right size and the wrong place.
    path = folder / "labelsTr" / "b.nii.gz"
    image = nibabel.load(path)
    affine = image.affine @ np.diag([1.0, -1.0, 1.0, 1.0])
    other = tmp_path / "other"
    other.mkdir()
    for case in ("a.1", "c"):
        (other / f"{case}.nii.gz").write_bytes((folder / f"labelsTr/{case}.nii.gz").read_bytes())
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), other / "b.nii.gz")
    np.save(other / "b.npy", np.zeros((1,)))  # a tool's scores, say
    with pytest.raises(DataError, match=r"b\.nii\.gz: lies elsewhere") as caught:
        evaluate_predictions(dataclasses.replace(settings, folder=other))
    assert len(str(caught.value).splitlines()) == 2


def dice_of(summary):
    (region,) = summary.conditions[0].scores["stage"]
    return [group.metrics["dice"].value for group in region.groups]


@pytest.mark.parametrize(("given", "most"), [(None, 2), (1, 1)])
def test_windows_at_a_time_are_the_runs_batch_or_what_is_asked_for(run_of, given, most):
    run, model = run_of()
    predict(PredictSettings(run, batch_size=given))
    # Frames of 32 x 32 x 36 are two windows each.
    assert model.batches == [most] * (6 // most)


def test_a_volume_without_finite_answer_is_named(run_of):
    class Broken(Threshold):
        def forward(self, image_BCS):
            logits = super().forward(image_BCS)
            logits[0, 1, 3, 2, 1] = float("nan")
            return logits

    run, _ = run_of(Broken(3))
    with pytest.raises(DataError, match=r"output for a\.1 is not finite"):
        predict(PredictSettings(run))
    assert [*run.iterdir()] == []
