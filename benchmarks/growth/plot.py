"""Draws time and peak memory against every axis."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from reference_models.files import write_whole

from ..layer.plot import STYLES
from ..layer.rows import OUR_BACKENDS
from .rows import SHOWN, GrowthRow, curves

_DASHES = dict(zip(SHOWN, ("-", "--"), strict=True))
_GUIDE = "#aaaaaa"


def write_plot(rows: list[GrowthRow], path: Path) -> bool:
    """A PNG with two panels an axis, time above memory; False if no axis has two points."""
    found = curves(rows)
    several = {axis for (axis, _, _), points in found.items() if len(points) > 1}
    axes = [axis for axis in dict.fromkeys(row.axis for row in rows) if axis in several]
    if not axes:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(3.2 * len(axes), 6.4), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for panel in panels.flat:
        panel.set(xscale="log", yscale="log")
    for column, axis in enumerate(axes):
        for (at, provider, which), points in found.items():
            if at == axis:
                at_values = [row.value for row in points]
                times = [row.median_ms or 0.0 for row in points]
                peaks = [(row.peak_bytes or 0) / 2**20 for row in points]
                _draw(panels[0, column], provider, which, at_values, times)
                _draw(panels[1, column], provider, which, at_values, peaks)
                if provider in OUR_BACKENDS and which == SHOWN[0]:
                    _draw_guide(panels[0, column], points)
        panels[0, column].set_title(axis, fontsize=10)
        values = sorted({row.value for row in rows if row.axis == axis})
        panels[1, column].set_xlabel(axis)
        panels[1, column].set_xticks(values, [f"{v:,}" for v in values], rotation=30, ha="right")
    panels[0, 0].set_ylabel("ms")
    panels[1, 0].set_ylabel("peak MiB")
    for panel in panels.flat:
        panel.grid(which="major", color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        panel.minorticks_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    row = rows[0]
    figure.suptitle(
        f"One layer, {row.dtype}. CPU only: {row.hardware()}, {row.threads} threads, {row.date}",
        fontsize=9,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_whole(path, lambda target: target.write_bytes(image.getvalue()))
    return True


def _draw(panel: Any, provider: str, which: str, values: list[int], heights: list[float]) -> None:
    ours = provider in OUR_BACKENDS
    panel.plot(
        values,
        heights,
        _DASHES[which],
        label=f"{provider}, {which}",
        color=STYLES[provider][0],
        linewidth=2.2 if ours else 1.2,
        marker="o",
        markersize=3.5 if ours else 2.5,
        zorder=3 if ours else 2,
    )


def _draw_guide(panel: Any, points: list[GrowthRow]) -> None:
    """The layer's time if it grew as the arithmetic does, from the last point back."""
    last = points[-1]
    scale = (last.median_ms or 0.0) / (last.flops or 1)
    heights = [scale * (row.flops or 0) for row in points]
    values = [row.value for row in points]
    panel.plot(values, heights, ":", color=_GUIDE, linewidth=1.0, label="as the arithmetic grows")
