"""``python -m benchmarks``: measures, prints tables, writes a CSV and a plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from reference_models.terminal import print_anything

from . import machine, plot, readme
from .goals import goals_table
from .measure import measure_roofline
from .peers import PEERS
from .providers import OWN, Provider
from .runner import measure_shape
from .shapes import parse_shapes
from .table import Row, check_writable, shape_table, write_csv

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PROVIDERS = {provider.name: provider for provider in (*OWN, *PEERS)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    print_anything()
    options = _parser().parse_args(words)
    try:
        device = _device(options.device)
        dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
        shapes = parse_shapes("quick" if options.quick else options.shapes, device.type)
        providers = parse_providers(options.providers)
        if options.rounds is not None and options.rounds < 1:
            raise ValueError(f"rounds: got {options.rounds}, expected 1 or more.")
        if options.threads is not None and options.threads < 1:
            raise ValueError(f"threads: got {options.threads}, expected 1 or more.")
        whole = (
            readme.is_whole([s.name for s in shapes], device.type)
            and len(providers) == len(PROVIDERS)
            and options.dtype is None
        )
        out = options.out or (RESULTS if whole else Path("bench_output"))
        check_writable(out)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 5 if device.type == "cpu" else 20)

    facts = machine.facts(device)
    print(", ".join(f"{name} {value or 'none'}" for name, value in facts.items()))
    if device.type == "cpu":
        print("CPU only: no figure of this run says anything about a GPU.")
    roofline = measure_roofline(device, dtype)
    print(
        f"Measured limits: {roofline.flops / 1e12:.3g} TFLOP/s ({dtype} matrix product), "
        f"{roofline.bytes / 1e9:.3g} GB/s (copy)."
    )
    stem = f"{device.type}-{str(dtype).removeprefix('torch.')}"
    written = [out / f"{stem}.csv"]
    rows: list[Row] = []
    for shape in shapes:
        new = measure_shape(
            shape,
            providers,
            device=device,
            dtype=dtype,
            rounds=rounds,
            roofline=roofline,
            facts=facts,
        )
        print(f"\n### {shape.name}: {shape}\n\n{shape_table(new)}", flush=True)
        rows += new
        if not whole:  # whose results stay as they were until all is there
            write_csv(rows, written[0])
    if goals := goals_table(rows):
        print(f"\n### Goals\n\n{goals}")

    write_csv(rows, written[0])
    if plot.write_plot(rows, out / f"{stem}.png"):
        written.append(out / f"{stem}.png")
    if out.resolve() == RESULTS and whole:
        readme.write_results(rows, HERE / "README.md", stem)
        written.append(HERE / "README.md")
    print("\nWrote " + ", ".join(map(str, written)))
    return 0


def parse_providers(text: str) -> list[Provider]:
    """Providers from a comma-separated list of names, or "all"."""
    if text == "all":
        return list(PROVIDERS.values())
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PROVIDERS]:
        raise ValueError(
            f"providers: got {unknown[0]!r}, expected all or some of {', '.join(PROVIDERS)}."
        )
    return [PROVIDERS[name] for name in names]


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


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but PyTorch finds no GPU; expected cpu.")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    sys.exit(main())
