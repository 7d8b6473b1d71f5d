"""A cross-validation: folds one after another, killed and resumed, and one report over all."""

import csv
import dataclasses
import json
import shutil

import pytest
import torch
from harness.nifti_folders import nnunet_folder
from harness.trainings import TINY, weights_of

from reference_models import cross_validation
from reference_models.cross_validation import cross_validate
from reference_models.data import open_dataset
from reference_models.data.splits import choose_folds, choose_splits, write_splits
from reference_models.errors import DataError, RunError
from reference_models.evaluation.evaluate import EvaluateRun, Scoring, evaluate_run
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.evaluation.trained_run import RunSettings, open_run
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training import cohort
from reference_models.training import loop as training
from reference_models.training.loop import train
from reference_models.training.runs import Task, read_run, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = Scoring(resamples=100)
FOLDED = dataclasses.replace(
    TINY, data=dataclasses.replace(TINY.data, folds=2), epochs=1, checkpoint_every=1
)


def rows_of(folder):
    with (folder / "cases.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A cross-validation that was stopped in its second fold, refused, and gone on with."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    recipe = dataclasses.replace(FOLDED, out=tmp_path_factory.mktemp("crossed") / "cv")
    step = training.Run.step

    def stopped(self, *arguments):
        if self.recipe.data.fold == 1 and self.state.position.step == 1:
            raise KeyboardInterrupt
        return step(self, *arguments)

    told = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Run, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            cross_validate(recipe)
    with pytest.raises(RunError) as caught:
        predict(PredictSettings(recipe.out))
    told["unfinished"] = str(caught.value)
    first = {p: p.stat().st_mtime_ns for p in (recipe.out / "fold_0").rglob("*") if p.is_file()}
    folder, summary = cross_validate(recipe)
    assert first == {p: p.stat().st_mtime_ns for p in first}  # what was done is not done again
    torch.set_num_threads(before)
    return recipe, folder, summary, told


def test_every_fold_ends_as_a_training_of_its_own_does(crossed, tmp_path):
    recipe, *_ = crossed
    alone = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, fold=1), out=tmp_path / "alone"
    )
    weights, own = weights_of(recipe.out / "fold_1"), weights_of(train(alone))
    assert all(torch.equal(weights[name], own[name]) for name in own)


def test_each_case_is_scored_by_the_fold_that_it_was_held_out_from(crossed, tmp_path):
    recipe, folder, summary, _ = crossed
    assert folder == recipe.out / "evaluation-validation"
    folds = choose_folds(open_dataset(recipe.data), None, 0, 2)
    rows = rows_of(folder)
    assert {(row["case_id"], row["fold"]) for row in rows} == {
        (case_id, str(number)) for number, fold in enumerate(folds) for case_id in fold.validation
    }
    assert len(rows) == 2 * 20  # regions
    pooled = {(row["case_id"], row["region"]): row["dice"] for row in rows}
    for number, fold in enumerate(folds):
        own = EvaluateRun(
            recipe.out / f"fold_{number}", "last", split="validation", out=tmp_path / f"{number}"
        )
        evaluate_run(dataclasses.replace(own, scoring=FEW))
        scores = {(row["case_id"], row["region"]): row["dice"] for row in rows_of(own.folder)}
        assert {case_id for case_id, _ in scores} == {*fold.validation}
        assert scores == {key: pooled[key] for key in scores}
    assert summary.n_cases == 20
    assert summary.networks == (
        "Each case was predicted by the one of 2 folds that it was held out from, with that "
        "fold's last checkpoint. The scores of these cases chose the best checkpoint. The last "
        "one, which is used here, was not chosen by them, as in nnU-Net."
    )
    assert summary.networks.replace("'", "&#39;") in (folder / "report.html").read_text(
        encoding="utf-8"
    )
    assert [c.name for c in summary.conditions if c.scores] == [
        "as given", "shuffled", "wrong", "unknown",
    ]  # fmt: skip
    assert summary.conditions[1].note.endswith("of 20 cases got their true values.")
    groups = summary.conditions[0].scores["site"][0].groups
    assert sum(group.n_subjects for group in groups) == 20


def test_its_folder_answers_test_cases_by_all_folds_and_held_out_ones_by_their_own(
    crossed, tmp_path
):
    recipe, folder, *_ = crossed
    held_out = predict(PredictSettings(recipe.out, split="validation", out=tmp_path / "held"))
    for path in (folder / "masks").iterdir():
        assert path.read_bytes() == (held_out / "masks" / path.name).read_bytes()
    together = predict(PredictSettings(recipe.out, out=tmp_path / "test"))
    named = tuple(recipe.out / f"fold_{fold}" for fold in range(2))
    again = predict(PredictSettings(named, "last", out=tmp_path / "named"))
    for path in (together / "masks").iterdir():
        assert path.read_bytes() == (again / "masks" / path.name).read_bytes()
    with pytest.raises(RunError, match=r"it holds folds, so name one of them, such as .*fold_0"):
        read_run(recipe.out)
    with pytest.raises(DataError, match="has other train cases than"):
        predict(PredictSettings(recipe.out, split="train", out=tmp_path / "no"))


