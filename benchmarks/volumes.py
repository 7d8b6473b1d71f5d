"""``python -m benchmarks.volumes``: memory and time of the 3D network's training step, by patch.

The paper's 3D Residual U-Net without experts, with the paper's code's way of computing them (a
boolean mask for each), and with this layer: alone, with experts for half of the voxels only, and
with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reference_models.terminal import print_anything

from . import machine, readme
from .measure import Spread, Stopwatch, interleaved
from .table import brief, check_writable, markdown, write_csv
from .volume_steps import NETWORKS, Patch, Step

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATCHES = {
    "cpu": "1x64x64x64,1x96x96x96,1x128x128x128,1x192x192x96,1x384x384x128",
    "cuda": "1x128x128x128,1x192x192x96,1x384x384x128,2x384x384x128,4x384x384x128",
}
QUICK = "1x32x32x64,1x64x64x64"
# A step of a larger patch takes a CPU a minute: its memory is measured, its time is not.
_TIMED_ON_CPU = 192 * 192 * 96
_AT_MOST = 0.9  # of the memory that a CPU has to give


@dataclass(frozen=True)
class Row:
    """A line of the CSV; what a row does not have is None, and empty in the file.

    ``status`` is "measured", or says why there are no figures. ``peak_bytes``: the most that was
    allocated during the step beyond network, images and labels, gradients included; on a CPU
    without what its libraries take unseen. ``held_bytes``: between forward and backward.
    ``peak_ratio``, ``time_ratio``: to the network without experts. Times are medians of whole steps
    (forward, cross-entropy, backward; no optimizer) with their quartiles.
    """

    date: str
    commit: str
    machine: str
    threads: str
    python: str
    torch: str
    triton: str
    load: str
    device: str
    dtype: str
    batch: int
    patch: str
    voxels: int
    network: str
    status: str
    peak_bytes: int | None = None
    held_bytes: int | None = None
    peak_ratio: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    time_ratio: float | None = None


def measure_patch(
    patch: Patch,
    networks: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    facts: dict[str, Any],
    smaller: list[Row],
) -> Iterator[Row]:
    """The rows of one patch, in the order of ``networks``.

    Args:
        rounds: timed ones; 0 for memory alone.
        smaller: rows of smaller patches, from which a CPU's memory is foretold: a network that
            would not fit is left out, since a CPU that runs out of memory ends more than the run.
    """
    figures: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], list[float]]] = {}
    watch = Stopwatch(device)
    timed = rounds > 0 and (device.type != "cpu" or patch.voxels <= _TIMED_ON_CPU)
    for name in networks:
        if reason := _too_large(name, patch, device, smaller):
            figures[name] = {"status": reason}
            continue
        try:
            step = Step(name, patch, device, dtype)
            if device.type != "cpu" or timed:
                step()  # compiles and tunes what has to be
            peak, held = step.memory()
        except torch.OutOfMemoryError:
            figures[name] = {"status": "out of memory"}
            continue
        finally:
            gc.collect()  # what an error held
            if device.type == "cuda":
                torch.cuda.empty_cache()
        figures[name] = {"status": "measured", "peak_bytes": peak, "held_bytes": held}
        steps[name] = partial(watch.laps, step)
    if timed:
        for name, laps in interleaved(steps, rounds).items():
            spread = Spread.of([seconds for (seconds,) in laps])
            figures[name] |= {
                "rounds": rounds,
                "median_ms": 1e3 * spread.median,
                "low_ms": 1e3 * spread.low,
                "high_ms": 1e3 * spread.high,
            }
    dense = figures.get(next(iter(NETWORKS)), {})
    for name, found in figures.items():
        for figure, ratio in (("peak_bytes", "peak_ratio"), ("median_ms", "time_ratio")):
            if figure in found and figure in dense:
                found[ratio] = found[figure] / dense[figure]
        yield Row(
            **facts,
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            batch=patch.batch,
            patch="x".join(map(str, patch.sides)),
            voxels=patch.voxels,
            network=name,
            **found,
        )


def _too_large(name: str, patch: Patch, device: torch.device, smaller: list[Row]) -> str:
    """Why a CPU had better not try; empty if nothing is known to stand against it."""
    known = [row for row in smaller if row.network == name and row.peak_bytes is not None]
    if device.type != "cpu" or not known:
        return ""
    last = max(known, key=lambda row: row.voxels)
    assert last.peak_bytes is not None
    needed = last.peak_bytes * patch.voxels / last.voxels
    free = _free_bytes()
    if needed <= _AT_MOST * free:
        return ""
    return f"left out: would take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"


def _free_bytes() -> float:
    info = Path("/proc/meminfo")
    if not info.exists():
        return float("inf")
    line = next(
        x for x in info.read_text(encoding="utf-8").splitlines() if x.startswith("MemAvailable")
    )
    return 1024 * int(line.split()[1])


def table(rows: list[Row]) -> str:
    """All rows in Markdown."""
    lines = []
    for row in rows:
        cells = [f"{row.batch}×{row.patch.replace('x', '×')}", row.network]
        if row.peak_bytes is None or row.held_bytes is None:
            lines.append([*cells, row.status, "", "", "", ""])
            continue
        peak, held = (f"{b / 2**30:.2f} GiB" for b in (row.peak_bytes, row.held_bytes))
        time = "—"
        if row.median_ms is not None:
            time = brief(row.median_ms)
            time += f" ({brief(row.low_ms or 0)}–{brief(row.high_ms or 0)})"
        lines.append([*cells, peak, _times(row.peak_ratio), held, time, _times(row.time_ratio)])
    header = ["patch", "network", "peak", "× dense", "kept for backward", "ms (quartiles)"]
    return markdown([*header, "× dense"], lines)


def section(rows: list[Row]) -> str:
    """What the README shows of a run: where, and the tables of its dtypes."""
    row = rows[0]
    only = "**CPU only: nothing here was measured on a GPU.** " if row.device == "cpu" else ""
    parts = [
        f"{only}{row.machine}; {row.threads} threads, PyTorch {row.torch}, Python {row.python}, "
        f"{row.date}, commit {row.commit[:12]}, load before the run {row.load}."
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        parts += [f"{dtype}:", table([row for row in rows if row.dtype == dtype])]
    name = f"results/volumes-{row.device}.csv"
    return "\n\n".join([*parts, f"All figures: [`{name}`]({name})."])


def parse_patches(text: str) -> list[Patch]:
    """From batch×sides, comma-separated, smallest first.

    >>> [str(patch) for patch in parse_patches("2x64x64x64,1x96x96x32")]
    ['1×96×96×32', '2×64×64×64']
    """
    patches = []
    for word in text.split(","):
        numbers = word.split("x")
        if len(numbers) != 4 or not all(n.isdigit() and int(n) for n in numbers):
            raise ValueError(f"patches: got {word!r}, expected batch x three sides: 1x96x96x64.")
        batch, *sides = map(int, numbers)
        patches.append(Patch(batch, (sides[0], sides[1], sides[2])))
    return sorted(patches, key=lambda patch: patch.voxels)


def parse_networks(text: str) -> list[str]:
    """Some of ``NETWORKS`` by their names in a comma-separated list, or "all"."""
    names = list(NETWORKS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        raise ValueError(
            f"networks: got {unknown[0]!r}, expected all or some of {', '.join(NETWORKS)}."
        )
    return names


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    print_anything()
    options = _parser().parse_args(words)
    try:
        cuda = torch.cuda.is_available() if options.device is None else options.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ValueError("device: got cuda, but PyTorch finds no GPU; expected cpu.")
        device = torch.device("cuda" if cuda else "cpu")
        whole = options.patches is None and options.networks == "all" and not options.quick
        patches = parse_patches(QUICK if options.quick else options.patches or PATCHES[device.type])
        networks = parse_networks(options.networks)
        both = cuda and options.dtype is None
        dtypes = list(DTYPES) if both else [options.dtype or "float32"]
        rounds = (10 if cuda else 3) if options.rounds is None else options.rounds
        if rounds < 0:
            raise ValueError(f"rounds: got {rounds}, expected 0 or more.")
        whole = whole and options.dtype is None and rounds > 0
        out = options.out or (RESULTS if whole else Path("bench_output"))
        check_writable(out)
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.volumes: {error}", file=sys.stderr)
        return 2
    path = out / f"volumes-{device.type}.csv"
    facts, rows = machine.facts(device), []
    print(", ".join(f"{name} {value or 'none'}" for name, value in facts.items()))
    for dtype in dtypes:
        measured: list[Row] = []
        for patch in patches:
            new = list(
                measure_patch(
                    patch,
                    networks,
                    device=device,
                    dtype=DTYPES[dtype],
                    rounds=rounds,
                    facts=facts,
                    smaller=measured,
                )
            )
            measured += new
            rows += new
            print(f"\n### {dtype}, {patch}\n\n{table(new)}", flush=True)
            if not whole:  # whose results stay as they were until all is there
                write_csv(rows, path, Row)
    write_csv(rows, path, Row)
    print(f"\nWrote {path}")
    if whole and out.resolve() == RESULTS:
        readme.replace_section(HERE / "README.md", f"volumes-{device.type}", section(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.volumes", description=__doc__)
    parser.add_argument("--patches", help="batch x sides, comma-separated: 1x96x96x64,2x64x64x64")
    parser.add_argument(
        "--networks", default="all", help=f"all, or some of: {'; '.join(NETWORKS)} (by semicolons)"
    )
    parser.add_argument("--rounds", type=int, help="timed ones (default: 3 on a CPU, 10 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="two small patches")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, and both on a GPU")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the CSV (default: benchmarks/results for a run of everything, which also "
        "renews benchmarks/README.md; else bench_output)",
    )
    return parser


def _times(ratio: float | None) -> str:
    return "—" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
