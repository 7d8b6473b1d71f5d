"""nnU-Net's splits_final.json is honoured, in the folder or named, and a wrong one says why."""

import dataclasses
import json
import re

import pytest
from harness.checks import checked, errors
from harness.nifti_folders import mask, nnunet_folder, save, voxels

from reference_models.data import open_dataset
from reference_models.data.splits import choose_splits, make_splits, read_splits, write_splits
from reference_models.errors import DataError
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.cohort import Cohort

FOLDS = [
    {
        "train": [f"p{i}" for i in range(10) if i % 5 != fold],
        "val": [f"p{fold}", f"p{fold + 5}"],
    }
    for fold in range(5)
]


@pytest.fixture
def settings(tmp_path):
    settings = nnunet_folder(tmp_path / "data", n=10)
    (settings.root / "splits_final.json").write_text(json.dumps(FOLDS), encoding="utf-8")
    return settings


def chosen(settings):
    return choose_splits(
        open_dataset(settings), settings.splits, settings.split_seed, settings.fold
    )


@pytest.mark.parametrize("fold", [None, 0, 3])
def test_a_folds_cases_are_trained_and_validated_on(settings, fold):
    splits = chosen(dataclasses.replace(settings, fold=fold))
    assert splits.train == tuple(FOLDS[fold or 0]["train"])
    assert splits.validation == tuple(FOLDS[fold or 0]["val"])
    assert splits.test == ()
    code, text = checked(dataclasses.replace(settings, fold=fold))
    assert code == 0
    path = settings.root / "splits_final.json"
    assert (
        f"split: fold {fold or 0} of the folds 0 to 4 (--fold), of {path}; the cases that it"
        in text
    )
    assert "drawn" not in text


def test_labelled_cases_of_the_test_folder_are_a_folds_test_cases(settings):
    for folder in ("imagesTs", "labelsTs"):
        (settings.root / folder).mkdir()
    save(settings.root / "imagesTs/new_0000.nii.gz", voxels())
    save(settings.root / "labelsTs/new.nii.gz", mask())
    table = settings.root / "attributes.csv"
    table.write_text(table.read_text(encoding="utf-8") + "\nnew,T2", encoding="utf-8")
    assert chosen(settings).test == ("new",)


def test_a_file_that_is_named_wins_and_may_lie_anywhere(settings, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(FOLDS[1:]), encoding="utf-8")
    named = dataclasses.replace(settings, splits=path, fold=3)
    assert chosen(named).validation == ("p4", "p9")
    assert f"fold 3 of the folds 0 to 3 (--fold), of {path}" in checked(named)[1]
    (settings.root / "splits_final.json").unlink()
    ours = make_splits(open_dataset(settings), 5)
    write_splits(path, ours)
    assert chosen(dataclasses.replace(settings, splits=path)) == ours


