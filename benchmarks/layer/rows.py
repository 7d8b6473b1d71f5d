"""A row for each shape, provider and pass: its columns, and how its figures are worked out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import torch

from ..machine import RunFacts, version
from ..measure import Spread
from .provider import Provider
from .roofline import Roofline
from .shapes import Shape, flops, min_bytes
from .step import EVAL, StepMemory

# The providers that are this package's layer, the faster one first.
OUR_BACKENDS = ("triton", "eager")


@dataclass(frozen=True)
class LayerRow(RunFacts):
    """A line of the CSV; what a row does not have is None, and empty in the file.

    ``status`` is "timed", or begins with "wrong", "unavailable" or "failed" and says why; then
    there are no figures. ``relative_error`` is ``check.relative_error``. Times are medians over the
    rounds with their quartiles; ``tflops`` and ``gbytes_per_s`` are ``shapes.flops`` and
    ``shapes.min_bytes`` over the median; ``roofline_share`` is the least time on the measured
    roofline over the median (for the router its bytes alone count); ``ratio_to_loop`` is
    mask-loop's median over this one. Memory is that of ``step.StepMemory``; ``held_td`` and
    ``excess_td`` are in units of T·d elements.
    """

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


@dataclass(frozen=True)
class LayerRun:
    """What all shapes of a run share. If ``rounds`` is None, the runner chooses them by shape."""

    facts: RunFacts
    device: torch.device
    dtype: torch.dtype
    rounds: int | None
    roofline: Roofline


def untimed_row(run: LayerRun, shape: Shape, provider: Provider, status: str) -> LayerRow:
    """Without figures; ``status`` says why."""
    return LayerRow(
        **asdict(run.facts),
        shape=shape.name,
        batch=shape.batch,
        tokens=shape.tokens,
        dim=shape.dim,
        attribute_values=shape.values,
        provider=provider.name,
        version=version(provider.package),
        which="",
        status=status,
        note=provider.note,
    )


def timed_row(
    run: LayerRun,
    shape: Shape,
    provider: Provider,
    which: str,
    spread: Spread,
    *,
    loop: Spread | None,
    memory: StepMemory | None,
    error: float | None,
) -> LayerRow:
    """One pass of one provider.

    Args:
        loop: the time of mask-loop's same pass, where it was timed.
        memory: of training step and call in eval mode; None for the router alone.
        error: ``check.relative_error``; None for other maths.
    """
    row = replace(
        untimed_row(run, shape, provider, "timed"),
        which=which,
        relative_error=error,
        rounds=spread.rounds,
        median_ms=1e3 * spread.median,
        low_ms=1e3 * spread.low,
        high_ms=1e3 * spread.high,
        ratio_to_loop=loop.median / spread.median if loop else None,
        roofline_tflops=run.roofline.flops / 1e12,
        roofline_gbytes_per_s=run.roofline.bytes / 1e9,
    )
    element = run.dtype.itemsize
    if provider.exact or not provider.routes:  # else it has other maths, of which no formula is
        work = flops(shape, which, routes=provider.routes)
        moved = min_bytes(shape, which, element, routes=provider.routes)
        of_bytes = moved / run.roofline.bytes
        least = of_bytes if which.startswith("router") else run.roofline.seconds(work, moved)
        row = replace(
            row,
            tflops=work / spread.median / 1e12,
            gbytes_per_s=moved / spread.median / 1e9,
            roofline_share=least / spread.median,
        )
    if memory and which == "forward":
        row = replace(row, peak_bytes=memory.forward_peak)
    elif memory and which == EVAL:
        row = replace(row, peak_bytes=memory.eval_peak)
    elif memory:
        unit = shape.total_tokens * shape.dim * element
        row = replace(
            row,
            peak_bytes=memory.peak,
            held_td=memory.held / unit,
            excess_td=memory.excess / unit,
        )
    return row


def timed_rows(rows: Iterable[LayerRow]) -> dict[tuple[str, str, str], LayerRow]:
    """The rows that have a time, by shape, provider and pass."""
    return {(r.shape, r.provider, r.which): r for r in rows if r.median_ms is not None}
