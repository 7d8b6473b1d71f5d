"""Killed and resumed: a run ends to the bit as if it had never stopped, or is refused."""

import dataclasses
import itertools
import os
import signal

import pytest
import torch
from harness.trainings import (
    TINY,
    assert_same_tree,
    in_fork,
    killed_at,
    needs_fork,
    state_of,
    weights_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reference_models.data import open_dataset
from reference_models.errors import RunError
from reference_models.recipes.networks import UNetSettings
from reference_models.study.candidates import CandidateSettings
from reference_models.training import checkpoints
from reference_models.training import loop as training
from reference_models.training.loop import train
from reference_models.training.runs import Task

pytestmark = pytest.mark.usefixtures("one_thread")


@needs_fork
def test_killed_and_resumed_it_ends_as_if_it_had_never_stopped(tmp_path):
    recipe = dataclasses.replace(
        TINY, checkpoint_every=3, fairness="group-dro", group_dro_rate=0.1, out=tmp_path / "whole"
    )
    whole = train(recipe)
    killed = dataclasses.replace(recipe, out=tmp_path / "killed")
    deaths = [
        2,  # before any checkpoint
        (os, "rename", 2),  # after the first checkpoint, before the best one has its name
        3,  # just after one in mid-epoch
        (checkpoints, "save_last", 1),  # between best and last
        (torch, "save", 1),  # within a checkpoint
        (checkpoints, "tidy", 2),  # two of each are there; the first call is from resuming
        6,
        (checkpoints.shutil, "rmtree", 1),  # as an old one is removed
    ]
    for n, where in enumerate(deaths):
        process = in_fork(killed_at, killed, n > 0, where)
        process.join()
        assert process.exitcode == -signal.SIGKILL, where
    resumed = train(killed, resume=True)
    assert_same_tree(weights_of(resumed), weights_of(whole))
    assert_same_tree(weights_of(resumed, "best"), weights_of(whole, "best"))
    assert_same_tree(state_of(resumed), state_of(whole))
    assert (resumed / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    names = [sorted(p.name for p in run.iterdir()) for run in (resumed, whole)]
    assert names[0] == names[1]  # nothing half done is left
    losses = {}
    for run in (resumed, whole):
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        losses[run] = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses[resumed] == losses[whole]
    assert [step for step, _ in losses[whole]] == list(range(1, 9))


@needs_fork
@pytest.mark.parametrize(
    "model",
    [
        UNetSettings(widths=(4,), block="film", unknown="learned"),
        CandidateSettings(widths=(4,), router="shared", unknown="learned"),
    ],
    ids=["film", "shared"],
)
def test_with_dropped_attributes_too_it_ends_as_if_it_had_never_stopped(tmp_path, model):
    recipe = dataclasses.replace(
        TINY, out=tmp_path / "whole", model=model, attribute_dropout=0.5, checkpoint_every=3
    )
    whole = train(recipe)
    killed = dataclasses.replace(recipe, out=tmp_path / "killed")
    for n, step in enumerate((3, 6)):  # in mid-epoch, and in the second
        process = in_fork(killed_at, killed, n > 0, step)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    resumed = train(killed, resume=True)
    assert_same_tree(weights_of(resumed), weights_of(whole))
    assert_same_tree(state_of(resumed), state_of(whole))
    _, _, network = checkpoints.load_model(resumed)
    assert_same_tree(dict(network.state_dict()), weights_of(whole, "best"))
    still = train(dataclasses.replace(recipe, attribute_dropout=0.0, out=tmp_path / "still"))
    assert not torch.equal(weights_of(still)["head.weight"], weights_of(whole)["head.weight"])


def test_every_step_and_every_rank_draw_noise_of_their_own(tmp_path, monkeypatch):
    seeds = {training.step_seed(*key) for key in itertools.product(range(3), range(40), range(4))}
    assert len(seeds) == 3 * 40 * 4
    drawn, real = [], training.step_seed

    def recorded(*key):
        drawn.append(key)
        return real(*key)

    monkeypatch.setattr(training, "step_seed", recorded)
    train(dataclasses.replace(TINY, out=tmp_path / "run", seed=5))
    assert drawn == [(5, step, 0) for step in range(8)]


def test_every_epoch_has_an_order_of_its_own(tmp_path, monkeypatch):
    epochs, real = [], training.train_batches

    def recorded(*arguments, **options):
        epochs.append((options["epoch"], options["first_batch"]))
        return real(*arguments, **options)

    monkeypatch.setattr(training, "train_batches", recorded)
    train(dataclasses.replace(TINY, out=tmp_path / "run"))
    assert epochs == [(0, 0), (1, 0)]


def test_a_finished_run_stays_as_it_is_when_resumed(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*.safetensors")}
    assert train(dataclasses.replace(TINY, out=finished), resume=True) == finished
    assert {path: path.read_bytes() for path in finished.rglob("*.safetensors")} == before


def test_other_settings_are_no_resumption_and_the_differing_ones_are_named(finished):
    other = dataclasses.replace(
        TINY,
        out=finished,
        epochs=3,
        model=dataclasses.replace(TINY.model, moe="none"),
        workers=1,
        devices=2,
    )
    with pytest.raises(RunError, match="other settings") as caught:
        training.require_same_run(finished, other, Task.of(open_dataset(other.data)))
    assert "model.moe: the run has 'shared', now 'none'" in str(caught.value)
    assert "epochs: the run has 2, now 3" in str(caught.value)
    assert not any(name in str(caught.value) for name in ("workers", "devices:", "out:"))


def test_another_presets_network_is_no_resumption(finished):
    other = dataclasses.replace(TINY, out=finished, model=UNetSettings())
    with pytest.raises(RunError, match=r"model.moe: the run has 'shared', now 'no such setting'"):
        train(other, resume=True)


def test_other_data_are_no_resumption(finished):
    task = Task(3, ("background", "organ"), ())
    with pytest.raises(RunError, match=r"classes: the run has .*, the data .*'organ'\]"):
        training.require_same_run(finished, dataclasses.replace(TINY, out=finished), task)


def test_there_is_nothing_to_resume_without_a_run(tmp_path):
    with pytest.raises(RunError, match="no run here"):
        train(dataclasses.replace(TINY, out=tmp_path / "none"), resume=True)
    assert not (tmp_path / "none").exists()
