"""Runs the study's jobs on several processes: learning rates first, then all that depends on them.

A job that is done stays done: whatever ends a study before its time, the same command goes on.
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
    """All trials of a study; one that chose a learning rate and has it is in two places.

    Args:
        tuning: one a learning rate of the grid, for every scene and method that has its own.
        main: one a seed, for every scene and method.
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
            "The loss did not stay finite in: " + ", ".join(job.name for job in lost) + ". All "
            "other jobs are done; leave such a method out by --methods, or such a seed by --seeds."
        )
    return Outcome(**of)


def _result(future: Future[Trial], job: Job) -> Trial:
    try:
        return future.result()
    except (RunError, DataError) as error:
        raise type(error)(f"{job.name}: {error}") from error
