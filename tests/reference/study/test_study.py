"""The study's jobs are what they say, chosen as they say, done once, and never lost."""

import csv
import dataclasses
import itertools
import json
import math
import os
import signal
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import HANG

from reference_models.__main__ import main
from reference_models.errors import RunError
from reference_models.evaluation.evaluate import EvaluateRun, Scoring, evaluate_run
from reference_models.study import command, cost, runner, trial
from reference_models.study.candidates import CandidateUNet
from reference_models.study.command import StudySettings, study
from reference_models.study.cost import multiply_adds, step_milliseconds
from reference_models.study.jobs import (
    TOLD_RIGHT,
    TOLD_SHUFFLED,
    TOLD_UNKNOWN,
    TOLD_WRONG,
    Job,
    Trial,
)
from reference_models.study.methods import METHODS
from reference_models.study.plan import GRID, Plan
from reference_models.study.runner import chosen_rate, run_plan
from reference_models.study.scenes import SCENES, Design, Sizes
from reference_models.study.trial import run, stored
from reference_models.training import loop as training
from reference_models.training.loop import train
from reference_models.training.runs import lock_run
from reference_models.training.validation import validate
from reference_models.workers import workers

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Design(Sizes(12, 2, 2, 1, 32), shares=(0.5, 0.5))


def job_of(scene, method, rate=0.006, seed=3):
    return Job(scene, method, seed, 1000 + seed, rate)


