"""Says in words what the demo's scores show, whichever method is ahead."""

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
    """Holds what a run of the demo shows: a title for the picture, and some sentences."""

    title: str
    sentences: str


def judge(summaries: Mapping[str, Summary]) -> Verdict:
    """Compares the methods by ES-Dice.

    Args:
        summaries: the summary of each method. Methods that receive the attribute were evaluated
            with shuffled attributes as well.
    """
    score = {name: dice_of(region_of(summary))["ES-Dice"] for name, summary in summaries.items()}
    shuffled = {name: dice_of(region_of(summaries[name], "shuffled"))["ES-Dice"] for name in TOLD}
    blind = max(score[name] for name in BLIND)
    pays = min(score[name] for name in TOLD) > blind + CLEAR
    pays = pays and max(shuffled.values()) < blind
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in score.items())
    wrong = ", ".join(f"{name} {value:.3f}" for name, value in shuffled.items())
    sentences = [f"ES-Dice is as follows: {numbers}. With shuffled attributes it is: {wrong}."]
    if not pays:
        sentences.append(
            "So this run shows no clear gain from the attribute. It may need more epochs."
        )
        return Verdict(
            "Three sites outline the same scans, each by another rule. After this short training, "
            "not every network that receives the site follows its rule",
            " ".join(sentences),
        )
    sentences.append(
        "So it helps to give a network the attribute, where the right outline depends on it and "
        "the image does not show it. Experts without the attribute are not enough, and a wrong "
        "attribute undoes the gain."
    )
    ahead = score["dMoE"] - score["FiLM"]
    sentences.append(
        "FiLM, which scales and shifts features by the attribute, and dMoE are level. Try FiLM "
        "first, because it is simpler and faster."
        if abs(ahead) <= CLEAR
        else f"{'dMoE' if ahead > 0 else 'FiLM'} is ahead of the other by {abs(ahead):.3f}."
    )
    return Verdict(
        "Three sites outline the same scans, each by another rule. A network that receives the "
        "site follows that site's rule. A network that does not receive it draws the most frequent "
        "site's outline for all",
        " ".join(sentences),
    )
