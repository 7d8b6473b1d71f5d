"""Measures how time and memory grow with each number of a layer.

Tokens, experts, k, attribute values and width grow one at a time, for this layer, the paper's
boolean-mask loop and a dense MLP of equal active FLOPs, on the CPU in float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..arguments import require_at_least, run_command
from ..layer.goals import THREADS
from ..machine import device_kind, run_facts
from ..output import SECTIONS, ResultsFolder
from .axes import axes
from .measuring import LEAST_ROUNDS, MOST_ROUNDS, SECONDS, measure_axis
from .plot import write_plot
from .report import growth_table, outgrown, points_table, section
from .rows import GrowthRow


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(_parser(), _run, words)


def _run(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: a word is not what was expected.
        DataError: the folder cannot be written to, or the README has no marks to write between.
    """
    require_at_least(1, "rounds", options.rounds)
    require_at_least(1, "threads", options.threads)
    rounds = options.rounds or (2 if options.quick else None)
    device = torch.device("cpu")
    kind = device_kind(device)
    whole = kind in SECTIONS and not options.quick and options.threads in (None, THREADS)
    out = ResultsFolder.chosen(options.out, whole)

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = run_facts(device, torch.float32)
    print(facts.one_line())
    stem = f"growth-{kind}"
    rows: list[GrowthRow] = []
    for axis in axes(options.quick):
        new = measure_axis(axis, facts, rounds)
        print(f"\n### {axis.title}\n\n{points_table(new)}", flush=True)
        rows += new
        out.write_part(rows, f"{stem}.csv")
    print(f"\n### Growth\n\n{growth_table(rows)}\n\n{outgrown(rows)}")

    written = [out.write(rows, f"{stem}.csv")]
    picture = out.path / f"{stem}.png"
    if write_plot(rows, picture):
        written.append(picture)
    out.finish(written, stem, lambda: section(rows, stem))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--rounds",
        type=int,
        help="Number of timed rounds. By default a point has as many as fit into "
        f"{SECONDS:g} seconds, but at least {LEAST_ROUNDS} and at most {MOST_ROUNDS}. A large "
        f"point has {LEAST_ROUNDS}.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Measure only two small points of each number, in two rounds.",
    )
    parser.add_argument(
        "--threads", type=int, help="Number of threads. The default is PyTorch's own number."
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Folder for the CSV file and the plot. By default a whole run writes to "
        "benchmarks/results and renews benchmarks/README.md. Other runs write to bench_output.",
    )
    return parser
