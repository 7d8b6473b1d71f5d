"""Runs the study's jobs on several processes: learning rates first, then all that depends on them.

A job that is done stays done: whatever ends a study before its time, the same command goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ..errors import DataError, RunError
from ..training.runs import hold
from ..workers import workers
from .jobs import Job, Trial
from .methods import METHODS
from .trial import Design, run, stored

# Every method without `rate_of` is trained with all three on the first seed, in every scene.
GRID = (0.003, 0.01, 0.03)
# Methods that are trained on one scene's data from several initial weights: what those alone do.
SPREAD_SCENE, SPREAD_METHODS = "rule", ("dense", "film", "dmoe")
INIT_SEED = 1000  # of the initial weights of the study's seed 0
_LINE_EVERY = 20.0  # seconds, where there is no terminal


@dataclass(frozen=True)
class Plan:
    """Which jobs there are.

    Args:
        scenes, methods: names of `SCENES` and `METHODS`; where one takes its learning rate of
            another, that one is among them.
        seeds: of the data. Learning rates are chosen on the first.
    """

    scenes: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def methods_of(self, scene: str) -> tuple[str, ...]:
        """Those that are trained on a scene."""
        return tuple(
            method
            for method in self.methods
            if not METHODS[method].scenes or scene in METHODS[method].scenes
        )

    def tuned(self) -> list[tuple[str, str]]:
        """Every scene and method for which a learning rate is chosen."""
        return [
            (scene, method)
            for scene in self.scenes
            for method in self.methods_of(scene)
            if not METHODS[method].rate_of
        ]

    def tuning(self, scene: str, method: str) -> list[Job]:
        """The jobs that choose a learning rate; the one at that rate is a main job, too."""
        return [_job(scene, method, self.seeds[0], rate) for rate in GRID]

    def depending(self, scene: str, method: str) -> list[str]:
        """The methods that are trained at the learning rate chosen for one, itself included."""
        return [m for m in self.methods_of(scene) if method in (m, METHODS[m].rate_of)]

    def main(self, scene: str, method: str, rate: float) -> list[Job]:
        """One a seed."""
        return [_job(scene, method, seed, rate) for seed in self.seeds]

    def spread(self, scene: str, method: str, rate: float) -> list[Job]:
        """The first seed's data, the other seeds' initial weights."""
        if scene != SPREAD_SCENE or method not in SPREAD_METHODS:
            return []
        return [Job(scene, method, self.seeds[0], INIT_SEED + s, rate) for s in self.seeds[1:]]

    def possible(self) -> set[Job]:
        """Every job that there can be, whichever learning rates are chosen."""
        return {
            job
            for scene in self.scenes
            for method in self.methods_of(scene)
            for rate in GRID
            for job in (*self.main(scene, method, rate), *self.spread(scene, method, rate))
        }

    @property
    def count(self) -> int:
        """Of all jobs, which is known before any learning rate is."""
        rate = GRID[0]
        jobs = {
            job
            for scene in self.scenes
            for method in self.methods_of(scene)
            for job in (*self.main(scene, method, rate), *self.spread(scene, method, rate))
        }
        jobs.update(job for pair in self.tuned() for job in self.tuning(*pair))
        return len(jobs)


@dataclass(frozen=True)
class Outcome:
    """All trials of a study; one that chose a learning rate and has it is in two places.

    Args:
        tuning: one a learning rate of the grid, for every scene and method that has its own.
        main: one a seed, for every scene and method.
        spread: of `SPREAD_METHODS`, on the first seed's data from the other seeds' initial weights.
    """

    tuning: tuple[Trial, ...]
    main: tuple[Trial, ...]
    spread: tuple[Trial, ...]


def chosen_rate(trials: Sequence[Trial]) -> float:
    """The learning rate with the highest validation score, the lowest of equals."""
    best = max(trials, key=lambda trial: (trial.validation, -trial.job.learning_rate))
    return best.job.learning_rate


def run_plan(plan: Plan, design: Design, folder: Path, *, processes: int) -> Outcome:
    """Runs what is not there yet, and tells how far it is.

    Args:
        plan: which jobs.
        design: what they have in common.
        folder: of the study, see `trial`; made if it is not there.
        processes: how many jobs at a time, each on one thread.

    Raises:
        RunError: before anything is run: another process is at work in the folder, or it has a
            trial of other settings. At once: a job failed, or a process was ended from outside.
            When all else is done: the loss of a main job was not finite, or a method's at all
            learning rates.
        DataError: a job could not make its data, at once.
    """
    undecided = plan.tuned()
    asked: dict[str, list[Job]] = {"tuning": [], "main": [], "spread": []}
    known: set[Job] = set()
    waiting: dict[Future[Trial], Job] = {}
    with hold(folder), workers(processes) as pool, _Teller(plan.count) as teller:
        done = {job: trial for job in plan.possible() if (trial := stored(job, design, folder))}

        def ask(purpose: str, jobs: Sequence[Job]) -> None:
            asked[purpose] += jobs
            for job in jobs:
                if job not in known:
                    known.add(job)
                    if job in done:
                        teller.found()
                    else:
                        waiting[pool.submit(run, job, design, folder)] = job

        for pair in undecided:
            ask("tuning", plan.tuning(*pair))
        while undecided or waiting:
            for scene, method in [*undecided]:
                tuning = plan.tuning(scene, method)
                if all(job in done for job in tuning):
                    undecided.remove((scene, method))
                    rate = chosen_rate([done[job] for job in tuning])
                    for dependent in plan.depending(scene, method):
                        ask("main", plan.main(scene, dependent, rate))
                        ask("spread", plan.spread(scene, dependent, rate))
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                done[job] = _result(future, job)
                teller.trained(done[job])
    of = {purpose: tuple(done[job] for job in jobs) for purpose, jobs in asked.items()}
    if lost := [trial.job for trial in (*of["main"], *of["spread"]) if not trial.dice]:
        raise RunError(
            "The loss did not stay finite in: " + ", ".join(job.name for job in lost) + ". All "
            "other jobs are done; leave such a method out by --methods, or such a seed by --seeds."
        )
    return Outcome(**of)


def _job(scene: str, method: str, seed: int, rate: float) -> Job:
    return Job(scene, method, seed, INIT_SEED + seed, rate)


def _result(future: Future[Trial], job: Job) -> Trial:
    try:
        return future.result()
    except (RunError, DataError) as error:
        raise type(error)(f"{job.name}: {error}") from error


class _Teller:
    """A bar on a terminal, lines elsewhere: how many jobs are done and how long the rest takes."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.new = total, 0, 0
        self.started = self.told = time.monotonic()
        self.console = Console(highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("jobs", total=total, left="?")

    def __enter__(self) -> _Teller:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def found(self) -> None:
        """One was done before."""
        self.done += 1
        self.bar.update(self.task, completed=self.done)

    def trained(self, trial: Trial) -> None:
        self.done, self.new, now = self.done + 1, self.new + 1, time.monotonic()
        seconds = (now - self.started) / self.new * (self.total - self.done)
        left = str(timedelta(seconds=round(seconds)))
        self.bar.update(self.task, completed=self.done, left=left, description=trial.job.name)
        last = self.done == self.total
        if not self.console.is_terminal and (last or now - self.told > _LINE_EVERY):
            self.told = now
            self.console.print(
                f"{self.done} of {self.total} jobs, {left} left; {trial.job.name}: "
                f"validation Dice {trial.validation:.3f}",
                soft_wrap=True,
            )
