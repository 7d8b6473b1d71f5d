"""Runs the jobs that the plan still has, and writes each row of the results at once.

The csv files record what is done, so that the same command can continue on another machine. Trained
networks lie in another folder. A network that is missing there is trained again when it is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import dmoe_layer

from ...errors import RunError
from ...files import write_whole
from ...machine import processor_name
from ...training.runs import lock_run
from ...workers import workers
from ..csv_table import Record, Table, read_result
from . import plan as design
from .jobs import Effort, choose_ways, run_adaptations, run_training
from .plan import SCENES, TUNING_SEED, Job, Plan
from .tables import ADAPTATIONS, RUNS, Adaptation, SiteRun

MADE_WITH = "made_with.json"


@dataclass
class SiteRows:
    """What is done.

    Args:
        runs: of trainings.
        adaptations: of trained networks.
    """

    runs: list[SiteRun]
    adaptations: list[Adaptation]

    @classmethod
    def read(cls, folder: Path) -> SiteRows:
        """The rows of a results folder; none where it has no tables yet.

        Raises:
            DataError: a file is none that `write` wrote.
        """
        return cls(_rows(RUNS, folder), _rows(ADAPTATIONS, folder))

    def write(self, folder: Path) -> None:
        """Writes both tables, each whole or not at all, in the order of scenes, methods, seeds."""
        places = {scene: place for place, scene in enumerate(SCENES)}

        def place(row: SiteRun | Adaptation) -> tuple[int, Job]:
            return places[row.job.scene], row.job

        _write(folder / RUNS.name, RUNS.text(sorted(self.runs, key=place)))
        adaptations = sorted(self.adaptations, key=place)
        _write(folder / ADAPTATIONS.name, ADAPTATIONS.text(adaptations))

    @property
    def plan(self) -> Plan:
        scores = {row.job: 0.0 for row in self.adaptations}
        for run in self.runs:
            scores[run.job] = run.validation if run.dice is None else run.dice
        return Plan(scores)


def run_sites(
    results: Path, folder: Path, *, processes: int, effort: Effort | None = None
) -> SiteRows:
    """Runs all jobs that are left.

    Args:
        results: folder of the csv, which is made if it is not there.
        folder: of trained networks, likewise; one process at a time works in it.
        processes: how many jobs at a time, each on one thread.
        effort: for how long is trained; None: as the study does.

    Raises:
        RunError: another process is at work in the folder, or the csv are of another design, before
            anything is run; or a process was ended from outside.
        DataError: a csv cannot be read.
    """
    effort = effort or Effort()
    results.mkdir(parents=True, exist_ok=True)
    _require_design(results, effort)
    rows, console = SiteRows.read(results), Console(highlight=False, soft_wrap=True)
    running: dict[Future[Any], Job] = {}
    with lock_run(folder), workers(processes) as pool:
        while True:
            for job in rows.plan.ahead():
                if len(running) == processes:
                    break
                if job in running.values() or not _ready(job, rows):
                    continue
                if job.task == "adapt":
                    chosen = choose_ways([row for row in rows.adaptations if _tuned(row, job)])
                    future = pool.submit(run_adaptations, job, folder, effort, chosen)
                else:
                    future = pool.submit(run_training, job, folder, effort)
                running[future] = job
            if not running:
                return rows
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, found = running.pop(future), future.result()
                if isinstance(found, SiteRun):
                    rows.runs.append(found)
                else:
                    rows.adaptations.extend(found)
                rows.write(results)
                console.print(f"{job.name}: done", markup=False)


def made_with() -> dict[str, Any]:
    """The processor and the versions of this process."""
    return {
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "dmoe_layer": dmoe_layer.__version__,
    }


def _tuned(row: Adaptation, job: Job) -> bool:
    """Whether a row is of the adaptations by which those of a job are chosen."""
    return (row.scene, row.method, row.seed) == (job.scene, job.method, TUNING_SEED)


def _ready(job: Job, rows: SiteRows) -> bool:
    """Whether what a job goes by has been chosen."""
    if job.task != "adapt" or job.seed == TUNING_SEED:
        return True
    return any(_tuned(row, job) for row in rows.adaptations)


def _rows(table: Table[Record], folder: Path) -> list[Record]:
    return table.read(folder) if (folder / table.name).exists() else []


def _require_design(results: Path, effort: Effort) -> None:
    """Writes the design beside the csv, or finds it to be the one that is there.

    Raises:
        RunError: it is another one.
    """
    own = {
        "grid": design.GRID,
        "tuning_seed": TUNING_SEED,
        "seeds": design.SEEDS,
        "compared": design.COMPARED,
        "validation_cases": design.VALIDATION_CASES,
        "test_cases": design.TEST_CASES,
        "new_sites": design.NEW_SITES,
        "new_test_cases": design.NEW_TEST_CASES,
        "labelled": design.LABELLED,
        "adapt_grid": design.ADAPT_GRID,
        "scenes": {name: dataclasses.asdict(scene) for name, scene in SCENES.items()},
        "effort": dataclasses.asdict(effort),
    }
    text = json.dumps({"design": own, "machines": [made_with()]}, indent=1) + "\n"
    path = results / MADE_WITH
    if not path.exists():
        _write(path, text)
        return
    before = json.loads(read_result(path))
    now = json.loads(text)
    differing = [name for name in own if before["design"].get(name) != now["design"][name]]
    if differing:
        raise RunError(
            f"{results}: its runs were made with another design ({', '.join(differing)}). Name "
            "another folder with --results, or remove this one."
        )
    if now["machines"][0] not in before["machines"]:
        before["machines"] += now["machines"]
        _write(path, json.dumps(before, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
