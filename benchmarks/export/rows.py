"""A row for each network, number of threads and kind of program; their file and table."""

from __future__ import annotations

import csv
from dataclasses import dataclass, fields
from pathlib import Path

from reference_models.markdown import markdown_table

from ..machine import RunFacts
from ..output import brief, median_and_quartiles
from .subjects import SUBJECTS
from .ways import DENSE_ONNX, EAGER, SPARSE, WAYS


@dataclass(frozen=True)
class ExportRow(RunFacts):
    """A line of the CSV: median and quartiles, in milliseconds, of a call in eval mode.

    ``difference``: the largest from the eager model's output, over the largest of that; 0 for the
    dense twins, which compute something else.
    """

    onnxruntime: str
    subject: str
    way: str
    ms: float
    ms_low: float
    ms_high: float
    rounds: int
    difference: float

    @property
    def key(self) -> tuple[str, str, str]:
        return self.subject, str(self.threads), self.way


def merged(file: Path, new: list[ExportRow]) -> list[ExportRow]:
    """The file's rows with the new ones in the place of those of the same subject, threads, way."""
    rows = {row.key: row for row in [*read_rows(file), *new]}
    order = [*SUBJECTS], [*WAYS]
    return sorted(
        rows.values(),
        key=lambda row: (order[0].index(row.subject), row.threads, order[1].index(row.way)),
    )


def read_rows(file: Path) -> list[ExportRow]:
    """The rows of a file; none if it is not there."""
    if not file.exists():
        return []
    numbers = {"ms": float, "ms_low": float, "ms_high": float, "rounds": int, "difference": float}
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            ExportRow(**{f.name: numbers.get(f.name, str)(row[f.name]) for f in fields(ExportRow)})
            for row in csv.DictReader(lines)
        ]


def table(rows: list[ExportRow]) -> str:
    """Milliseconds of each program, beside the eager model and the dense twin in onnxruntime."""
    ms = {row.key: row.ms for row in rows}
    lines = []
    for row in rows:
        ratios = [ms.get((row.subject, row.threads, to)) for to in (EAGER, DENSE_ONNX)]
        lines.append(
            [
                row.subject,
                row.threads,
                row.way,
                median_and_quartiles(row.ms, row.ms_low, row.ms_high),
                *("—" if to is None else f"{row.ms / to:.2f}" for to in ratios),
                f"{row.difference:.0e}" if row.difference else "—",
            ]
        )
    heads = ["network", "threads", "program", "ms (quartiles)"]
    heads += ["× eager", f"× {DENSE_ONNX}", "difference"]
    return markdown_table(heads, lines)


_UNHELD = (
    "ONNX Runtime chooses its instructions by the processor and cannot be limited. So its rows use "
    "all instructions that the processor has, and look better beside the other rows than on a "
    "processor that has no more than those. The goals beside eager are judged only where nothing "
    "is limited.\n\n"
)


def section(rows: list[ExportRow]) -> str:
    """What stands in the README: the machine, the table, and which goals are met."""
    first, ms = rows[0], {row.key: row.ms for row in rows}
    commits = " and ".join(dict.fromkeys(row.commit[:12] for row in rows))
    held, goals = "held to" in first.machine, []
    for subject, threads, way in ms:
        sparse = ms[subject, threads, way]
        if way != SPARSE:
            continue
        eager = ms.get((subject, threads, EAGER))
        if eager and not held:
            goals.append((subject, threads, "eager", sparse / eager, 1.1))
        dense = ms.get((subject, threads, DENSE_ONNX))
        if dense and subject.startswith("vit"):
            goals.append((subject, threads, DENSE_ONNX, sparse / dense, 1.25))
    judged = [
        [subject, threads, to, f"{ratio:.2f}", f"≤ {brief(goal)}", verdict(ratio, goal)]
        for subject, threads, to, ratio, goal in goals
    ]
    return (
        f"{first.cpu_warning()}{first.hardware()}; float32, PyTorch {first.torch}, onnxruntime "
        f"{first.onnxruntime}, Python {first.python}, {first.date}, commit {commits}.\n\n"
        f"{_UNHELD if held else ''}{table(rows)}\n\n"
        + markdown_table(
            ["network", "threads", "onnx-sparse beside", "measured", "goal", ""], judged
        )
    )


def verdict(ratio: float, goal: float) -> str:
    """
    >>> verdict(1.1, 1.1), verdict(1.11, 1.1)
    ('met', '**missed**')
    """
    return "met" if ratio <= goal else "**missed**"