class Inline:
    """An executor that does at once what it is given, in this process."""

    def submit(self, act, *arguments):
        future = Future()
        try:
            future.set_result(act(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def inline(monkeypatch):
    @contextmanager
    def workers(processes):
        yield Inline()

    monkeypatch.setattr(runner, "workers", workers)


def made(job, validation):
    """A trial with nothing in it but its score, or without one."""
    dice = {} if validation == -math.inf else {TOLD_RIGHT: (0.5,)}
    return Trial(job, 1, 1, validation, ("a",), ("a",), ((0,),), (True,), dice, {}, {})


@pytest.fixture
def ran(inline, monkeypatch):
    """Jobs "run" in this test, each with the validation score that `scores` says."""
    ran = []

    def fake(job, design, folder):
        ran.append(job)
        return made(job, ran.scores(job))

    class Ran(list):
        scores = staticmethod(lambda job: 0.5)

    ran = Ran()
    monkeypatch.setattr(runner, "run", fake)
    return ran


ALL = Plan(tuple(SCENES), tuple(METHODS), (10, 11, 12))


def test_a_study_trains_every_method_in_all_its_scenes_from_every_seed(ran, tmp_path):
    outcome = run_plan(ALL, Design(), tmp_path, processes=1)
    assert len(ran) == len({*ran}) == ALL.count
    expected = {
        (scene, name, seed)
        for name, method in METHODS.items()
        for scene in method.scenes or SCENES
        for seed in ALL.seeds
    }
    assert ("two", "film", 12) in expected
    assert ("rule", "k1", 12) in expected
    assert ("two", "k1", 12) not in expected
    assert {(t.job.scene, t.job.method, t.job.data_seed) for t in outcome.main} == expected
    assert len(outcome.main) == len(expected)
    assert all(t.job.init_seed == 1000 + t.job.data_seed for t in outcome.main)
    tuned = {m for m in METHODS if not METHODS[m].rate_of}
    assert {(t.job.method, t.job.learning_rate, t.job.data_seed) for t in outcome.tuning} == {
        (m, rate, 10) for m in tuned for rate in GRID
    }
    assert {(t.job.method, t.job.data_seed, t.job.init_seed) for t in outcome.spread} == {
        (m, 10, init) for m in ("dense", "film", "dmoe") for init in (1011, 1012)
    }


def test_the_other_seeds_and_what_takes_its_rate_train_at_the_rate_that_validated_best(
    ran, tmp_path
):
    best = {"dense": GRID[0], "dmoe": GRID[2]}
    ran.scores = lambda job: 0.9 if best.get(job.method) == job.learning_rate else 0.5
    plan = Plan(("rule",), ("dense", "film", "dmoe", "dmoe-learned", "k1"), (10, 11))
    outcome = run_plan(plan, Design(), tmp_path, processes=1)
    for of in (outcome.main, outcome.spread):
        for t in of:
            base = METHODS[t.job.method].rate_of or t.job.method
            assert t.job.learning_rate == best.get(base, GRID[0]), t.job
    # What decides comes before what is decided by it.
    assert {job.method for job in ran[:9]} == {"dense", "film", "dmoe"}


def test_the_lowest_of_equal_rates_is_chosen_and_one_that_diverged_never():
    trials = [made(job_of("rule", "dense", rate), 0.4) for rate in GRID]
    assert chosen_rate(trials[::-1]) == GRID[0]
    trials[0] = made(trials[0].job, -math.inf)
    assert chosen_rate(trials) == GRID[1]


def test_a_main_job_that_diverges_is_named_when_all_others_are_done(ran, tmp_path):
    ran.scores = lambda job: -math.inf if job.data_seed == 11 or job.learning_rate > 0.01 else 0.5
    plan = Plan(("none",), ("dense", "film"), (10, 11, 12))
    with pytest.raises(RunError, match=r"none-dense-data11-init1011-lr0\.003.*none-film-data11"):
        run_plan(plan, Design(), tmp_path, processes=1)
    assert len(ran) == plan.count


def test_a_job_that_fails_is_named_at_once(inline, monkeypatch, tmp_path):
    def fails(job, design, folder):
        raise RunError("no room")

    monkeypatch.setattr(runner, "run", fails)
    with pytest.raises(RunError, match=r"rule-dense-data10-init1010-lr0\..*: no room"):
        run_plan(Plan(("rule",), ("dense",), (10,)), Design(), tmp_path, processes=1)


def test_two_studies_do_not_work_in_one_folder(ran, tmp_path):
    plan = Plan(("rule",), ("dense",), (10,))
    with lock_run(tmp_path), pytest.raises(RunError, match="another process"):
        run_plan(plan, Design(), tmp_path, processes=1)
    assert not ran
    run_plan(plan, Design(), tmp_path, processes=1)
    with lock_run(tmp_path):
        assert ran


def test_a_worker_that_is_killed_is_told_of():
    with pytest.raises(RunError, match="ended from outside"), workers(1) as pool:
        pool.submit(os._exit, 1).result()


def test_ctrl_c_breaks_off_what_workers_are_at(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background shell ignores
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    code = f"open({str(begun)!r}, 'w'); import time; time.sleep({HANG}); open({str(ended)!r}, 'w')"
    with pytest.raises(KeyboardInterrupt), workers(1) as pool:  # noqa: PT012
        job = pool.submit(exec, code)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        while not (begun.exists() or job.done()):
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert begun.exists()
    assert not ended.exists()


def test_a_trial_is_kept_whole_alone_and_silently_and_read_back_as_it_was(tmp_path, capfd):
    job = job_of("two", "dmoe-learned")
    assert stored(job, TINY, tmp_path) is None
    found = run(job, TINY, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert stored(job, TINY, tmp_path) == found
    path = tmp_path / "trials" / f"{job.name}.json"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert [*found.dice] == [TOLD_RIGHT, TOLD_SHUFFLED, TOLD_WRONG, TOLD_UNKNOWN] == [*found.loads]
    assert all(len(dice) == len(found.cases) == 2 * 2 for dice in found.dice.values())
    assert found.told_right[TOLD_RIGHT] == 1
    assert found.told_right[TOLD_WRONG] == found.told_right[TOLD_UNKNOWN] == 0
    # The first site's cases occur under both protocols in training, the second's under one.
    assert {a for a, seen in zip(found.attributes, found.seen, strict=True) if not seen} == {(1, 1)}
    blind = run(job_of("two", "plain"), TINY, tmp_path)
    assert [*blind.dice] == [TOLD_RIGHT] == [*blind.loads]
    assert (blind.cases, blind.attributes, blind.seen) == (
        found.cases, found.attributes, found.seen,
    )  # fmt: skip


def test_the_last_checkpoint_is_scored_as_evaluate_scores_it(tmp_path, monkeypatch):
    # The first epoch shall have been the best, whatever the network does.
    told = []

    def falling(*arguments, **options):
        told.append(validate(*arguments, **options))
        return dataclasses.replace(told[-1], score=1 / len(told))

    monkeypatch.setattr(training, "validate", falling)
    # No lesion is found after so few steps.
    organ = dataclasses.replace(SCENES["rule"], region="organ")
    monkeypatch.setitem(SCENES, "rule", organ)
    design = dataclasses.replace(TINY, sizes=dataclasses.replace(TINY.sizes, cases=16, epochs=4))
    job = job_of("rule", "film", 0.05, seed=5)
    found = run(job, design, tmp_path)
    recipe = dataclasses.replace(design.recipe(job, tmp_path), out=tmp_path / "again")
    train(recipe)
    settings = EvaluateRun(
        recipe.out, which="last", batch_size=50, scoring=Scoring(resamples=100, seed=5)
    )
    summary = evaluate_run(settings)
    names = {"as given": TOLD_RIGHT}
    for condition in summary.conditions:
        (of_organ,) = (s for s in condition.scores["site"] if s.region == "organ")
        dice = found.dice[names.get(condition.name, condition.name)]
        for group, scores in enumerate(of_organ.groups):
            of_group = [d for d, a in zip(dice, found.attributes, strict=True) if a == (group,)]
            assert scores.metrics["dice"].value == pytest.approx(sum(of_group) / len(of_group))
    assert max(found.dice[TOLD_RIGHT]) > 0
    with (recipe.out / "history.csv").open(newline="", encoding="utf-8") as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert found.validation == 1 / 4
    assert scores == [1 / n for n in range(5, 9)]  # of the second training


def test_a_trial_of_other_settings_or_a_damaged_one_is_refused_by_name(tmp_path):
    job = job_of("rule", "dense")
    run(job, TINY, tmp_path)
    for other, said in (
        ({"shares": (0.6, 0.4)}, "recipe.data.phantom.shares"),
        ({"rule": "direction"}, "recipe.data.phantom.rule"),
        ({"sizes": dataclasses.replace(TINY.sizes, epochs=2)}, "recipe.epochs"),
    ):
        with pytest.raises(RunError, match=said):
            stored(job, dataclasses.replace(TINY, **other), tmp_path)
    path = tmp_path / "trials" / f"{job.name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | {"version": "0.0"}), encoding="utf-8")
    with pytest.raises(RunError, match="version"):
        stored(job, TINY, tmp_path)
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(RunError, match="not a trial"):
        stored(job, TINY, tmp_path)


def test_a_loss_that_is_not_finite_leaves_a_trial_without_cases(tmp_path):
    job = job_of("rule", "dense", 1e30)
    found = run(job, TINY, tmp_path)
    assert found.validation == -math.inf
    assert not found.dice
    assert stored(job, TINY, tmp_path) == found


def test_upcycling_trains_one_experts_width_for_half_the_epochs_and_goes_on_from_there(
    tmp_path, monkeypatch
):
    recipes = []

    def spied(recipe):
        weights = recipe.model.weights
        recipes.append((recipe, weights and weights.exists()))
        return train(recipe)

    monkeypatch.setattr(trial, "train", spied)
    design = dataclasses.replace(TINY, sizes=dataclasses.replace(TINY.sizes, epochs=3))
    run(job_of("rule", "upcycled"), design, tmp_path)
    (dense, none), (experts, there) = recipes
    assert none is None
    assert there
    assert (dense.model.block, dense.model.hidden, dense.epochs) == ("mlp", 4, 1)
    assert (experts.model.block, experts.model.hidden, experts.epochs) == ("moe", 8, 2)
    assert dataclasses.replace(dense, model=experts.model, out=experts.out, epochs=2) == experts


def test_multiply_adds_are_those_counted_by_hand():
    def counted(**options):
        network = CandidateUNet((4, 8), in_channels=1, n_classes=2, hidden=2, **options).eval()
        return multiply_adds(network, (1, 8, 8), 1)

    first = 16 * 9 * (1 * 4 + 4 * 4) + 16 * 2 * 4 * 8  # 16 tokens: convolutions, MLP 4 -> 8 -> 4
    second = 4 * 9 * (4 * 8 + 8 * 8) + 4 * 2 * 8 * 16
    decoder = 16 * 9 * (8 + 4) * 4 + 16 * 4 * 2 * 4
    assert counted(block="mlp") == first + second + decoder
    routers = 3 * (16 * 4 + 4 * 8)
    experts = {"attribute_sizes": (3,), "n_experts": 3}
    assert counted(k=2, **experts) == first + second + decoder + routers
    assert counted(router="shared", **experts) == counted(**experts)
    # Of 8 and 16 hidden units an expert; 3 experts' scores of one token, 3 experts' weights.
    merging = 3 * (4 + 8) + 3 * 2 * (4 * 8 + 8 * 16)
    merged = counted(k=3, merge=True, **experts)
    assert merged == first + second + decoder + merging, merged - first - second - decoder
    assert counted(k=1, noise="always", **experts) == first + second + decoder + 2 * routers


def test_every_method_is_timed_without_a_trace(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "_ROUNDS", 2)
    # By a clock that is a quarter of a second further each time that it is read.
    clock = SimpleNamespace(perf_counter=itertools.count(0, 0.25).__next__)
    monkeypatch.setattr(cost, "time", clock)
    recipes = {m: TINY.recipe(job_of("rule", m), tmp_path) for m in ("dense", "group-dro", "dmoe")}
    found = step_milliseconds(recipes)
    assert [*found.items()] == [(method, 250) for method in recipes]
    assert not [*tmp_path.iterdir()]
    assert capsys.readouterr().out == ""


def test_a_study_of_a_part_writes_its_tables_and_is_not_run_twice(
    tmp_path, inline, monkeypatch, capsys
):
    monkeypatch.setattr(command, "QUICK", TINY.sizes)
    monkeypatch.setattr(cost, "_ROUNDS", 2)
    settings = StudySettings(
        quick=True,
        out=tmp_path / "out",
        seeds=(3,),
        scenes=("two",),
        methods=("dense", "dmoe-learned"),
        shares=(0.6, 0.4),
        rule="direction",
    )
    results = study(settings)
    assert results == tmp_path / "out" / "results"
    printed = capsys.readouterr().out
    assert "mean nothing" in printed
    assert f"results: {results / 'README.md'}" in printed
    assert "smoke run" in (results / "README.md").read_text(encoding="utf-8")
    assert (results / "figures" / "two.png").exists()
    with (results / "trials.csv").open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert {row["method"] for row in rows} == {"dense", "dmoe", "dmoe-learned"}
    settings_written = json.loads((results / "machine.json").read_text(encoding="utf-8"))[
        "settings"
    ]
    assert settings_written["quick"] is True
    assert settings_written["shares"] == [0.6, 0.4]
    monkeypatch.setattr(runner, "run", None)
    before = (results / "differences.csv").read_bytes()
    assert study(settings) == results
    assert (results / "differences.csv").read_bytes() == before
    with pytest.raises(RunError, match=r"recipe\.data\.phantom\.rule"):
        study(dataclasses.replace(settings, rule="margin"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--scenes", "rule", "moon"], "moon"),
        (["--methods", "dmoe", "best"], "best"),
        (["--methods", "dmoe", "dmoe"], "each once"),
        (["--methods", "k1", "--scenes", "none"], "on the scene none"),
        (["--seeds", "1", "1"], "each once"),
        (["--seeds", "-1"], "0 or more"),
        (["--shares", "1"], "two shares or more"),
        (["--shares", "0.5", "0.4"], "add up to 1"),
        (["--shares", "0.999", "0.001"], "training"),
        (["--processes", "0"], "1 or more"),
        (["--results", "."], "folder you are in"),
    ],
)
def test_what_a_study_cannot_be_is_told_before_anything_is_run(
    flags, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "--quick", *flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not [*Path.cwd().iterdir()]
