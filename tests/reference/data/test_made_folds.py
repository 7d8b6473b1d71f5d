"""Folds where no file names any: by subject, stratified, the same everywhere; and the fold all."""

import dataclasses
import json
import random
from collections import Counter

import pytest
from harness.checks import checked, errors
from harness.nifti_folders import mask, nnunet_folder, save, voxels

from reference_models.data import open_dataset
from reference_models.data.cases import Attribute, Case, Dataset
from reference_models.data.folds import make_folds
from reference_models.data.mni152 import Mni152
from reference_models.data.splits import (
    choose_folds,
    choose_splits,
    make_splits,
    write_folds,
    write_splits,
)
from reference_models.errors import DataError


class Patients(Dataset):
    """Patients of one to three scans; every fourth is of the second of two groups."""

    name, classes, channels, regions = "patients", ("a", "b"), 1, {"b": (1,)}
    attributes = (Attribute("group", ("often", "rare")),)

    def __init__(self, n=40, split=lambda i: None):
        self.cases = tuple(
            Case(f"p{i}-{scan}", f"p{i}", (i % 4 == 0,), split(i), stratum=int(i % 4 == 0))
            for i in range(n)
            for scan in range(1 + i % 3)
        )

    def load(self, case):
        raise NotImplementedError


def test_every_case_is_held_out_once_with_all_of_its_subjects_and_each_stratum_evenly():
    dataset = Patients(40)
    folds = choose_folds(dataset, None, 0)
    assert len(folds) == 5
    held_out = [case_id for fold in folds for case_id in fold.validation]
    assert sorted(held_out) == sorted(case.case_id for case in dataset.cases)
    subjects = {case.case_id: case.subject for case in dataset.cases}
    for fold in folds:
        assert {*fold.train} | {*fold.validation} == {*subjects}
        trained, out = ({subjects[i] for i in ids} for ids in (fold.train, fold.validation))
        assert not trained & out
        assert Counter(int(s[1:]) % 4 == 0 for s in out) == {False: 6, True: 2}
        assert fold.test == ()
    assert choose_splits(dataset, None, 0, 3) == folds[3]
    assert len(choose_folds(dataset, None, 0, 7)) == 7


def test_folds_follow_from_seed_and_names_and_from_nothing_else():
    dataset, other = Patients(8), Patients(8)
    other.cases = tuple(random.Random(0).sample(other.cases, len(other.cases)))
    other.name = "called otherwise"
    assert make_folds(dataset, 3, 0) == make_folds(other, 3, 0)
    assert make_folds(dataset, 3, 0) != make_folds(dataset, 3, 1)
    # By hand: sha256sum of "0 p0" and so on, sorted within the strata (p0 and p4 are of the last).
    assert [sorted({i.split("-")[0] for i in fold}) for fold in make_folds(dataset, 3, 0)] == [
        ["p0", "p3", "p7"],
        ["p4", "p5", "p6"],
        ["p1", "p2"],
    ]


def test_the_data_sets_own_test_cases_are_in_no_fold_and_its_validation_cases_are():
    dataset = Patients(20, lambda i: {0: "test", 1: "validation", 2: "train"}.get(i))
    (first, *_) = folds = choose_folds(dataset, None, 0)
    assert first.test == ("p0-0",)
    held_out = {case_id for fold in folds for case_id in fold.validation}
    assert held_out == {case.case_id for case in dataset.cases} - {"p0-0"}
    leaking = Patients(20)
    leaking.cases = (*leaking.cases, Case("again", "p3", (0,), "test"))
    leaking.cases = (*leaking.cases, Case("too", "p3", (0,), "train"))
    for fold in (0, "all"):
        with pytest.raises(DataError, match="subject p3 lies in several splits"):
            choose_splits(leaking, None, 0, fold)


