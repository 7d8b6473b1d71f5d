"""A row for each patch and network, and tables of the rows in Markdown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from reference_models.markdown import markdown_table

from ..machine import RunFacts
from ..measure import Spread
from ..output import median_and_quartiles
from .steps import Patch


@dataclass(frozen=True)
class VolumeRow(RunFacts):
    """A line of the CSV; what a row does not have is None, and empty in the file.

    ``status`` is "measured", or says why there are no figures. ``peak_bytes``: the most that was
    allocated during the step beyond network, images and labels, gradients included; on a CPU
    without what its libraries take unseen. ``held_bytes``: between forward and backward.
    ``peak_ratio``, ``time_ratio``: to the network without experts. Times are medians of whole steps
    (forward, cross-entropy, backward; no optimizer) with their quartiles.
    """

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


def unmeasured_row(facts: RunFacts, patch: Patch, network: str, status: str) -> VolumeRow:
    """Without figures; ``status`` says why."""
    return VolumeRow(
        **asdict(facts),
        batch=patch.batch,
        patch="x".join(map(str, patch.sides)),
        voxels=patch.voxels,
        network=network,
        status=status,
    )


def with_time(row: VolumeRow, spread: Spread) -> VolumeRow:
    """The row with the time of its step."""
    return replace(
        row,
        rounds=spread.rounds,
        median_ms=1e3 * spread.median,
        low_ms=1e3 * spread.low,
        high_ms=1e3 * spread.high,
    )


def with_ratios(row: VolumeRow, dense: VolumeRow) -> VolumeRow:
    """The row beside that of the network without experts; only what both have is compared."""
    return replace(
        row,
        peak_ratio=_ratio(row.peak_bytes, dense.peak_bytes),
        time_ratio=_ratio(row.median_ms, dense.median_ms),
    )


def table(rows: list[VolumeRow]) -> str:
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
            time = median_and_quartiles(row.median_ms, row.low_ms, row.high_ms)
        lines.append([*cells, peak, _show(row.peak_ratio), held, time, _show(row.time_ratio)])
    header = ["patch", "network", "peak", "× dense", "between forward and backward"]
    return markdown_table([*header, "ms (quartiles)", "× dense"], lines)


def section(rows: list[VolumeRow]) -> str:
    """What the README shows of a run: the machine, and a table for each dtype."""
    row = rows[0]
    parts = [
        f"{row.cpu_warning()}{row.hardware()}; {row.software()}, load of the machine before the "
        f"run {row.load}."
    ]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        parts += [f"{dtype}:", table([row for row in rows if row.dtype == dtype])]
    name = f"results/volumes-{row.device}.csv"
    return "\n\n".join([*parts, f"All numbers: [`{name}`]({name})."])


def _ratio(of: float | None, to: float | None) -> float | None:
    return None if of is None or to is None else of / to


def _show(ratio: float | None) -> str:
    return "—" if ratio is None else f"{ratio:.2f}"
