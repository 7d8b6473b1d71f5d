"""The results as they stand in this folder's README, between two marks a device."""

from __future__ import annotations

from pathlib import Path

from .goals import goals_table
from .shapes import CPU_SHAPES, GPU_SHAPES
from .table import Row, brief, markdown, write_whole

# Within this factor two medians are a draw.
_EQUAL = 1.02


def write_results(rows: list[Row], path: Path, stem: str) -> None:
    """Puts a run's section in the place of the last one of the same device."""
    replace_section(path, rows[0].device, section(rows, stem))


def replace_section(path: Path, name: str, content: str) -> None:
    """Puts text between the marks of that name."""
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    text = path.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"README: got none of {begin} … {end} in {path.name}, expected both.")
    new = f"{before}{begin}\n{content}\n{end}{after}"
    write_whole(path, new.encode())


def section(rows: list[Row], stem: str) -> str:
    """Machine, table of all shapes, goals, and where this layer is slower than another."""
    row = rows[0]
    only = "**CPU only: nothing here was measured on a GPU.** " if row.device == "cpu" else ""
    timed = next((r for r in rows if r.roofline_tflops is not None), row)
    measured = (
        ""
        if timed.roofline_tflops is None
        else f"; measured limits: {1e3 * timed.roofline_tflops:.0f} GFLOP/s, "
        f"{timed.roofline_gbytes_per_s:.0f} GB/s"
    )
    machine = (
        f"{only}{row.machine}; {row.dtype}, {row.threads} threads, PyTorch {row.torch}, "
        f"Python {row.python}, {row.date}, commit {row.commit[:12]}, "
        f"{timed.rounds} rounds, load before the run {row.load}{measured}."
    )
    parts = [machine, results_table(rows), goals_table(rows), losses(rows)]
    parts.append(f"All figures: [`results/{stem}.csv`](results/{stem}.csv).")
    parts.append(f"![time and memory against tokens](results/{stem}.png)")
    return "\n\n".join(part for part in parts if part)


def results_table(rows: list[Row]) -> str:
    """A line a shape, a column a provider: ms of forward / forward+backward, peak MiB."""
    timed = {(r.shape, r.provider, r.which): r for r in rows if r.median_ms is not None}
    providers = list(dict.fromkeys(provider for _, provider, _ in timed))
    lines = []
    for shape in dict.fromkeys(row.shape for row in rows):
        some = next(row for row in rows if row.shape == shape)
        cells = [f"{shape}: {some.batch}×{some.tokens}×{some.dim}"]
        for provider in providers:
            forward, both = (
                timed.get((shape, provider, which)) for which in ("forward", "forward+backward")
            )
            if forward is None or both is None or both.peak_bytes is None:
                cells.append("—")
                continue
            peak = both.peak_bytes / 2**20
            cells.append(f"{_short(forward)} / {_short(both)} ms, {brief(peak)} MiB")
        lines.append(cells)
    return markdown(["shape", *providers], lines)


def losses(rows: list[Row]) -> str:
    """Each shape and pass in which any other provider is faster."""
    lines = []
    timed = [r for r in rows if r.median_ms is not None and not r.which.startswith("router")]
    for shape, which in dict.fromkeys((row.shape, row.which) for row in timed):
        here = {
            r.provider: r.median_ms or 0.0 for r in timed if (r.shape, r.which) == (shape, which)
        }
        ours = [ms for name, ms in here.items() if name in ("eager", "triton")]
        if not ours:
            continue
        faster = {
            name: min(ours) / ms
            for name, ms in here.items()
            if name not in ("eager", "triton") and _EQUAL * ms < min(ours)
        }
        if faster:
            names = sorted(faster, key=lambda name: -faster[name])
            words = ", ".join(f"{name} {faster[name]:.2f}×" for name in names)
            lines.append(f"- {shape}, {which}: {words}")
    if not lines:
        return "Where we lose: nowhere in this run."
    title = "Where we lose (so many times faster than ours; within 2 % is a draw):"
    return "\n".join([title, "", *lines])


def is_whole(shapes: list[str], device: str) -> bool:
    """Whether these are all the shapes that the README's section shows."""
    groups = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    return {shape.name for group in groups.values() for shape in group} <= set(shapes)


def _short(row: Row) -> str:
    return brief(row.median_ms or 0.0)
