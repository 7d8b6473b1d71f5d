"""What is written, whole or not at all: nobody's own files are lost, and errors are sentences."""

import dataclasses
import errno
from pathlib import Path

import pytest
import torch
from harness.evaluations import FEW, Bars, Ruler
from helpers import needs_links

from reference_models.errors import DataError
from reference_models.evaluation import evaluate as evaluation
from reference_models.evaluation import trained_run
from reference_models.evaluation.evaluate import (
    EvaluateRun,
    Scoring,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.prediction import PredictSettings, predict


def test_an_earlier_evaluation_is_replaced_and_nothing_else_is(run_of, tmp_path):
    run, out = run_of(Ruler(), Bars()), tmp_path / "out"
    evaluate_run(EvaluateRun(run, scoring=FEW, out=out))
    first = (out / "summary.json").read_bytes()
    evaluate_run(EvaluateRun(run, scoring=dataclasses.replace(FEW, tolerance=3), out=out))
    assert (out / "summary.json").read_bytes() != first
    (out / "thesis.tex").write_text("mine", encoding="utf-8")
    before = sorted(out.rglob("*"))
    with pytest.raises(DataError, match=r"thesis\.tex"):
        evaluate_run(EvaluateRun(run, scoring=FEW, out=out))
    assert sorted(out.rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_masks_of_the_users_own_are_never_replaced(other_tool, tmp_path):
    _, folder, settings = other_tool
    out = tmp_path / "tool"
    out.mkdir()
    masks = folder.rename(out / "masks")
    before = {path: path.read_bytes() for path in masks.iterdir()}
    with pytest.raises(DataError, match=r"tool: this folder holds masks, which would be lost"):
        evaluate_predictions(dataclasses.replace(settings, folder=masks, out=out))
    with pytest.raises(DataError, match=r"tool: this folder holds masks, which would be lost"):
        predict(PredictSettings(tmp_path / "run", out=out))
    with pytest.raises(DataError, match=r"tool: this folder holds masks, which would be lost"):
        evaluate_run(EvaluateRun(tmp_path / "run", scoring=FEW, out=out))
    assert before == {path: path.read_bytes() for path in masks.iterdir()}


def test_where_nothing_can_be_written_a_sentence_says_so(other_tool, tmp_path, monkeypatch):
    _, _, settings = other_tool
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/out: this folder cannot be written"):
        evaluate_predictions(dataclasses.replace(settings, out=tmp_path / "file" / "out"))

    def full(path, *rest):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_report", full)
        with pytest.raises(DataError, match=r"out: this folder cannot be written .*No space left"):
            evaluate_predictions(settings)
    assert not settings.out.exists()
    assert not [*tmp_path.glob(".out*")]
    settings.out.mkdir()
    monkeypatch.chdir(settings.out)
    with pytest.raises(DataError, match="the folder you are in"):
        evaluate_predictions(dataclasses.replace(settings, out=Path()))


@needs_links
def test_of_a_link_what_it_points_to_is_written(other_tool, tmp_path):
    _, _, settings = other_tool
    (tmp_path / "large disk").mkdir()
    settings.out.symlink_to(tmp_path / "large disk")
    evaluate_predictions(settings)
    assert settings.out.is_symlink()
    assert (tmp_path / "large disk" / "summary.json").is_file()


def test_if_a_case_cannot_be_read_nothing_is_written(run_of, monkeypatch):
    dataset = Bars()
    run = run_of(Ruler(), dataset)
    load = dataset.load

    def damaged(case):
        if case.case_id == "bar9":
            raise DataError("bar9.png: damaged")
        return load(case)

    monkeypatch.setattr(dataset, "load", damaged)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^bar9\.png: damaged$"):
            evaluate_run(EvaluateRun(run, scoring=FEW, workers=workers))
    assert [*run.iterdir()] == []


def test_a_network_without_finite_output_is_named_and_not_scored(run_of):
    class Broken(Ruler):
        def forward(self, image_B1HW):
            return super().forward(image_B1HW) * torch.tensor(float("nan"))

    run = run_of(Broken(), Bars())
    with pytest.raises(DataError, match=r"output for bar0 is not finite"):
        evaluate_run(EvaluateRun(run, scoring=FEW))
    assert [*run.iterdir()] == []


def test_of_a_run_of_another_data_set_nothing_is_scored(run_of, monkeypatch):
    run = run_of(Ruler(), Bars())
    other = Bars()
    other.classes = ("background", "bar", "comma")
    monkeypatch.setattr(trained_run, "open_dataset", lambda settings, **known: other)
    with pytest.raises(DataError, match=r"trained for other data: classes: .*the data .*comma"):
        evaluate_run(EvaluateRun(run, scoring=FEW))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scoring": Scoring(tolerance=-1)}, "tolerance: got -1"),
        ({"scoring": Scoring(tolerance=float("nan"))}, "tolerance: got nan"),
        ({"scoring": Scoring(resamples=10)}, "resamples: got 10"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"device": "abacus"}, "abacus cannot be used"),
    ],
)
def test_settings_that_cannot_be_are_an_error_before_anything_is_read(run_of, change, words):
    dataset = Bars()
    run = run_of(Ruler(), dataset)
    with pytest.raises(DataError, match=words):
        evaluate_run(EvaluateRun(run, **{"scoring": FEW} | change))
    assert dataset.loaded == []
