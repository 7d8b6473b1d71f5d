"""Computes what the report's charts draw: places of dots, bars and intervals, and colours.

They are paths for SVG in the page, and no figures of matplotlib, whose SVG was tried: it takes no
variable of the page's style as a colour, so that it cannot follow the page into dark mode, and
takes ten times the bytes (33 kB for 120 dots).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics.scores import CaseScore, Condition, Estimate, RegionScores

# More dots than this lie on top of each other, and each costs the page 13 bytes: bars instead.
MOST_DOTS = 200
BARS = 60  # from the axis' left end to its right end


@dataclass(frozen=True)
class Chart:
    """Says where things lie on an axis of Dice from `low` to 1.

    The axis is 1000 wide, and each group's row is 46 high.

    Args:
        low: the Dice at the axis' left end.
        ticks: the place and the Dice of each tick.
        dots: for each group of at most `MOST_DOTS` cases, a path with a dot for each case.
        bars: for each larger group, a path with a bar for each interval of Dice that has a case.
        places: for each group, the places of its mean and of the ends of its interval; None where
            one is not defined.
    """

    low: float
    ticks: list[tuple[float, float]]
    dots: Mapping[str, str]
    bars: Mapping[str, str]
    places: Mapping[str, tuple[float | None, ...]]


def chart(cases: Sequence[CaseScore], attribute: str, scores: RegionScores) -> Chart:
    """Places every case's Dice and every group's mean and interval, for one region."""
    dice: dict[str, list[float]] = {group.value: [] for group in scores.groups}
    for case in cases:
        if case.region == scores.region:
            dice.setdefault(case.attributes[attribute], []).append(case.dice)
    intervals = [group.metrics["dice"].low for group in scores.groups]
    ends = [low for low in intervals if low is not None]
    lowest = min((*ends, *itertools.chain(*dice.values())), default=0.0)
    step = 0.1 if lowest >= 0.5 else 0.2
    low = min(step * math.floor(lowest / step + 1e-9), 0.8)

    def place(value: float) -> float:
        return round(1000 * (value - low) / (1 - low), 1)

    def places(estimate: Estimate) -> tuple[float | None, ...]:
        numbers = (estimate.value, estimate.low, estimate.high)
        return tuple(None if number is None else place(number) for number in numbers)

    ticks = [low + step * i for i in range(round((1 - low) / step) + 1)]
    return Chart(
        low,
        [(place(tick), tick) for tick in ticks],
        {v: _dots(map(place, d)) for v, d in dice.items() if len(d) <= MOST_DOTS},
        {v: _bars(map(place, d)) for v, d in dice.items() if len(d) > MOST_DOTS},
        {group.value: places(group.metrics["dice"]) for group in scores.groups},
    )


def _dots(places: Iterable[float]) -> str:
    """Draws a path of dots, each a line of no length."""
    # Neighbours are set apart by the golden ratio: the same heights in every run.
    return "".join(
        f"M{place:g} {4 + 22 * (rank * 0.618034 % 1):.1f}h0"
        for rank, place in enumerate(sorted(places))
    )


def _bars(places: Iterable[float]) -> str:
    """Draws a path of the histogram's bars that have a case."""
    counts, edges = np.histogram(list(places), BARS, (0, 1000))
    # A bar is never so low that a single case cannot be seen.
    tops = 29 - np.maximum(26 * counts / counts.max(), 1.5)
    return "".join(
        f"M{left:.1f} 29V{top:.1f}H{right:.1f}V29"
        for left, right, top, count in zip(edges, edges[1:], tops, counts, strict=False)
        if count
    )


def heat(condition: Condition, attribute: str) -> list[list[tuple[float, str]]]:
    """Colours the shares of tokens, a row a value, from white to a blue that black is legible on.

    Returns:
        For each value of the attribute and each expert, the share and its colour in CSS.
    """
    load = condition.load.get(attribute, ())
    peak = max((share for row in load for share in row), default=0) or 1
    blue = np.array((38, 135, 190))
    return [
        [
            (share, "rgb({:.0f},{:.0f},{:.0f})".format(*(255 - (255 - blue) * share / peak)))
            for share in row
        ]
        for row in load
    ]
