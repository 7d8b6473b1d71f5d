"""Draws time and peak memory against the number of tokens, at one width."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .shapes import SWEEP_DIM
from .table import Row, write_whole

# Ours stand out; the others keep one colour each, whatever else a run has. The colours are those
# of Okabe and Ito, which colour-blind readers can tell apart.
_STYLE: dict[str, tuple[str, str]] = {
    "eager": ("#D55E00", "-"),
    "triton": ("#D55E00", "--"),
    "mask-loop": ("#000000", "-"),
    "gemm-loop": ("#0072B2", "-"),
    "grouped-mm": ("#56B4E9", "-"),
    "dense": ("#999999", ":"),
    "transformers": ("#009E73", "-"),
    "scattermoe": ("#CC79A7", "-"),
    "sonicmoe": ("#CC79A7", "--"),
    "megablocks": ("#E69F00", "-"),
    "st-moe": ("#E69F00", "--"),
}


def write_plot(rows: list[Row], path: Path) -> bool:
    """A PNG of forward+backward at width ``SWEEP_DIM``; False if fewer than two such points."""
    lines = curves(rows)
    if not any(len(points) > 1 for points in lines.values()):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for axes, index, title in (
        (time_axes, 1, "Time of a step, ms"),
        (memory_axes, 2, "Peak memory of a step, MiB"),
    ):
        for name, points in lines.items():
            colour, dashes = _STYLE.get(name, ("#666666", "-."))
            ours = name in ("eager", "triton")
            axes.plot(
                [point[0] for point in points],
                [point[index] for point in points],
                dashes,
                color=colour,
                linewidth=2.5 if ours else 1.2,
                marker="o",
                markersize=4 if ours else 2.5,
                zorder=3 if ours else 2,
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        axes.set_title(title, loc="left")
        axes.grid(which="major", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        _label_ends(
            axes, {name: (points[-1][0], points[-1][index]) for name, points in lines.items()}
        )
    row = rows[0]
    where = "CPU only: " if row.device == "cpu" else ""
    figure.suptitle(
        f"Forward and backward of one layer, d = {SWEEP_DIM}, 8 experts, 2 a token, {row.dtype} "
        f"({where}{row.machine}, {row.date})",
        fontsize=10,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_whole(path, image.getvalue())
    return True


def curves(rows: list[Row]) -> dict[str, list[tuple[int, float, float]]]:
    """By provider: (tokens, ms, MiB) of forward+backward at the sweep's width, tokens rising."""
    found: dict[str, dict[int, tuple[int, float, float]]] = {}
    for row in rows:
        drawn = row.dim == SWEEP_DIM and row.which == "forward+backward"
        if drawn and row.median_ms is not None and row.peak_bytes is not None:
            tokens = row.batch * row.tokens
            point = (tokens, row.median_ms, row.peak_bytes / 2**20)
            found.setdefault(row.provider, {})[tokens] = point
    return {name: [points[t] for t in sorted(points)] for name, points in found.items()}


def _label_ends(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the ends of the lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    rightmost = max(x for x, _ in ends.values())
    least = (high / low) ** 0.05  # a label's height, as a factor on the logarithmic axis
    below = low
    for name, (_, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        below = max(y, below * least)
        axes.annotate(
            name,
            (rightmost, below),
            xytext=(8, 0),
            textcoords="offset points",
            color=_STYLE.get(name, ("#666666", ""))[0],
            fontweight="bold" if name in ("eager", "triton") else "normal",
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
