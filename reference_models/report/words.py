"""Says in sentences whether groups differ by more than chance, for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..metrics.scores import Comparison, RegionScores, Summary

LIKELY = 0.05  # a p-value above it is what chance shows often enough
LEAST_SHOWN = 0.0005  # less is printed as 0.000
# The numbers of `metrics.simulation` are on that page.
LIMITS = (
    "They can be too narrow where there are as many as twenty groups, where the scores of one "
    "group vary much more than the others', or where some cases are missed altogether and a small "
    "group stands beside larger ones. How often they hold the truth in simulations stands in the "
    "documentation, on the page “When is a gap more than chance?” (docs/explanation/gaps.md)."
)


def gap_by_chance(scores: RegionScores, summary: Summary) -> str:
    """Says what gap groups served alike would show, and how the measured gap compares with it.

    Args:
        scores: of one region by one attribute.
        summary: the evaluation, which knows its number of gaps and of shuffles.

    Returns:
        Sentences; none where there are no two groups to compare.
    """
    gap = scores.compared.get("gap")
    if gap is None:
        known = [group for group in scores.groups if group.n and group.value != "unknown"]
        if len(known) < 2 or max(group.n_subjects for group in known) > 1:
            return ""
        return "Every group has a single subject, so the groups cannot be compared."
    chance, p, corrected = gap.chance, gap.p_value, gap.corrected
    sentences = [
        f"Groups served exactly alike would show a gap of about {chance.value:.3f} by chance "
        f"({chance.low:.3f} to {chance.high:.3f}). Groups as far apart as here, measured by how "
        "much their scores vary, would then have a probability "
        f"{'below 0.001' if p < 0.001 else f'of {p:.3f}'}."
    ]
    if corrected.value is None:
        sentences.append("There is no interval, because a group has a single subject.")
    else:
        sentences.append(
            f"Allowing for chance, the gap is about {corrected.value:.3f} "
            f"({corrected.low:.3f} to {corrected.high:.3f})."
        )
    return " ".join([*sentences, _conclusion(gap, gaps_compared(summary), summary.resamples)])


def _conclusion(gap: Comparison, tests: int, shuffles: int) -> str:
    """Says what to conclude from the largest gap of several tests."""
    p, low = gap.p_value, gap.corrected.low
    lowest = 1 / (shuffles + 1)  # p of what no shuffle reaches
    if p < 1.5 * lowest and lowest > LIKELY / tests:
        among = "" if tests == 1 else f" of one gap among {tests}"
        return (
            f"No shuffle showed such a gap, but {shuffles} shuffles are too few to tell whether it "
            f"is chance{among}. Set --resamples to at least {math.ceil(tests / LIKELY)}."
        )
    if p > LIKELY:
        return "So these cases do not show that any group is served worse."
    if p > LIKELY / tests:
        return (
            "That would be unlikely for a single gap, but it is not for the largest of "
            f"{tests} gaps."
        )
    if low is not None and low < LEAST_SHOWN:
        return "The gap may still be chance, because the interval reaches down to no gap."
    return "So chance alone hardly explains the gap."


def gaps_compared(summary: Summary) -> int:
    """Counts the gaps that are compared with chance: one for each region and attribute."""
    return sum(
        bool(region.compared)
        for regions in summary.conditions[0].scores.values()
        for region in regions
    )


def comparisons_made(summary: Summary) -> str:
    """Says how many comparisons were made; an empty text where there was none.

    Example:
        >>> from types import SimpleNamespace
        >>> regions = [SimpleNamespace(compared={"gap": 1})] * 2
        >>> given = SimpleNamespace(scores={"site": regions})
        >>> made = SimpleNamespace(comparisons={"site": 6}, conditions=[given])
        >>> comparisons_made(made)
        'This evaluation compares 6 group means by site (the number of groups times the number of
        regions) in 2 gaps. Of 20 gaps between groups that are served alike, about one has a
        probability of 0.05 or less.'
    """
    tests = gaps_compared(summary)
    if not tests:
        return ""
    means = ", ".join(
        f"{count} group means by {name}" for name, count in summary.comparisons.items()
    )
    return (
        f"This evaluation compares {means} (the number of groups times the number of regions) in "
        f"{tests} gap{'s' if tests > 1 else ''}. Of 20 gaps between groups that are served alike, "
        "about one has a probability of 0.05 or less."
    )


def without_truth(scores: RegionScores) -> str:
    """Says in which groups no case has the region; an empty text if there is no such group.

    Example:
        >>> from types import SimpleNamespace as Group
        >>> groups = [Group(value="A", n=3, empty_truth=3), Group(value="B", n=4, empty_truth=1)]
        >>> without_truth(Group(groups=groups))
        'the truth is empty in every case of A. There Dice says only whether the prediction is
        empty, too: it is 1 for a case where it is, and 0 where it is not.'
    """
    groups = [group for group in scores.groups if group.n]
    empty = [group.value for group in groups if group.empty_truth == group.n]
    if not empty:
        return ""
    those = "" if len(empty) == len(groups) else f" of {' and of '.join(empty)}"
    return (
        f"the truth is empty in every case{those}. There Dice says only whether the prediction is "
        "empty, too: it is 1 for a case where it is, and 0 where it is not."
    )


def findings(summary: Summary) -> Iterator[str]:
    """Yields a line about each gap of an evaluation, for a terminal."""
    for attribute, regions in summary.conditions[0].scores.items():
        for scores in regions:
            where = f'For the region "{scores.region}", by {attribute},'
            if said := gap_by_chance(scores, summary):
                yield (
                    f"{where} the gap between the highest and the lowest mean Dice of a group is "
                    f"{scores.gap.value:.3f}. {said}"
                )
            if said := without_truth(scores):
                yield f"{where} {said}"
    if said := comparisons_made(summary):
        yield said