def test_a_fold_that_cannot_be_is_refused(settings, tmp_path):
    path = settings.root / "splits_final.json"
    ours = tmp_path / "splits.json"
    write_splits(ours, make_splits(open_dataset(settings), 0))
    for change, content, words in (
        ({"fold": 5}, FOLDS, "fold: got 5, but .* has the folds 0 to 4"),
        ({"fold": -1}, FOLDS, "fold: got -1"),
        ({"splits": ours, "fold": 0}, FOLDS, "holds one split and no folds"),
        ({}, [{"train": ["p0", "p1"], "val": ["p99"]}], "p99: not in the data set"),
        ({}, [{"train": ["p0", "p1"], "val": ["p1"]}], "p1: named more than once"),
        ({}, [{"train": ["p0", "p1"], "val": []}], "validation: without a case"),
        ({}, [{"train": ["p0", "p1"]}], "not a splits file"),
        ({}, [1], "not a splits file"),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        asked = dataclasses.replace(settings, **change)
        with pytest.raises(DataError, match=words):
            chosen(asked)
        (line,) = errors(checked(asked)[1])
        assert "TypeError" not in line
    path.unlink()  # then folds are made
    with pytest.raises(DataError, match="fold: got 5, but there are 5 folds"):
        chosen(dataclasses.replace(settings, fold=5))


def test_a_fold_must_not_contradict_the_csvs_split_nor_spread_a_patient(settings):
    table = settings.root / "attributes.csv"
    rows = table.read_text(encoding="utf-8").split()[1:]
    splits = ["test", *[""] * 9]
    lines = [f"{row},{split}" for row, split in zip(rows, splits, strict=True)]
    table.write_text("\n".join(["case,T-stage,split", *lines]), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"has p0 in validation, but .* p0 is in test; .*--fold then makes"
    ):
        chosen(settings)
    lines = [f"{row},{'one' if i < 2 else ''}" for i, row in enumerate(rows)]
    table.write_text("\n".join(["case,T-stage,subject", *lines]), encoding="utf-8")
    with pytest.raises(DataError, match="the subject one lies in several splits"):
        chosen(settings)


@pytest.mark.parametrize("fold", [5, -1])
def test_a_fold_that_cannot_be_is_told_once(settings, fold):
    text = checked(dataclasses.replace(settings, fold=fold))[1]
    assert [line for line in text.splitlines() if re.search(r"\bfold\b", line)] == errors(text)


def test_json_may_be_in_utf_16_as_windows_writes_it(settings):
    for name in ("splits_final.json", "dataset.json"):
        path = settings.root / name
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")
    assert chosen(settings).validation == tuple(FOLDS[0]["val"])
    assert checked(settings)[0] == 0


def test_training_takes_the_fold(settings):
    recipe = Recipe(
        dataclasses.replace(settings, fold=3),
        ResUNet3DSettings(features=2),
        VolumeFramingSettings(spacing=(1.0, 1.0, 1.0), patch=(64, 32, 32)),
        batch_size=1,
    )
    cohort = Cohort.of(recipe, open_dataset(recipe.data), resume=False)
    assert cohort.train == tuple(FOLDS[3]["train"])
    assert cohort.validation == tuple(FOLDS[3]["val"])


def test_cases_that_no_split_names_are_counted_and_named(settings):
    assert "in no split" not in checked(settings)[1]
    few = [{"train": ["p1", "p2", "p4"], "val": ["p6"]}]
    path = settings.root / "splits_final.json"
    path.write_text(json.dumps(few), encoding="utf-8")
    said = (
        "6 of 10 cases with a mask are in no split and are not used: p0, p3, p5, p7, p8 and 1 more"
    )
    code, text = checked(settings)
    assert code == 0
    assert f"; {said}\n" in text
    recipe = Recipe(
        settings,
        ResUNet3DSettings(features=2),
        VolumeFramingSettings(spacing=(1.0, 1.0, 1.0), patch=(64, 32, 32)),
        batch_size=1,
    )
    cohort = Cohort.of(recipe, open_dataset(settings), resume=False)
    assert said in cohort.remarks()


def test_too_few_cases_to_draw_from_are_an_error_of_check_too(tmp_path):
    (line,) = errors(checked(nnunet_folder(tmp_path, n=2))[1])
    assert (
        "there are 2 cases with a mask, of 2 subjects, which are too few: none is left for" in line
    )


def test_a_damaged_case_of_a_fold_is_one_error(settings):
    path = settings.root / "imagesTr/p3_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:90])
    (line,) = errors(checked(settings)[1])
    assert str(path) in line


def test_splits_of_a_fold_come_back_without_test_cases(settings, tmp_path):
    dataset, splits = open_dataset(settings), chosen(settings)
    write_splits(tmp_path / "splits.json", splits)
    needed = ("train", "validation")
    assert read_splits(tmp_path / "splits.json", dataset, needed=needed) == splits
    with pytest.raises(DataError, match="test: without a case"):
        read_splits(tmp_path / "splits.json", dataset)
