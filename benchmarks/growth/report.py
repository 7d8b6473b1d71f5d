"""A run in Markdown: how much each axis multiplies time, memory and arithmetic, and all points."""

from __future__ import annotations

from reference_models.markdown import markdown_table

from ..layer.rows import OUR_BACKENDS
from ..output import brief
from .rows import SHOWN, Curves, GrowthRow, curves

# Above so many times the arithmetic's growth, the time's growth is listed.
_MORE = 1.25


def section(rows: list[GrowthRow], stem: str) -> str:
    """Machine, growth along every axis, where time outgrows the arithmetic, and all points."""
    row = rows[0]
    conditions = (
        f"{row.cpu_warning()}{row.hardware()}; {row.dtype}, {row.software()}, load of the machine "
        f"before the run {row.load}."
    )
    points = "\n\n".join([conditions, growth_table(rows), outgrown(rows), points_table(rows)])
    files = f"All numbers: [`results/{stem}.csv`](results/{stem}.csv)."
    return f"{points}\n\n{files}\n\n![how cost grows](results/{stem}.png)"


def growth_table(rows: list[GrowthRow]) -> str:
    """A line an axis and pass: from its first to its last point, how much each thing grew.

    The arithmetic is that of our layer. Of a provider that was left out of the last points, the
    last one that it has is named.
    """
    found, providers = curves(rows), _providers(rows)
    lines = []
    for axis, which in _lines(rows):
        ours = _ours(found, axis, which)
        if len(ours) < 2:
            continue
        cells = [f"{axis} {ours[0].value:,} → {ours[-1].value:,}", which]
        cells.append(f"× {brief(ours[-1].value / ours[0].value)}")
        cells.append(f"× {brief(_arithmetic(ours))}")
        for provider in providers:
            points = found.get((axis, provider, which), [])
            end = "" if points and points[-1].value == ours[-1].value else f" to {_last(points)}"
            cells.append(f"× {brief(_time(points))}, × {brief(_peak(points))}{end}")
        lines.append(cells)
    header = ["number", "pass", "grows", "arithmetic", *(f"{p}: time, memory" for p in providers)]
    return markdown_table(header, lines)


def outgrown(rows: list[GrowthRow]) -> str:
    """The axes along which our time grew by more than the arithmetic."""
    found, lines = curves(rows), []
    for axis, which in _lines(rows):
        ours = _ours(found, axis, which)
        if len(ours) > 1 and _time(ours) > _MORE * _arithmetic(ours):
            others = [
                f"{provider} × {brief(_time(points))}"
                for provider in _providers(rows)
                if provider not in OUR_BACKENDS
                and len(points := found.get((axis, provider, which), [])) > 1
            ]
            lines.append(
                f"- {axis} {ours[0].value:,} → {ours[-1].value:,}, {which}: "
                f"time × {brief(_time(ours))}, arithmetic × {brief(_arithmetic(ours))}"
                + (f" ({', '.join(others)})" if others else "")
            )
    if not lines:
        return "The time of this layer grows faster than the arithmetic nowhere."
    return "\n".join(["Where the time of this layer grows faster than the arithmetic:", "", *lines])


def points_table(rows: list[GrowthRow]) -> str:
    """A line a point, a column a provider: ms of step / eval, peak MiB of step / eval."""
    providers, lines = _providers(rows), []
    points = dict.fromkeys((row.axis, row.value) for row in rows)
    for axis, value in points:
        cells = [f"{axis} {value:,}"]
        for provider in providers:
            here = [r for r in rows if (r.axis, r.value, r.provider) == (axis, value, provider)]
            cells.append(_cell(here))
        lines.append(cells)
    return markdown_table(["point", *providers], lines)


def _cell(rows: list[GrowthRow]) -> str:
    by_pass = {row.which: row for row in rows}
    if set(by_pass) != set(SHOWN):
        return rows[0].status if rows else "—"
    times = " / ".join(brief(by_pass[which].median_ms or 0.0) for which in SHOWN)
    peaks = " / ".join(brief((by_pass[which].peak_bytes or 0) / 2**20) for which in SHOWN)
    return f"{times} ms, {peaks} MiB"


def _lines(rows: list[GrowthRow]) -> list[tuple[str, str]]:
    return [(axis, which) for axis in dict.fromkeys(row.axis for row in rows) for which in SHOWN]


def _providers(rows: list[GrowthRow]) -> list[str]:
    return list(dict.fromkeys(row.provider for row in rows))


def _ours(found: Curves, axis: str, which: str) -> list[GrowthRow]:
    return next((c for p in OUR_BACKENDS if (c := found.get((axis, p, which), []))), [])


def _arithmetic(points: list[GrowthRow]) -> float:
    return _grown([row.flops for row in points])


def _time(points: list[GrowthRow]) -> float:
    return _grown([row.median_ms for row in points])


def _peak(points: list[GrowthRow]) -> float:
    return _grown([row.peak_bytes for row in points])


def _grown(values: list[int | None] | list[float | None]) -> float:
    """The last over the first; 1 of a single one."""
    return (values[-1] or 0.0) / values[0] if values and values[0] else 1.0


def _last(points: list[GrowthRow]) -> str:
    return f"{points[-1].value:,}" if points else "none"