def test_an_unfinished_fold_does_not_answer_in_silence(crossed):
    *_, told = crossed
    assert "of its 2 folds, fold_1 did not come to the end of the training" in told["unfinished"]


def test_a_fold_that_was_trained_on_other_cases_is_not_pooled(crossed, tmp_path):
    recipe, *_ = crossed
    folder = shutil.copytree(recipe.out, tmp_path / "cv")
    dataset = open_dataset(recipe.data)
    write_splits(folder / "fold_1/splits.json", choose_folds(dataset, None, 5, 2)[1])
    with pytest.raises(
        DataError, match=r"fold_1: was trained on other cases than .*splits_final\.json says"
    ):
        evaluate_run(EvaluateRun(folder, split="validation", scoring=FEW))


def test_all_cases_of_other_data_are_counted_once_however_many_folds_answer(crossed):
    recipe, *_ = crossed
    dataset = open_dataset(recipe.data)
    assert open_run(RunSettings(recipe.out), "all").cases == dataset.cases


def test_the_folds_stand_beside_their_runs_as_nnunet_writes_them(crossed):
    recipe, *_ = crossed
    content = json.loads((recipe.out / "splits_final.json").read_text(encoding="utf-8"))
    folds = choose_folds(open_dataset(recipe.data), None, 0, 2)
    assert [fold["val"] for fold in content] == [list(fold.validation) for fold in folds]


def test_other_settings_or_cases_are_refused_before_anything_is_trained(crossed, monkeypatch):
    recipe, *_ = crossed
    monkeypatch.setattr(cross_validation, "train", lambda *_, **__: pytest.fail("trained"))
    for change, words in (
        (
            {"learning_rate": 0.1},
            r"fold_0: this run cannot be resumed .*learning_rate: the run has 0\.004",
        ),
        ({"data": dataclasses.replace(recipe.data, folds=3)}, r"data\.folds: the run has 2, now 3"),
        (
            {"data": dataclasses.replace(recipe.data, fold=1)},
            "fold: got 1, but cross-validate trains all folds",
        ),
        ({"out": recipe.out / "fold_0"}, "holds a single run, expected a folder for folds"),
    ):
        with pytest.raises(RunError, match=words):
            cross_validate(dataclasses.replace(recipe, **change))
    made = choose_folds(open_dataset(recipe.data), None, 0, 2)
    monkeypatch.setattr(cross_validation, "choose_folds", lambda *_: made[::-1])
    with pytest.raises(
        RunError, match="fold_0: this run was trained on other cases than the fold has"
    ):
        cross_validate(recipe)
    monkeypatch.setattr(cross_validation, "choose_folds", lambda *_: (made[0], made[0]))
    with pytest.raises(DataError, match="several folds hold out the same case"):
        cross_validate(recipe)


def test_volumes_without_test_cases_are_trained_fold_by_fold_and_gone_on_with(
    tmp_path, monkeypatch
):
    settings = nnunet_folder(tmp_path / "data", n=10)
    recipe = Recipe(
        settings,
        ResUNet3DSettings(features=2),
        VolumeFramingSettings(patch=(64, 32, 32)),
        out=tmp_path / "cv",
        batch_size=1,
        epochs=1,
    )
    trained = []

    def train(recipe, resume):
        trained.append((recipe.data.fold, resume, recipe.framing.spacing))
        dataset = open_dataset(recipe.data)
        splits = choose_splits(dataset, None, 0, recipe.data.fold)
        write_run(recipe.out, recipe, Task.of(dataset), splits)

    monkeypatch.setattr(cross_validation, "train", train)
    monkeypatch.setattr(cross_validation, "evaluate_run", lambda settings: settings.split)
    spacing = (1.0, 2.0, 3.0)
    for resumed in (False, True):  # no checkpoint is there yet, so that no fold is finished
        assert cross_validate(recipe) == (recipe.out / "evaluation-validation", "validation")
        assert trained == [(fold, resumed, spacing) for fold in range(5)]
        trained.clear()
    (settings.root / "splits_final.json").write_text(
        json.dumps([{"train": ["p0", "p1"], "val": ["p2"]}] * 5), encoding="utf-8"
    )
    with pytest.raises(DataError, match=r"several folds hold out the same case \(p2\)"):
        cross_validate(recipe)
    assert trained == []


def test_a_later_fold_that_cannot_be_trained_is_found_before_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setattr(cross_validation, "train", lambda *_, **__: pytest.fail("trained"))
    made = choose_folds(open_dataset(TINY.data), None, 0, 3)
    assert [len(fold.train) for fold in made] == [13, 13, 14]
    monkeypatch.setattr(cross_validation, "choose_folds", lambda *_: made[::-1])
    monkeypatch.setattr(cohort, "choose_splits", lambda *given: made[::-1][given[3]])
    recipe = dataclasses.replace(TINY, batch_size=14, out=tmp_path / "cv")
    with pytest.raises(RunError, match="batch_size: got 14, but there are only 13 training cases"):
        cross_validate(recipe)
    assert not (tmp_path / "cv").exists()
