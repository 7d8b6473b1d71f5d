"""Masks of a cross-validation are scored as they lie; columns of the csv keep apart from ours."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from harness.evaluations import FEW, Bars, Ruler
from harness.nifti_folders import mask, nnunet_folder, save, voxels

from reference_models.errors import DataError
from reference_models.evaluation import trained_run
from reference_models.evaluation.evaluate import EvaluatePredictions, evaluate_predictions
from reference_models.evaluation.masks import read_mask
from reference_models.evaluation.prediction import PredictSettings, predict

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def crossval(tmp_path):
    """A mask of every training case beside nnU-Net's own files, and the settings to score them."""
    data = nnunet_folder(tmp_path / "data", n=9, description="Made up. ")
    folder = tmp_path / "crossval_results_folds_0_1_2_3_4"
    shutil.copytree(data.root / "labelsTr", folder)
    for name in ("dataset.json", "plans.json", "summary.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return EvaluatePredictions(folder, data, split="all", out=tmp_path / "out", scoring=FEW)


def test_one_mask_of_each_training_case_is_scored_by_the_split_all(crossval):
    summary = evaluate_predictions(crossval)
    assert (summary.n_cases, summary.split, summary.about) == (9, "all", "Made up.")
    assert summary.conditions[0].scores["T-stage"][0].overall["dice"].value == 1
    assert "test cases" not in summary.conditions[0].note
    with pytest.raises(DataError, match=r"of cases in other splits \(--split all scores every"):
        evaluate_predictions(dataclasses.replace(crossval, split="test"))
    (crossval.folder / "p3.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 of 9 cases have no mask .*: p3"):
        evaluate_predictions(crossval)


def test_labelled_test_cases_are_left_out_by_name_if_none_of_them_has_a_mask(crossval):
    root = crossval.data.root
    for folder in ("imagesTs", "labelsTs"):
        (root / folder).mkdir()
    for name in ("new", "next"):
        save(root / f"imagesTs/{name}_0000.nii.gz", voxels())
        save(root / f"labelsTs/{name}.nii.gz", mask())
    table = root / "attributes.csv"
    table.write_text(table.read_text(encoding="utf-8") + "\nnew,T2\nnext,T1", encoding="utf-8")
    summary = evaluate_predictions(crossval)
    assert summary.n_cases == 9
    assert "test cases have no mask in the folder and are not scored: new, next" in (
        summary.conditions[0].note
    )
    save(root / "imagesTs/bare_0000.nii.gz", voxels())
    shutil.copy(root / "labelsTs/new.nii.gz", crossval.folder / "bare.nii.gz")
    with pytest.raises(DataError, match=r"1 masks are of cases without a mask in the data.*: bare"):
        evaluate_predictions(crossval)
    (crossval.folder / "bare.nii.gz").unlink()
    shutil.copy(root / "labelsTs/new.nii.gz", crossval.folder)
    with pytest.raises(DataError, match=r"1 of 11 cases have no mask .*: next"):
        evaluate_predictions(crossval)


def test_a_splits_file_that_has_test_cases_alone_is_enough_to_score_them(crossval, tmp_path):
    path = tmp_path / "splits.json"
    ids = ", ".join(f'"p{i}"' for i in range(9))
    path.write_text(
        f'{{"dataset": "nifti", "seed": 0, "train": [], "validation": [], "test": [{ids}]}}',
        encoding="utf-8",
    )
    data = dataclasses.replace(crossval.data, splits=path)
    summary = evaluate_predictions(dataclasses.replace(crossval, data=data, split="test"))
    assert summary.n_cases == 9
    with pytest.raises(DataError, match="train: without a case"):
        evaluate_predictions(dataclasses.replace(crossval, data=data, split="train"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"splits": Path("missing.json")}, "--splits missing.json"), ({"fold": 77}, "--fold 77")],
)
def test_the_split_all_refuses_a_file_or_fold_that_it_would_not_look_at(crossval, change, words):
    data = dataclasses.replace(crossval.data, **change)
    with pytest.raises(DataError, match=f"all scores every case, so that {words} would change"):
        evaluate_predictions(dataclasses.replace(crossval, data=data))


def test_folds_without_test_cases_say_which_split_to_score(crossval):
    path = crossval.data.root / "splits_final.json"
    names = [f"p{i}" for i in range(9)]
    path.write_text(json.dumps([{"train": names[3:], "val": names[:3]}]), encoding="utf-8")
    advice = r"test: without a case; .* --split all, or .* --split validation --fold <number>"
    with pytest.raises(DataError, match=advice):
        evaluate_predictions(dataclasses.replace(crossval, split="test"))


def test_columns_that_are_called_like_ours_are_kept_apart(crossval):
    names = ("region", "attribute region", "case_id", "dice", "hd95_mm", "truth_size")
    table = crossval.data.root / "attributes.csv"
    rows = [f"p{i},{','.join(f'{name[-2:]}{i % 2}' for name in names)}" for i in range(9)]
    table.write_text("\n".join([f"case,{','.join(names)}", *rows]), encoding="utf-8")
    data = dataclasses.replace(crossval.data, attributes=names)
    summary = evaluate_predictions(dataclasses.replace(crossval, data=data))
    assert tuple(summary.attributes) == names
    with (crossval.out / "cases.csv").open(newline="", encoding="utf-8") as file:
        header, first, *_ = csv.reader(file)
    assert len({*header}) == len(header)
    row = dict(zip(header, first, strict=True))
    assert (row["case_id"], row["region"], row["dice"]) == ("p0", "tumour", "1.0")
    assert row["attribute attribute region"] == "on0"
    for name in names[1:]:
        assert row[name if name == "attribute region" else f"attribute {name}"] == f"{name[-2:]}0"


def test_prediction_leaves_no_case_without_a_mask_unless_that_is_asked_for(run_of, monkeypatch):
    run = run_of(Ruler(), Bars(unknown=(3, 7)))
    recipe, task, model = trained_run.load_model(run, "best")
    trained_so = dataclasses.replace(recipe, leave_out_unknown=True), task, model
    monkeypatch.setattr(trained_run, "load_model", lambda run, which, **_: trained_so)
    with pytest.raises(DataError, match=r"2 test cases would get no mask.*: bar3, bar7\. Predict"):
        predict(PredictSettings(run))
    assert [*run.iterdir()] == []
    out = predict(PredictSettings(run, leave_out_unknown=True))
    assert len([*(out / "masks").iterdir()]) == 10


def test_a_mask_whose_header_claims_terabytes_is_named(tmp_path):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {(10**14,)}}}".ljust(117) + "\n"
    claims = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    (tmp_path / "case.npy").write_bytes(claims)
    sample = Bars().load(Bars().cases[0])
    with pytest.raises(DataError, match=r"case\.npy: cannot be read \(it needs more memory"):
        read_mask(tmp_path / "case.npy", sample, ("a", "b"))
