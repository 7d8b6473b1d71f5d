"""Says in words what the demo's scores come to, whichever way they fell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..metrics.scores import Summary
from .scores import dice_of, region_of

# A difference in ES-Dice that is more than what seeds alone make of it: results/ has several.
CLEAR = 0.05
BLIND, TOLD = ("dense", "plain MoE"), ("FiLM", "dMoE")


@dataclass(frozen=True)
class Verdict:
    """What a run shows: a title for its picture, and some sentences."""

    title: str
    sentences: str


def judge(summaries: Mapping[str, Summary]) -> Verdict:
    """Compares the methods by ES-Dice.

    Args:
        summaries: of every method; of those that are told the attribute, with it shuffled too.
    """
    score = {name: dice_of(region_of(summary))["ES-Dice"] for name, summary in summaries.items()}
    shuffled = {name: dice_of(region_of(summaries[name], "shuffled"))["ES-Dice"] for name in TOLD}
    blind = max(score[name] for name in BLIND)
    pays = min(score[name] for name in TOLD) > blind + CLEAR
    pays = pays and max(shuffled.values()) < blind
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in score.items())
    wrong = ", ".join(f"{name} {value:.3f}" for name, value in shuffled.items())
    sentences = [f"ES-Dice: {numbers}; told shuffled attributes: {wrong}."]
    if not pays:
        sentences.append(
            "So this run shows no clear gain from the attribute; it may need more epochs."
        )
        return Verdict(
            "Three sites outline the same scans, each by a rule of its own: after this little "
            "training, not every network that is told the site follows it",
            " ".join(sentences),
        )
    sentences.append(
        "So it pays to tell a network the attribute where the right outline depends on it and the "
        "image does not show it; experts without the attribute are not enough, and the wrong "
        "attribute undoes the gain."
    )
    ahead = score["dMoE"] - score["FiLM"]
    sentences.append(
        "FiLM and dMoE are level: try FiLM first, which is simpler and faster."
        if abs(ahead) <= CLEAR
        else f"{'dMoE' if ahead > 0 else 'FiLM'} is ahead of the other by {abs(ahead):.3f}."
    )
    return Verdict(
        "Three sites outline the same scans, each by a rule of its own. A network that is told the "
        "site follows that site's rule; a network that is not told it draws the most frequent "
        "site's outline for all",
        " ".join(sentences),
    )
