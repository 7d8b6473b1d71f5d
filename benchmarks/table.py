"""One row for each shape, provider and pass; the CSV that holds them; tables in Markdown."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .measure import Roofline, Spread
from .profiled import StepMemory
from .shapes import Shape, flops, min_bytes


@dataclass(frozen=True)
class Row:
    """A line of the CSV; what a row does not have is None, and empty in the file.

    ``load`` is the load average before the run: near 0, or others took part of the machine.
    ``status`` is "timed", or begins with "wrong", "unavailable" or "failed" and says why; then
    there are no figures. ``relative_error`` is ``Problem.error_of``. Times are medians over the
    rounds with their quartiles; ``tflops`` and ``gbytes_per_s`` are ``shapes.flops`` and
    ``shapes.min_bytes`` over the median; ``roofline_share`` is the least time on the measured
    roofline over the median (for the router its bytes alone count); ``ratio_to_loop`` is
    mask-loop's median over this one. Memory is that of ``profiled.StepMemory``; ``held_td`` and
    ``excess_td`` are in units of T·d elements.
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
    shape: str
    batch: int
    tokens: int
    dim: int
    attribute_values: int
    provider: str
    version: str
    which: str
    status: str
    note: str
    relative_error: float | None = None
    rounds: int | None = None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    ratio_to_loop: float | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    roofline_share: float | None = None
    peak_bytes: int | None = None
    held_td: float | None = None
    excess_td: float | None = None
    roofline_tflops: float | None = None
    roofline_gbytes_per_s: float | None = None


def figures(
    shape: Shape,
    which: str,
    spread: Spread,
    loop: Spread | None,
    memory: StepMemory | None,
    roofline: Roofline,
    dtype: torch.dtype,
    *,
    routes: bool,
    counts_flops: bool,
) -> dict[str, float | int | None]:
    """The figures of a timed row. ``counts_flops=False``: other maths, of which no formula is."""
    element = dtype.itemsize
    work = flops(shape, which, routes=routes)
    moved = min_bytes(shape, which, element, routes=routes)
    least = moved / roofline.bytes if which.startswith("router") else roofline.seconds(work, moved)
    found: dict[str, float | int | None] = {
        "rounds": spread.rounds,
        "median_ms": 1e3 * spread.median,
        "low_ms": 1e3 * spread.low,
        "high_ms": 1e3 * spread.high,
        "ratio_to_loop": loop.median / spread.median if loop else None,
    }
    if counts_flops:
        found["tflops"] = work / spread.median / 1e12
        found["gbytes_per_s"] = moved / spread.median / 1e9
        found["roofline_share"] = least / spread.median
    if memory:
        both = which == "forward+backward"
        unit = shape.total_tokens * shape.dim * element
        found["peak_bytes"] = memory.peak if both else memory.forward_peak
        found["held_td"] = memory.held / unit if both else None
        found["excess_td"] = memory.excess / unit if both else None
    return found


def write_csv(rows: Sequence[Any], path: Path, kind: type = Row) -> None:
    """Whole or not at all. ``kind`` is the dataclass of the rows, whose fields are the columns."""
    text = io.StringIO(newline="")
    columns = [field.name for field in fields(kind)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in asdict(row).items()}
        )
    write_whole(path, text.getvalue().encode())


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there with all of ``content``, or as it was before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def check_writable(folder: Path) -> None:
    """Makes the folder, and a file in it, before anything is measured.

    Raises:
        ValueError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"out: got {folder}, expected a folder that can be written to ({error.strerror})."
        ) from error


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """
    >>> print(markdown(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    cells = [header, ["---"] * len(header), *lines]
    joined = ["| " + " | ".join(line) + " |" for line in cells]
    joined[1] = "|" + "---|" * len(header)
    return "\n".join(joined)


def shape_table(rows: list[Row]) -> str:
    """Every provider of one shape with all figures; those that were not timed say why."""
    header = [
        "provider", "pass", "ms (quartiles)", "× loop", "TFLOP/s", "GB/s", "of roofline",
        "peak MiB", "kept, T·d", "note",
    ]  # fmt: skip
    lines = []
    for row in rows:
        if row.median_ms is None:
            lines.append([row.provider, *["—"] * (len(header) - 2), row.status])
            continue
        lines.append(
            [
                row.provider,
                row.which,
                f"{brief(row.median_ms)} ({brief(row.low_ms or 0)}–{brief(row.high_ms or 0)})",
                _show(row.ratio_to_loop, ".2f"),
                _show(row.tflops, ".3g"),
                _show(row.gbytes_per_s, ".3g"),
                _show(row.roofline_share, ".0%"),
                "—" if row.peak_bytes is None else brief(row.peak_bytes / 2**20),
                _show(row.held_td, ".2f"),
                row.note,
            ]
        )
    return markdown(header, lines)


def brief(value: float) -> str:
    """Three digits, without an exponent.

    >>> brief(1012.3), brief(39.96), brief(0.12345)
    ('1,010', '40', '0.123')
    """
    return f"{float(f'{value:.3g}'):,g}"


def _show(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
