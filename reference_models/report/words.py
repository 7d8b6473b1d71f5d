"""Puts into sentences whether groups differ by more than chance, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ..metrics.scores import RegionScores, Summary

LIKELY = 0.05  # a p-value above it is what chance shows often enough
# What `metrics.simulation` has found; its table is in reference_models/README.md.
COVERAGE = (
    "In simulations of two to ten groups of 10 to 1,500 cases, alike or one of them lower by up to "
    "0.08, they held the truth in at least 93 of 100 samples; with twenty groups of 30 in at least "
    "87; and where one case in twenty is missed altogether, and a group of 10 stands beside larger "
    "ones, in at least 88."
)


def gap_by_chance(scores: RegionScores, tests: int) -> str:
    """Says what groups served alike would have for a gap, and what that makes of the one measured.

    Args:
        scores: of one region by one attribute.
        tests: how many such gaps are looked at together.

    Returns:
        Sentences; none where there are no two groups to compare.
    """
    gap = scores.compared.get("gap")
    if gap is None:
        return ""
    chance, p = gap.chance, gap.p_value
    sentences = [
        f"Groups served exactly alike would show a gap of about {chance.value:.3f} by chance "
        f"({chance.low:.3f} to {chance.high:.3f}), and one as large as here with probability "
        f"{'below 0.001' if p < 0.001 else f'{p:.3f}'}."
    ]
    if p > LIKELY:
        sentences.append("So these cases do not show that any group is served worse.")
    elif p > LIKELY / tests:
        sentences.append(
            f"That would be unlikely for a single gap, but is not for the largest of {tests}."
        )
    else:
        sentences.append("So chance alone hardly explains it.")
    corrected = gap.corrected
    if corrected.value is None:
        sentences.append("A group of a single subject leaves no interval.")
    else:
        sentences.append(
            f"Allowing for chance, the gap is about {corrected.value:.3f} "
            f"({corrected.low:.3f} to {corrected.high:.3f})."
        )
    return " ".join(sentences)


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
        'Compared were 6 group means by site (groups times regions), in 2 gaps. Of 20 gaps between
        groups served alike, about one has a probability of 0.05 or less.'
    """
    tests = gaps_compared(summary)
    if not tests:
        return ""
    means = ", ".join(
        f"{count} group means by {name}" for name, count in summary.comparisons.items()
    )
    return (
        f"Compared were {means} (groups times regions), in {tests} gap{'s' if tests > 1 else ''}. "
        "Of 20 gaps between groups served alike, about one has a probability of 0.05 or less."
    )


def findings(summary: Summary) -> Iterator[str]:
    """Gives the gaps of an evaluation line by line, for a terminal."""
    for attribute, regions in summary.conditions[0].scores.items():
        for scores in regions:
            if said := gap_by_chance(scores, gaps_compared(summary)):
                yield f"{scores.region} by {attribute}: the gap is {scores.gap.value:.3f}. {said}"
    if said := comparisons_made(summary):
        yield said
