"""The committed report of the kernels."""

import csv
from typing import get_type_hints

from benchmarks.kernels.report import KernelRow
from benchmarks.output import RESULTS


def committed_rows():
    """As they were before they were written, floats to six digits."""
    kinds = get_type_hints(KernelRow)
    with (RESULTS / "kernels.csv").open(newline="", encoding="utf-8") as file:
        return [
            KernelRow(**{name: read(kinds[name], cell) for name, cell in row.items()})
            for row in csv.DictReader(file)
        ]


def read(kind, cell):
    return kind(cell) if isinstance(kind, type) else float(cell) if cell else None
