"""Runs the study's jobs in several processes: learning rates first, then all jobs that need them.

A job that is done is not run again: after an interruption the same command continues the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, RunError
from ..training.runs import lock_run
from ..workers import workers
from .job_progress import JobProgress
from .jobs import Job, Trial
from .plan import Plan
from .scenes import Design
from .trial import run, stored


@dataclass(frozen=True)
class Outcome:
    """All trials of a study. A trial whose learning rate was chosen is in `tuning` and in `main`.

    Args:
        tuning: one for each learning rate of the grid, scene and method that has a rate of its own.
        main: one for each seed, scene and method.
        spread: of `plan.SPREAD_METHODS`, on the first seed's data from the other seeds' initial
            weights.
    """

    tuning: tuple[Trial, ...]
    main: tuple[Trial, ...]
    spread: tuple[Trial, ...]


def chosen_rate(trials: Sequence[Trial]) -> float:
    """The learning rate with the highest validation score, the lowest of equals."""
    best = max(trials, key=lambda trial: (trial.validation, -trial.job.learning_rate))
    return best.job.learning_rate


def run_plan(plan: Plan, design: Design, folder: Path, *, processes: int) -> Outcome:
    """Runs the jobs that are not done yet, and shows the progress.

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
    with lock_run(folder), workers(processes) as pool, JobProgress(plan.count) as progress:
        done = {job: trial for job in plan.possible() if (trial := stored(job, design, folder))}

        def ask(purpose: str, jobs: Sequence[Job]) -> None:
            asked[purpose] += jobs
            for job in jobs:
                if job not in known:
                    known.add(job)
                    if job in done:
                        progress.found()
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
                progress.trained(done[job])
    of = {purpose: tuple(done[job] for job in jobs) for purpose, jobs in asked.items()}
    if lost := [trial.job for trial in (*of["main"], *of["spread"]) if not trial.dice]:
        raise RunError(
            "The loss became infinite or NaN in: " + ", ".join(job.name for job in lost) + ". All "
            "other jobs are done. Leave such a method out with --methods, or such a seed with "
            "--seeds."
        )
    return Outcome(**of)


def _result(future: Future[Trial], job: Job) -> Trial:
    try:
        return future.result()
    except (RunError, DataError) as error:
        raise type(error)(f"{job.name}: {error}") from error
