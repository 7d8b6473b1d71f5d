"""A row for each point of an axis, provider and pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from ..layer.shapes import Shape, flops
from ..machine import RunFacts
from ..measure import Spread
from .axes import Axis

# What is shown: a training step, and a call in eval mode.
SHOWN = ("forward+backward", "eval")


@dataclass(frozen=True)
class GrowthRow(RunFacts):
    """A line of the CSV; what a row does not have is None, and empty in the file.

    ``value`` is that of ``axis``. ``status`` is "timed", or says why there are no figures.
    ``flops`` is ``shapes.flops``; times are medians over the rounds with their quartiles; the peak
    is that of ``step.StepMemory``.
    """

    axis: str
    value: int
    batch: int
    tokens: int
    dim: int
    attribute_values: int
    experts: int
    k: int
    provider: str
    which: str
    status: str
    flops: int | None = None
    rounds: int | None = None
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    peak_bytes: int | None = None


def untimed_row(
    facts: RunFacts, axis: Axis, value: int, shape: Shape, provider: str, status: str
) -> GrowthRow:
    """Without figures; ``status`` says why."""
    return GrowthRow(
        **asdict(facts),
        axis=axis.title,
        value=value,
        batch=shape.batch,
        tokens=shape.tokens,
        dim=shape.dim,
        attribute_values=shape.values,
        experts=shape.experts,
        k=shape.k,
        provider=provider,
        which="",
        status=status,
    )


def with_figures(
    row: GrowthRow, shape: Shape, which: str, spread: Spread, peak: int, *, routes: bool
) -> GrowthRow:
    """The row of one pass. ``routes``: the provider has a router, whose work counts."""
    return replace(
        row,
        which=which,
        status="timed",
        flops=flops(shape, which, routes=routes),
        rounds=spread.rounds,
        median_ms=1e3 * spread.median,
        low_ms=1e3 * spread.low,
        high_ms=1e3 * spread.high,
        peak_bytes=peak,
    )


# By axis, provider and pass: the rows in the order of their values.
Curves = dict[tuple[str, str, str], list[GrowthRow]]


def curves(rows: Iterable[GrowthRow]) -> Curves:
    """The rows that have numbers."""
    found: Curves = {}
    for row in sorted(rows, key=lambda row: row.value):
        if row.median_ms is not None and row.peak_bytes is not None:
            found.setdefault((row.axis, row.provider, row.which), []).append(row)
    return found
