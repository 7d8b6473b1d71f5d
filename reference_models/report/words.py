"""Puts into sentences whether groups differ by more than chance, for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..metrics.scores import Comparison, RegionScores, Summary

LIKELY = 0.05  # a p-value above it is what chance shows often enough
LEAST_SHOWN = 0.0005  # less is printed as 0.000
# What `metrics.simulation` has found; its table is in docs/explanation/gaps.md.
COVERAGE = (
    "In simulations of two to ten groups of 10 to 1,500 cases whose scores vary alike, with means "
    "alike or one of them lower by up to 0.08, they held the truth in at least 93 of 100 samples; "
    "with twenty groups of 30 in at least 87; where one case in twenty is missed altogether, and a "
    "group of 10 stands beside larger ones, in at least 88; and where the scores of one group vary "
    "2.5 times as much as the others', in at least 86. There a gap between groups of equal means "
    "had a probability of 0.05 or less in up to 12 of 100 samples, elsewhere in up to 8."
)


def gap_by_chance(scores: RegionScores, summary: Summary) -> str:
    """Says what groups served alike would have for a gap, and what that makes of the one measured.

    Args:
        scores: of one region by one attribute.
        summary: what they are of, for how many gaps it has and how often it shuffled.

    Returns:
        Sentences; none where there are no two groups to compare.
    """
    gap = scores.compared.get("gap")
    if gap is None:
        known = [group for group in scores.groups if group.n and group.value != "unknown"]
        if len(known) < 2 or max(group.n_subjects for group in known) > 1:
            return ""
        return "Every group has a single subject, so they cannot be compared."
    chance, p, corrected = gap.chance, gap.p_value, gap.corrected
    sentences = [
        f"Groups served exactly alike would show a gap of about {chance.value:.3f} by chance "
        f"({chance.low:.3f} to {chance.high:.3f}), and groups as far apart as here, for how much "
        f"their scores vary, with probability {'below 0.001' if p < 0.001 else f'{p:.3f}'}."
    ]
    if corrected.value is None:
        sentences.append("A group of a single subject leaves no interval.")
    else:
        sentences.append(
            f"Allowing for chance, the gap is about {corrected.value:.3f} "
            f"({corrected.low:.3f} to {corrected.high:.3f})."
        )
    return " ".join([*sentences, _conclusion(gap, gaps_compared(summary), summary.resamples)])


def _conclusion(gap: Comparison, tests: int, shuffles: int) -> str:
    """Says what the largest gap of several tests comes to."""
    p, low = gap.p_value, gap.corrected.low
    lowest = 1 / (shuffles + 1)  # p of what no shuffle reaches
    if p < 1.5 * lowest and lowest > LIKELY / tests:
        among = "" if tests == 1 else f" of one gap among {tests}"
        return (
            f"No shuffle came to that, but {shuffles} are too few to tell whether it is chance"
            f"{among}: set --resamples to at least {math.ceil(tests / LIKELY)}."
        )
    if p > LIKELY:
        return "So these cases do not show that any group is served worse."
    if p > LIKELY / tests:
        return f"That would be unlikely for a single gap, but is not for the largest of {tests}."
    if low is not None and low < LEAST_SHOWN:
        return "It may be chance all the same, since the interval reaches down to no gap."
    return "So chance alone hardly explains it."


def gaps_compared(summary: Summary) -> int:
    """How many gaps an evaluation holds against chance: one a region and attribute."""
    return sum(
        bool(region.compared)
        for regions in summary.conditions[0].scores.values()
        for region in regions
    )


def comparisons_made(summary: Summary) -> str:
    """Says how many comparisons were made; nothing where there was none.

    Example:
        >>> from types import SimpleNamespace
        >>> regions = [SimpleNamespace(compared={"gap": 1})] * 2
        >>> given = SimpleNamespace(scores={"site": regions})
        >>> made = SimpleNamespace(comparisons={"site": 6}, conditions=[given])
        >>> comparisons_made(made)
        '6 group means by site (groups times regions) were compared, in 2 gaps. Of 20 gaps between
        groups served alike, about one has a probability of 0.05 or less.'
    """
    tests = gaps_compared(summary)
    if not tests:
        return ""
    means = ", ".join(
        f"{count} group means by {name}" for name, count in summary.comparisons.items()
    )
    return (
        f"{means} (groups times regions) were compared, in {tests} gap{'s' if tests > 1 else ''}. "
        "Of 20 gaps between groups served alike, about one has a probability of 0.05 or less."
    )


def findings(summary: Summary) -> Iterator[str]:
    """Gives the gaps of an evaluation line by line, for a terminal."""
    for attribute, regions in summary.conditions[0].scores.items():
        for scores in regions:
            if said := gap_by_chance(scores, summary):
                yield f"{scores.region} by {attribute}: the gap is {scores.gap.value:.3f}. {said}"
    if said := comparisons_made(summary):
        yield said
