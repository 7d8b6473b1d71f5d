"""The fold all: every case is trained on, none chooses a checkpoint, the last is the best."""

import dataclasses

import pytest
import torch
from harness.trainings import TINY, history_of, weights_of

from reference_models.data import DataSettings, PhantomSettings, open_dataset
from reference_models.data.cases import UNKNOWN
from reference_models.errors import DataError
from reference_models.evaluation.evaluate import EvaluateRun, evaluate_run
from reference_models.training import loop as training
from reference_models.training.cohort import Cohort
from reference_models.training.loop import train
from reference_models.training.validation import Validation

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = dataclasses.replace(TINY, data=dataclasses.replace(TINY.data, fold="all"), patience=1)


def test_it_trains_on_all_to_the_end_and_its_last_checkpoint_is_the_best(
    tmp_path, monkeypatch, capsys
):
    scores = iter([0.5, 0.4, 0.3])  # ever worse: patience would end it, and the first be the best
    seen = []

    def validate(model, batches, *arguments, **options):
        seen.append([case_id for batch in batches for case_id in batch.case_ids])
        return Validation(next(scores), {}, {}, ())

    monkeypatch.setattr(training, "validate", validate)
    recipe = dataclasses.replace(ALL, epochs=2, out=tmp_path / "run")
    run = train(recipe)
    assert [row["score"] for row in history_of(run)] == [0.5, 0.4]
    best, last = weights_of(run, "best"), weights_of(run, "last")
    assert all(torch.equal(best[name], last[name]) for name in last)
    dataset = open_dataset(recipe.data)
    trained = {case.case_id for case in dataset.cases if case.split == "train"}
    cohort = Cohort.of(recipe, dataset, resume=True)
    assert {*cohort.train} == trained
    assert cohort.splits.validation == ()
    assert seen[0] == seen[1] == [*cohort.validation]
    assert {*seen[0]} < trained
    assert len(seen[0]) == 2  # a tenth
    said = " ".join(capsys.readouterr().out.split())
    assert "no case is held out (--fold all): the validation scores below are those of 2" in said
    with pytest.raises(DataError, match="no validation case is left to predict"):
        evaluate_run(EvaluateRun(run, split="validation"))


def test_cases_of_unknown_attribute_are_left_out_of_what_is_watched_too():
    dataset = open_dataset(ALL.data)
    dataset.cases = tuple(
        dataclasses.replace(case, attributes=(UNKNOWN,)) if n % 2 else case
        for n, case in enumerate(dataset.cases)
    )
    recipe = dataclasses.replace(ALL, leave_out_unknown=True)
    cohort = Cohort.of(recipe, dataset, resume=False)
    assert {*cohort.validation} <= {*cohort.train}
    assert len(cohort.validation) == 1
    assert len(cohort.train) == 10


def test_a_held_out_fold_is_watched_and_chosen_by_as_ever():
    data = DataSettings("phantom", phantom=PhantomSettings(cases=20, image_size=32), fold=2)
    cohort = Cohort.of(dataclasses.replace(TINY, data=data), open_dataset(data), resume=False)
    assert cohort.held_out
    assert cohort.validation == cohort.splits.validation
    assert len(cohort.validation) == 4
    assert not [line for line in cohort.remarks() if "held out" in line]
