"""Reads the study's csv again: the figures and the page are made of nothing else."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import DataError
from .jobs import RIGHT
from .methods import METHODS
from .scenes import SCENES

Row: TypeAlias = dict[str, str]


class Results:
    """The files of a results folder.

    Args:
        folder: that `tables.write_tables` has filled.

    Raises:
        DataError: a file is not there, or says nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine: dict[str, Any] = json.loads(_text(folder / "machine.json"))
        self.smoke: bool = self.machine["settings"]["quick"]
        self.trials = _rows(folder / "trials.csv")
        self.differences = _rows(folder / "differences.csv")
        self.summary = _rows(folder / "summary.csv")
        self.rates = _rows(folder / "rates.csv")
        self.loads = _rows(folder / "loads.csv")
        self.load_distances = _rows(folder / "load_distances.csv")
        self.spread = _rows(folder / "spread.csv")
        self.costs = {row["method"]: row for row in _rows(folder / "costs.csv")}
        there = {(row["scene"], row["method"]) for row in self.summary}
        self.scenes = [name for name in SCENES if any(name == scene for scene, _ in there)]
        self.methods = {
            scene: [name for name in METHODS if (scene, name) in there] for scene in self.scenes
        }

    def mean(self, scene: str, method: str, metric: str, condition: str = RIGHT) -> Row | None:
        """Of summary.csv; None where there is no such row."""
        return _find(self.summary, scene=scene, method=method, condition=condition, metric=metric)

    def seeds(self, scene: str, method: str, metric: str, condition: str = RIGHT) -> list[float]:
        """Of trials.csv, a number a seed of the study; none where the scene has no such metric."""
        wanted = (scene, method, condition)
        return [
            float(row[metric])
            for row in self.trials
            if (row["scene"], row["method"], row["condition"]) == wanted
            and row[metric]
            and row["spread"] == "no"
        ]

    def difference(self, scene: str, a: str, b: str, metric: str = "es_dice") -> Row | None:
        """Of differences.csv; None where there is no such row."""
        return _find(self.differences, scene=scene, a=a, b=b, metric=metric)


def _find(rows: list[Row], **wanted: str) -> Row | None:
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _rows(path: Path) -> list[Row]:
    return list(csv.DictReader(_text(path).splitlines()))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a file that the command `study` "
            f"writes into its results: run it, or name another folder."
        ) from error
