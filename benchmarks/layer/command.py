"""``python -m benchmarks``: measures, prints tables, writes a CSV and a plot."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from reference_models.errors import DataError
from reference_models.markdown import replace_section
from reference_models.terminal import print_anything

from ..arguments import ArgumentError, chosen_device, chosen_names, require_at_least
from ..machine import run_facts
from ..output import OTHER_RESULTS, README, RESULTS, check_writable, write_csv
from .goals import goals_table
from .ours import OURS
from .peers import PEERS
from .plain import PLAIN
from .plot import write_plot
from .provider import Provider
from .report import section, shape_table
from .roofline import measure_roofline
from .rows import LayerRow, LayerRun
from .runner import measure_shape
from .shapes import Shape, all_shapes, parse_shapes

PROVIDERS = {provider.name: provider for provider in (*OURS, *PLAIN, *PEERS)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    print_anything()
    options = _parser().parse_args(words)
    try:
        _run(_Order.of(options))
    except (ArgumentError, DataError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class _Order:
    """What the command line asks for, checked before anything is measured.

    ``whole``: everything that the README shows is measured, as it shows it.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: list[Shape]
    providers: list[Provider]
    rounds: int
    threads: int | None
    whole: bool
    out: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Order:
        """
        Raises:
            ArgumentError: a word is not what was expected.
            DataError: the folder cannot be written to.
        """
        device = chosen_device(options.device)
        on_cpu = device.type == "cpu"
        shapes = parse_shapes("quick" if options.quick else options.shapes, device.type)
        names = chosen_names("providers", options.providers, PROVIDERS)
        require_at_least(1, "rounds", options.rounds)
        require_at_least(1, "threads", options.threads)
        all_of_them = set(all_shapes(device.type)) <= set(shapes) and len(names) == len(PROVIDERS)
        whole = all_of_them and options.dtype is None
        out = options.out or (RESULTS if whole else OTHER_RESULTS)
        check_writable(out)
        return cls(
            device=device,
            dtype=DTYPES[options.dtype or ("float32" if on_cpu else "bfloat16")],
            shapes=shapes,
            providers=[PROVIDERS[name] for name in names],
            rounds=options.rounds or (2 if options.quick else 5 if on_cpu else 20),
            threads=options.threads,
            whole=whole,
            out=out,
        )


def _run(order: _Order) -> None:
    """
    Raises:
        DataError: the README has no marks to write between.
    """
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    facts = run_facts(order.device, order.dtype)
    print(facts.one_line())
    if facts.device == "cpu":
        print("CPU only: no figure of this run says anything about a GPU.")
    roofline = measure_roofline(order.device, order.dtype)
    print(
        f"Measured limits: {roofline.flops / 1e12:.3g} TFLOP/s ({order.dtype} matrix product), "
        f"{roofline.bytes / 1e9:.3g} GB/s (copy)."
    )
    run = LayerRun(facts, order.device, order.dtype, order.rounds, roofline)
    stem = f"{facts.device}-{facts.dtype}"
    path, picture = order.out / f"{stem}.csv", order.out / f"{stem}.png"
    rows: list[LayerRow] = []
    for shape in order.shapes:
        new = measure_shape(shape, order.providers, run)
        print(f"\n### {shape.name}: {shape}\n\n{shape_table(new)}", flush=True)
        rows += new
        if not order.whole:  # whose results stay as they were until all is there
            write_csv(rows, path)
    if goals := goals_table(rows):
        print(f"\n### Goals\n\n{goals}")

    write_csv(rows, path)
    written = [path]
    if write_plot(rows, picture):
        written.append(picture)
    if order.whole and order.out.resolve() == RESULTS:
        replace_section(README, facts.device, section(rows, stem))
        written.append(README)
    print("\nWrote " + ", ".join(map(str, written)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--shapes",
        default="all",
        help="groups (goals, stages, sweep), names, or batch x tokens x dim x values: 2x1024x48x4",
    )
    parser.add_argument("--providers", default="all", help=f"all, or some of {','.join(PROVIDERS)}")
    parser.add_argument(
        "--rounds", type=int, help="timed rounds (default: 5 on a CPU, 20 on a GPU)"
    )
    parser.add_argument("--quick", action="store_true", help="two small shapes, two rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for CSV and plot (default: benchmarks/results for a run of all shapes and "
        "providers, which also renews benchmarks/README.md; else bench_output)",
    )
    return parser
