"""The folder of the study's results: its tables, written from trials and read again."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dmoe_layer

from ..machine import processor_name
from . import tables
from .csv_table import read_result
from .jobs import TOLD_RIGHT, Trial
from .methods import METHODS
from .rows import StudyRows
from .scenes import SCENES
from .tables import CaseDice, Difference, ScoreSummary


def write_tables(
    folder: Path,
    *,
    tuning: Sequence[Trial],
    main: Sequence[Trial],
    spread: Sequence[Trial],
    population: Mapping[str, Sequence[float]],
    milliseconds: Mapping[str, float],
    settings: Mapping[str, Any],
    seconds: float,
) -> None:
    """Writes all of `tables.CONTENTS`, whatever part of the study there is.

    Args:
        folder: there and empty: the one that `files.write_results` hands over, so that a reader
            finds the old tables or the new.
        tuning: one a learning rate that was tried, for every scene and method that chose its own;
            of one that diverged the validation score alone counts.
        main: one a seed, for every scene and method, at the learning rate chosen.
        spread: on one seed's data, from the other seeds' initialisations.
        population: by scene, each group's share in "overall".
        milliseconds: by method, the median of a training step; it may be empty.
        settings: the command's, with whether it was a smoke run; without paths.
        seconds: of work of one core that its jobs took together.

    Raises:
        ValueError: of one scene and seed, two methods were tested on different cases.
    """
    rows = StudyRows(tuning, main, spread, population)
    tables.TRIALS.write(folder, rows.trials(), rows.groups)
    tables.DIFFERENCES.write(folder, rows.differences())
    tables.SUMMARY.write(folder, rows.summary())
    tables.RATES.write(folder, rows.rates())
    tables.LOADS.write(folder, rows.loads())
    tables.LOAD_DISTANCES.write(folder, rows.load_distances())
    tables.SPREAD.write(folder, rows.spread())
    tables.COSTS.write(folder, rows.costs(milliseconds))
    tables.CASES.write(folder, rows.cases(), rows.methods)
    made_with = {**_machine(), "settings": {**settings}, "seconds": round(seconds)}
    text = json.dumps(made_with, indent=1, ensure_ascii=False) + "\n"
    (folder / tables.MACHINE).write_text(text, encoding="utf-8")


class Results:
    """The tables of a results folder.

    Args:
        folder: that `write_tables` has filled.

    Raises:
        DataError: a file is not there, or holds something else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made_with: dict[str, Any] = json.loads(read_result(folder / tables.MACHINE))
        self.smoke: bool = self.made_with["settings"]["quick"]
        self.trials = tables.TRIALS.read(folder)
        self.differences = tables.DIFFERENCES.read(folder)
        self.summary = tables.SUMMARY.read(folder)
        self.rates = tables.RATES.read(folder)
        self.loads = tables.LOADS.read(folder)
        self.load_distances = tables.LOAD_DISTANCES.read(folder)
        self.spread = tables.SPREAD.read(folder)
        self.costs = {cost.method: cost for cost in tables.COSTS.read(folder)}
        there = {(row.scene, row.method) for row in self.summary}
        self.scenes = [name for name in SCENES if any(name == scene for scene, _ in there)]
        self.methods = {
            scene: [name for name in METHODS if (scene, name) in there] for scene in self.scenes
        }

    def mean(
        self, scene: str, method: str, metric: str, condition: str = TOLD_RIGHT
    ) -> ScoreSummary | None:
        """A score over the seeds; None where there is no such row."""
        wanted = (scene, method, condition, metric)
        return next(
            (r for r in self.summary if (r.scene, r.method, r.condition, r.metric) == wanted), None
        )

    def seeds(
        self, scene: str, method: str, metric: str, condition: str = TOLD_RIGHT
    ) -> list[float]:
        """A score of every seed of the study; none where the scene has no such metric."""
        wanted = (scene, method, condition)
        return [
            score
            for row in self.trials
            if (row.scene, row.method, row.condition) == wanted and not row.spread
            if (score := getattr(row, metric)) is not None
        ]

    def difference(self, scene: str, a: str, b: str, metric: str = "es_dice") -> Difference | None:
        """How two methods differ; None where there is no such row."""
        return self._differences.get((scene, a, b, metric))

    @functools.cached_property
    def _differences(self) -> dict[tuple[str, str, str, str], Difference]:
        return {(row.scene, row.a, row.b, row.metric): row for row in self.differences}

    @functools.cached_property
    def _cases(self) -> list[CaseDice]:
        return tables.CASES.read(self.folder)

    def cases_of(self, scene: str, method: str) -> dict[int, list[CaseDice]]:
        """By seed of the initial weights, the test cases of a method, in their order."""
        by_seed: dict[int, list[CaseDice]] = {}
        for case in self._cases:
            if case.scene == scene and method in case.dice:
                by_seed.setdefault(case.init_seed, []).append(case)
        return by_seed


def _machine() -> dict[str, Any]:
    """The processor and the versions that the study was made with."""
    return {
        "machine": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "numpy")},
        "dmoe_layer": dmoe_layer.__version__,
    }
