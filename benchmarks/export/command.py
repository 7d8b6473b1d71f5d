"""Times exported programs beside the models they were made of, in eval mode, on the CPU.

A run replaces its own rows of the CSV file and leaves the others, so that a machine can be measured
piece by piece. A run that writes to benchmarks/results renews the page from all rows. Files and
compiled code are made before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..arguments import ArgumentError, chosen_names, require_at_least, run_command
from ..machine import RunFacts, device_kind, run_facts, version
from ..measure import Spread, Stopwatch, interleaved, rounds_that_fit
from ..output import RESULTS, ResultsFolder
from .rows import ExportRow, merged, read_rows, section, table
from .subjects import SUBJECTS
from .ways import EAGER, TWINS, WAYS


def main(words: list[str] | None = None) -> int:
    """Runs the command with these words (None: those of the process); returns the exit status."""
    return run_command(_parser(), run, words)


def run(options: argparse.Namespace) -> None:
    subjects = chosen_names("subjects", options.subjects, SUBJECTS)
    ways = chosen_names("ways", options.ways, WAYS)
    if EAGER not in ways:
        raise ArgumentError(f"ways: got {options.ways!r}, expected {EAGER} among them.")
    require_at_least(1, "threads", options.threads)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    name = f"export-{device_kind(device)}"
    everything = options.out is None and options.subjects == options.ways == "all"
    renews = everything or (options.out is not None and options.out.resolve() == RESULTS)
    out = ResultsFolder.chosen(options.out, renews)
    facts = run_facts(device, torch.float32)
    print(facts.one_line())
    file = out.path / f"{name}.csv"
    for subject in subjects:
        new = measure(subject, ways, facts, options.files, options.seconds)
        print(f"\n{table(new)}", flush=True)
        out.write(merged(file, new), file.name)
    out.finish([file], name, lambda: section(read_rows(file)))


def measure(
    name: str, ways: list[str], facts: RunFacts, files: Path, seconds: float
) -> list[ExportRow]:
    """The rows of one subject, whose ways take turns for about so many seconds."""
    subject, folder = SUBJECTS[name], files / name
    runs = {way: WAYS[way](subject, folder) for way in ways}
    outputs = {way: run() for way, run in runs.items()}  # compiles, too
    watch = Stopwatch(torch.device("cpu"))
    tasks: dict[str, Callable[[], list[float]]] = {
        way: partial(watch.laps, run) for way, run in runs.items()
    }
    interleaved(tasks, 1)
    rounds = rounds_that_fit(tasks, seconds, 3, 200) if seconds else 1
    true, rows = outputs[EAGER], []
    for way, laps in interleaved(tasks, rounds).items():
        spread = Spread.of([lap[-1] for lap in laps])
        off = 0.0 if way in TWINS else np.abs(outputs[way] - true).max() / np.abs(true).max()
        rows.append(
            ExportRow(
                **asdict(facts),
                onnxruntime=version("onnxruntime"),
                subject=name,
                way=way,
                ms=1e3 * spread.median,
                ms_low=1e3 * spread.low,
                ms_high=1e3 * spread.high,
                rounds=spread.rounds,
                difference=float(off),
            )
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.export", description=__doc__)
    parser.add_argument(
        "--subjects",
        default="all",
        help="Networks to measure, separated by commas: all, or some of "
        f"{', '.join(SUBJECTS)}. The default is all.",
    )
    parser.add_argument(
        "--ways",
        default="all",
        help="Kinds of program to measure, separated by commas: all, or some of "
        f"{', '.join(WAYS)}. The default is all.",
    )
    parser.add_argument(
        "--threads", type=int, help="Number of threads. The default is PyTorch's own number."
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=15.0,
        help="Seconds of timing for each network. 0 means one round. The default is %(default)g.",
    )
    parser.add_argument(
        "--files",
        type=Path,
        default=Path("bench_output/export-files"),
        help="Folder for the ONNX files. A file that exists there is not written again. The "
        "default is %(default)s.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Folder for the CSV file. By default a run of everything writes to benchmarks/results "
        "and renews benchmarks/README.md. Other runs write to bench_output.",
    )
    return parser
