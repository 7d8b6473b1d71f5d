"""A run in Markdown: the tables that it prints, and the section of the benchmarks' README."""

from __future__ import annotations

from reference_models.markdown import markdown_table

from ..output import brief, median_and_quartiles
from .goals import goals_table
from .rows import OUR_BACKENDS, LayerRow, timed_rows
from .step import PASSES

# Within this factor two medians are a draw.
_EQUAL = 1.02


def shape_table(rows: list[LayerRow]) -> str:
    """Every provider of one shape with all numbers; those that were not timed say why."""
    header = [
        "provider", "pass", "ms (quartiles)", "× loop", "TFLOP/s", "GB/s", "of roofline",
        "peak MiB", "stored for backward, T·d", "note",
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
                median_and_quartiles(row.median_ms, row.low_ms, row.high_ms),
                _show(row.ratio_to_loop, ".2f"),
                _show(row.tflops, ".3g"),
                _show(row.gbytes_per_s, ".3g"),
                _show(row.roofline_share, ".0%"),
                "—" if row.peak_bytes is None else brief(row.peak_bytes / 2**20),
                _show(row.held_td, ".2f"),
                row.note,
            ]
        )
    return markdown_table(header, lines)


def section(rows: list[LayerRow], stem: str) -> str:
    """Machine, table of all shapes, goals, and where this layer is slower than another.

    ``stem``: the name of the run's files in ``results``, without what follows the dot.
    """
    row = rows[0]
    timed = next((r for r in rows if r.roofline_tflops is not None), row)
    measured = (
        ""
        if timed.roofline_tflops is None
        else f"; limits of the machine: {1e3 * timed.roofline_tflops:.0f} GFLOP/s, "
        f"{timed.roofline_gbytes_per_s:.0f} GB/s"
    )
    conditions = (
        f"{row.cpu_warning()}{row.hardware()}; {row.dtype}, {row.software()}, "
        f"{_rounds(rows)} rounds, load of the machine before the run {row.load}{measured}."
    )
    parts = [conditions, results_table(rows), goals_table(rows), losses(rows)]
    parts.append(f"All numbers: [`results/{stem}.csv`](results/{stem}.csv).")
    parts.append(f"![time and memory against tokens](results/{stem}.png)")
    return "\n\n".join(part for part in parts if part)


def results_table(rows: list[LayerRow]) -> str:
    """A line for each shape, a column for each provider: ms of all ``PASSES``, peak MiB."""
    timed = timed_rows(rows)
    providers = list(dict.fromkeys(provider for _, provider, _ in timed))
    shapes = {row.shape: f"{row.shape}: {row.batch}×{row.tokens}×{row.dim}" for row in rows}
    lines = []
    for shape, title in shapes.items():
        cells = [title]
        for provider in providers:
            cells.append(_cell([timed.get((shape, provider, which)) for which in PASSES]))
        lines.append(cells)
    return markdown_table(["shape", *providers], lines)


def losses(rows: list[LayerRow]) -> str:
    """Each shape and pass in which any other provider is faster."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for (shape, provider, which), row in timed_rows(rows).items():
        if row.median_ms and not which.startswith("router"):
            times.setdefault((shape, which), {})[provider] = row.median_ms
    lines = []
    for (shape, which), ms in times.items():
        ours = min((ms[name] for name in OUR_BACKENDS if name in ms), default=0.0)
        factors = {name: ours / theirs for name, theirs in ms.items() if _EQUAL * theirs < ours}
        if factors:
            names = sorted(factors, key=lambda name: -factors[name])
            words = ", ".join(f"{name} {factors[name]:.2f}×" for name in names)
            lines.append(f"- {shape}, {which}: {words}")
    if not lines:
        return "Where this layer is slower: nowhere in this run."
    title = (
        "Where this layer is slower. A factor says how many times faster the other one is; "
        "differences within 2 % are not listed:"
    )
    return "\n".join([title, "", *lines])


def _rounds(rows: list[LayerRow]) -> str:
    """The fewest and the most rounds of any shape."""
    found = sorted({row.rounds for row in rows if row.rounds is not None})
    return " to ".join(map(str, dict.fromkeys([*found[:1], *found[-1:]])))


def _cell(passes: list[LayerRow | None]) -> str:
    """The cell of one provider and shape; a file of an older run may lack a pass."""
    times = ["—" if row is None else brief(row.median_ms or 0.0) for row in passes]
    both = passes[PASSES.index("forward+backward")]
    if both is None or both.peak_bytes is None:
        return "—"
    return f"{' / '.join(times)} ms, {brief(both.peak_bytes / 2**20)} MiB"


def _show(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
