"""Draws time and peak memory against the number of tokens, at one width."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from reference_models.files import write_whole

from ..paper import N_EXPERTS, K
from .rows import OUR_BACKENDS, LayerRow
from .shapes import SWEEP_DIM

# Ours stand out; the others keep one colour each, whatever else a run has. The colours are those
# of Okabe and Ito, which colour-blind readers can tell apart.
STYLES: dict[str, tuple[str, str]] = {
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
_OTHER_STYLE = ("#666666", "-.")
# By provider: (tokens, ms, MiB), tokens rising.
Curves = dict[str, list[tuple[int, float, float]]]


def write_plot(rows: list[LayerRow], path: Path) -> bool:
    """A PNG of forward+backward at width ``SWEEP_DIM``; False if fewer than two such points."""
    lines = curves(rows)
    if not any(len(points) > 1 for points in lines.values()):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    time_axes.set_title("Time of a step, ms", loc="left")
    _draw(time_axes, {name: [(t, ms) for t, ms, _ in points] for name, points in lines.items()})
    memory_axes.set_title("Peak memory of a step, MiB", loc="left")
    _draw(memory_axes, {name: [(t, mib) for t, _, mib in points] for name, points in lines.items()})
    row = rows[0]
    where = "CPU only: " if row.device == "cpu" else ""
    figure.suptitle(
        f"Forward and backward of one layer, d = {SWEEP_DIM}, {N_EXPERTS} experts, {K} a token, "
        f"{row.dtype}\n{where}{row.hardware()}, {row.date}",
        fontsize=10,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_whole(path, lambda target: target.write_bytes(image.getvalue()))
    return True


def curves(rows: list[LayerRow]) -> Curves:
    """Forward+backward at the sweep's width."""
    found: dict[str, dict[int, tuple[int, float, float]]] = {}
    for row in rows:
        drawn = row.dim == SWEEP_DIM and row.which == "forward+backward"
        if drawn and row.median_ms is not None and row.peak_bytes is not None:
            tokens = row.batch * row.tokens
            point = (tokens, row.median_ms, row.peak_bytes / 2**20)
            found.setdefault(row.provider, {})[tokens] = point
    return {name: [points[t] for t in sorted(points)] for name, points in found.items()}


def _draw(axes: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in lines.items():
        colour, dashes = STYLES.get(name, _OTHER_STYLE)
        ours = name in OUR_BACKENDS
        axes.plot(
            *zip(*points, strict=True),
            dashes,
            color=colour,
            linewidth=2.5 if ours else 1.2,
            marker="o",
            markersize=4 if ours else 2.5,
            zorder=3 if ours else 2,
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    tokens = sorted({t for points in lines.values() for t, _ in points})
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens], rotation=30, ha="right")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.grid(which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label_ends(axes, {name: points[-1] for name, points in lines.items()})


def _label_ends(axes: Any, ends: dict[str, tuple[int, float]]) -> None:
    """Names beside the ends of the lines, moved apart where they would overlap."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    height = 0.055 * (high - low)
    names = sorted(ends, key=lambda name: ends[name][1])
    wanted = [math.log(ends[name][1]) for name in names]
    for name, y in zip(names, spread_out(wanted, height), strict=True):
        axes.annotate(
            name,
            ends[name],
            xytext=(1.04, (y - low) / (high - low)),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.6, "shrinkB": 4},
            color=STYLES.get(name, _OTHER_STYLE)[0],
            fontweight="bold" if name in OUR_BACKENDS else "normal",
            fontsize=9,
            va="center",
            annotation_clip=False,
        )


def spread_out(wanted: list[float], least: float) -> list[float]:
    """Rising numbers moved as little as it takes to be ``least`` apart.

    >>> spread_out([0.0, 10.0, 10.0], 2.0)
    [0.0, 9.0, 11.0]
    """
    groups: list[list[float]] = []
    for y in wanted:
        groups.append([y])
        # Groups that would overlap become one, around the mean of what its members want.
        while len(groups) > 1 and _overlap(groups[-2], groups[-1], least):
            last = groups.pop()
            groups[-1] += last
    return [place for group in groups for place in _places(group, least)]


def _overlap(lower: list[float], upper: list[float], least: float) -> bool:
    return _places(upper, least)[0] - least < _places(lower, least)[-1]


def _places(group: list[float], least: float) -> list[float]:
    first = sum(group) / len(group) - least * (len(group) - 1) / 2
    return [first + least * i for i in range(len(group))]
