"""Measures the layer beside other implementations, prints tables, and writes a CSV and a plot."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..arguments import (
    add_device_flag,
    chosen_device,
    chosen_names,
    require_at_least,
    run_command,
)
from ..machine import device_kind, run_facts
from ..output import SECTIONS, ResultsFolder
from .goals import THREADS, goals_table
from .ours import OURS
from .peers import PEERS
from .plain import PLAIN
from .plot import write_plot
from .report import section, shape_table
from .roofline import measure_roofline
from .rows import LayerRow, LayerRun
from .runner import LEAST_ROUNDS, MOST_ROUNDS, SECONDS, measure_shape
from .shapes import all_shapes, parse_shapes

PROVIDERS = {provider.name: provider for provider in (*OURS, *PLAIN, *PEERS)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(_parser(), _run, words)


def _run(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: a word is not what was expected.
        DataError: the folder cannot be written to, or the README has no marks to write between.
    """
    device = chosen_device(options.device)
    on_cpu = device.type == "cpu"
    dtype = DTYPES[options.dtype or ("float32" if on_cpu else "bfloat16")]
    shapes = parse_shapes(options.shapes or ("quick" if options.quick else "all"), device.type)
    names = chosen_names("providers", options.providers, PROVIDERS)
    require_at_least(1, "rounds", options.rounds)
    require_at_least(1, "threads", options.threads)
    rounds = options.rounds or (2 if options.quick else None if on_cpu else 20)
    kind = device_kind(device)
    whole = (
        kind in SECTIONS
        and set(all_shapes(device.type)) <= set(shapes)
        and len(names) == len(PROVIDERS)
        and options.dtype is None
        and options.threads in (None, THREADS)
        and not options.quick
    )
    out = ResultsFolder.chosen(options.out, whole)

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = run_facts(device, dtype)
    print(facts.one_line())
    if on_cpu:
        print("CPU only: no figure of this run says anything about a GPU.")
    roofline = measure_roofline(device, dtype)
    print(
        f"Measured limits: {roofline.flops / 1e12:.3g} TFLOP/s ({dtype} matrix product), "
        f"{roofline.bytes / 1e9:.3g} GB/s (copy)."
    )
    run = LayerRun(facts, device, dtype, rounds, roofline)
    stem = f"{kind}-{facts.dtype}"
    rows: list[LayerRow] = []
    for shape in shapes:
        new = measure_shape(shape, [PROVIDERS[name] for name in names], run)
        print(f"\n### {shape.name}: {shape}\n\n{shape_table(new)}", flush=True)
        rows += new
        out.write_part(rows, f"{stem}.csv")
        # After each, since a run that is cut short has not come to its end.
        if goals := goals_table(new):
            print(f"\n### Goals at {shape.name}\n\n{goals}", flush=True)
    if len(shapes) > 1 and (goals := goals_table(rows)):
        print(f"\n### Goals\n\n{goals}", flush=True)

    written = [out.write(rows, f"{stem}.csv")]
    picture = out.path / f"{stem}.png"
    if write_plot(rows, picture):
        written.append(picture)
    out.finish(written, kind, lambda: section(rows, stem))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--shapes",
        help="Shapes to measure, separated by commas. Each one is a group (goals, stages, sweep, "
        "and small on a CPU), the name of a shape, or batch x tokens x width x attribute values, "
        "such as 2x1024x48x4. The default is all.",
    )
    parser.add_argument(
        "--providers",
        default="all",
        help="Implementations to measure, separated by commas: all, or some of "
        f"{','.join(PROVIDERS)}. The default is all.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="Number of timed rounds. The default is 20 on a GPU. On a CPU a shape has as many as "
        f"fit into {SECONDS:g} seconds, but at least {LEAST_ROUNDS} and at most {MOST_ROUNDS}.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Make a short run of two rounds. It measures two small shapes, unless --shapes names "
        "others.",
    )
    add_device_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Number format of the layer. The default is float32 on a CPU, and bfloat16 on a GPU.",
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="Number of threads on the CPU. The default is PyTorch's own number.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Folder for the CSV file and the plot. By default a run of all shapes and "
        "implementations writes to benchmarks/results and renews benchmarks/README.md. Other runs "
        "write to bench_output.",
    )
    return parser
