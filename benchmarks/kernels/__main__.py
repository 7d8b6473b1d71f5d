"""``python -m benchmarks.kernels``: compiles every Triton kernel for GPUs that need not be there.

The layer's own launches are recorded at the widths of the layer benchmark's goals, and each is
compiled by Triton for compute capability 8.0 and 9.0. Registers, stack and shared memory come from
the binary's resource table, matrix instructions from its disassembly.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import astuple

from ..arguments import run_command
from ..output import RESULTS, write_csv
from .report import DTYPES, WIDTHS, kernel_rows


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(
        argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__), _run, words
    )


def _run(_: argparse.Namespace) -> None:
    """Prints each row when it is there, and writes all of them to ``results/kernels.csv``."""
    rows = []
    for row in kernel_rows(WIDTHS, tuple(DTYPES)):
        rows.append(row)
        print(*astuple(row), sep="  ", flush=True)
    write_csv(rows, RESULTS / "kernels.csv")


if __name__ == "__main__":
    sys.exit(main())
