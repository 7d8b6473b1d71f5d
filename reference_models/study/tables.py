"""What the study found, as csv: every number of its pages and figures is one of these.

    trials.csv          a row a trial and condition: scores, cost, what the network was told
    differences.csv     of two methods, or of a method told something else and itself
    summary.csv         each score over the seeds
    rates.csv           the learning rates that were tried, and which was chosen
    loads.csv           which experts each attribute value's tokens went to
    load_distances.csv  how far the attribute values' loads lie apart
    spread.csv          how much the score varies with the initialisation, and with all of the seed
    costs.csv           parameters, multiply-adds and time
    cases.csv           the Dice of every test case
    machine.json        what it was made with

What is not defined is empty, intervals over a single seed among it. `ahead` counts the seeds whose
difference is above 0 at the four decimals shown; `by_seed` is in the order of the seeds.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dmoe_layer

from .jobs import Trial
from .rows import Found, Row
from .statistics import METRICS

COLUMNS: dict[str, tuple[str, ...]] = {
    "trials.csv": (
        "scene", "method", "data_seed", "init_seed", "learning_rate", "condition", "told_right",
        *METRICS[:3], "worst_group", *METRICS[3:], "validation", "parameters", "multiply_adds",
        "spread",
    ),
    "differences.csv": (
        "scene", "a", "b", "metric", "difference", "low", "high", "ahead", "seeds", "by_seed",
    ),
    "summary.csv": (
        "scene", "method", "condition", "metric", "mean", "low", "high", "lowest", "highest",
        "seeds",
    ),
    "rates.csv": ("scene", "method", "learning_rate", "validation", "chosen", "edge"),
    "loads.csv": (
        "scene", "method", "data_seed", "init_seed", "condition", "attribute", "value", "shares",
    ),
    "load_distances.csv": (
        "scene", "method", "data_seed", "init_seed", "attribute", "distance",
    ),
    "spread.csv": (
        "scene", "method", "data_seed", "inits", "over_inits", "seeds", "over_seeds",
    ),
    "costs.csv": (
        "scene", "method", "parameters", "multiply_adds", "multiply_adds_of_dense", "milliseconds",
        "milliseconds_of_dense",
    ),
    "cases.csv": ("scene", "data_seed", "init_seed", "case", "group", "attributes", "seen"),
}  # fmt: skip
CONTENTS = (*COLUMNS, "machine.json")


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
    """Writes all of `CONTENTS`, whatever part of the study there is.

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
    found = Found(tuning, main, spread, population)
    rows: dict[str, Iterable[Row]] = {
        "trials.csv": found.trials(),
        "differences.csv": found.differences(),
        "summary.csv": found.summary(),
        "rates.csv": found.rates(),
        "loads.csv": found.loads(),
        "load_distances.csv": found.load_distances(),
        "spread.csv": found.spread(),
        "costs.csv": found.costs(milliseconds),
        "cases.csv": found.cases(),
    }
    further = {
        "trials.csv": [f"dice_{group}" for group in range(max(map(len, population.values())))],
        "cases.csv": found.methods,
    }
    for name, fixed in COLUMNS.items():
        columns = (*fixed, *further.get(name, ()))
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {key: _cell(value) for key, value in row.items()} for row in rows[name]
            )
    text = json.dumps(_machine(settings, seconds), indent=1, ensure_ascii=False) + "\n"
    (folder / "machine.json").write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    """As it stands in a csv: four decimals, yes or no, ";" between, empty of nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ";".join(map(_cell, value))
    if isinstance(value, float):
        return f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no minus before a zero
    return str(value)


def _machine(settings: Mapping[str, Any], seconds: float) -> Row:
    """What the study was made with."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return {
        "machine": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in ("torch", "numpy")},
        "dmoe_layer": dmoe_layer.__version__,
        "settings": {**settings},
        "seconds": round(seconds),
    }