def test_all_trains_on_every_case_but_the_test_cases_and_holds_none_out(tmp_path):
    dataset = Patients(20, lambda i: {0: "test", 1: "validation"}.get(i))
    splits = choose_splits(dataset, None, 0, "all")
    assert splits.test == ("p0-0",)
    assert splits.validation == ()
    assert {*splits.train} == {case.case_id for case in dataset.cases} - {"p0-0"}
    # nnU-Net reads no folds for it either; a file that is named would be named for nothing.
    folds = tmp_path / "splits_final.json"
    folds.write_text('[{"train": ["p1-0"], "val": ["p2-0"]}]', encoding="utf-8")
    dataset.folds = folds
    assert choose_splits(dataset, None, 0, "all") == splits
    with pytest.raises(
        DataError, match=r"all, which trains on every case, so that .*splits_final\.json"
    ):
        choose_splits(dataset, folds, 0, "all")
    with pytest.raises(DataError, match="no case can be trained on"):
        choose_splits(Patients(2, lambda i: "test"), None, 0, "all")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 5), "fold: got 5, but there are 5 folds .*, 0 to 4"),
        ((0, -1), "fold: got -1"),
        ((0, 0, 1), "folds: got 1, expected 2 or more"),
        ((0, 0, 41), "folds: got 41, but patients has only 40 subjects"),
        ((-1, 0), "split_seed: got -1, expected 0 or more"),
        ((0, None, 4), "folds: got 4, but no fold was chosen"),
    ],
)
def test_a_fold_that_cannot_be_made_is_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        choose_splits(Patients(40), None, *arguments)


def test_slices_of_one_head_are_no_folds():
    dataset = Patients()
    dataset.foldable = False
    with pytest.raises(DataError, match="neighbouring slices of one head"):
        choose_splits(dataset, None, 0, 0)
    assert not Mni152.foldable


@pytest.fixture
def settings(tmp_path):
    """Ten training cases, a test case with a label, and one without."""
    settings = nnunet_folder(tmp_path / "data", n=10)
    for folder in ("imagesTs", "labelsTs"):
        (settings.root / folder).mkdir()
    for name in ("new", "bare"):
        save(settings.root / f"imagesTs/{name}_0000.nii.gz", voxels())
    save(settings.root / "labelsTs/new.nii.gz", mask())
    table = settings.root / "attributes.csv"
    table.write_text(table.read_text(encoding="utf-8") + "\nnew,T2\nbare,T1", encoding="utf-8")
    return settings


def test_check_shows_a_made_fold_and_says_how_it_is_made(settings):
    asked = dataclasses.replace(settings, fold=1, folds=3, split_seed=4)
    code, text = checked(asked)
    assert code == 0
    assert (
        "split: fold 1 of the folds 0 to 2 (--fold), made by subject and stratified by the default "
        "attribute, with --split-seed 4; they are the same on every machine; the cases that it "
        "holds out are the validation split" in text
    )
    splits = choose_splits(open_dataset(asked), None, 4, 1, 3)
    assert len(splits.validation) == 3
    assert (len(splits.train), splits.test) == (7, ("new",))
    code, text = checked(dataclasses.replace(settings, fold="all"))
    assert code == 0
    assert "--fold all: every case with a mask is a training case, except the test cases" in text


@pytest.mark.parametrize("change", [{"fold": 5}, {"folds": 3}, {"fold": 0, "folds": 12}])
def test_check_tells_a_fold_that_cannot_be_once(settings, change):
    # With a damaged case too, of whose consequences nothing is said.
    for damage in (False, True):
        if damage:
            (settings.root / "labelsTr/p3.nii.gz").write_bytes(b"")
        lines = checked(dataclasses.replace(settings, **change))[1].splitlines()
        told = [line for line in errors("\n".join(lines)) if "fold" in line and "p3" not in line]
        assert len(told) == 1
        assert not [line for line in lines if line.startswith("split: fold")]


def test_folds_are_written_as_nnunet_does_and_read_back(settings, tmp_path):
    dataset = open_dataset(settings)
    folds = choose_folds(dataset, None, 0, 3)
    path = settings.root / "splits_final.json"
    write_folds(path, folds)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [sorted(fold) for fold in content] == [["train", "val"]] * 3
    again = choose_folds(open_dataset(settings), None, 0)
    assert again == folds
    with pytest.raises(DataError, match=r"folds: got 3, but the folds of .*final\.json are used"):
        choose_splits(open_dataset(settings), None, 0, 0, 3)
    ours = tmp_path / "ours.json"
    write_splits(ours, make_splits(dataset, 0))
    with pytest.raises(DataError, match="holds one split and no folds"):
        choose_folds(dataset, ours, 0)
