"""The page on unknown attributes: what each way to predict scores, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence

from ...markdown import markdown_table
from ..methods import METHODS
from ..scenes import SCENES
from ..sites.page import difference, of_seeds
from .plan import METHODS_TRIED, SCENES_TRIED, SEEDS
from .trials import BLIND, GUESS, POLICY, RIGHT, SHARES, WEIGHED, UnknownScore

WORDS = {
    RIGHT: "told the truth",
    POLICY: "told that it is unknown (today)",
    SHARES: "outputs averaged by the training shares",
    WEIGHED: "outputs averaged by the classifier's probabilities",
    GUESS: "told the classifier's guess",
    BLIND: "blind network",
}


def text_of(rows: Sequence[UnknownScore]) -> str:
    """The page."""
    parts = [
        "# Unknown at test time",
        "Written by `python -m reference_models.study.unknown`, which runs what is not run yet.",
        "The study's networks, its data and its number of steps, on seeds that nothing was chosen "
        f"on ({SEEDS[0]} to {SEEDS[-1]}), at the learning rates that the study chose on seed 10. "
        "No test case's attribute is known to the network. The classifier, three convolutional "
        "layers, is trained on the training cases to tell the attribute from the image. A cell has "
        "the mean (lowest … highest; number of seeds). ES-Dice and the worst group are over groups "
        "of equal size; overall is weighted by the training shares. Against: the mean difference, "
        "paired by seed, and Student's 95 % interval.",
    ]
    for scene in SCENES_TRIED:
        parts.append(f"## {SCENES[scene].title}")
        seeds = [
            {row.seed for row in rows if (row.scene, row.method) == (scene, method)}
            for method in METHODS_TRIED
        ]
        complete = len({*SEEDS}.intersection(*seeds))
        unsettled = "" if complete == len(SEEDS) else ": nothing is settled"
        parts.append(f"**{complete} of {len(SEEDS)} seeds have all methods{unsettled}.**")
        lines = [line for method in METHODS_TRIED for line in _lines(rows, scene, method)]
        header = ["", "", "passes", "ES-Dice", "against today's policy", "against blind"]
        header += ["overall", "against today's policy", "worst group"]
        parts.append(markdown_table(header, lines) if lines else "not run.")
        right = [row.guessed for row in rows if (row.scene, row.way) == (scene, RIGHT)]
        if right:
            share = sum(right) / len(right)
            parts.append(f"The classifier guesses {100 * share:.0f} % of the test cases right.")
    return "\n\n".join(parts) + "\n"


def _lines(rows: Sequence[UnknownScore], scene: str, method: str) -> list[list[str]]:
    """A method's lines in a scene's table."""

    def found(of: str, way: str) -> dict[int, UnknownScore]:
        return {r.seed: r for r in rows if (r.scene, r.method, r.way) == (scene, of, way)}

    def minus(a: dict[int, UnknownScore], b: dict[int, UnknownScore], metric: str) -> str:
        both = sorted(a.keys() & b.keys())
        return difference([getattr(a[seed], metric) - getattr(b[seed], metric) for seed in both])

    lines = []
    policy, blind = found(method, POLICY), found("wide", BLIND)
    for way, words in WORDS.items():
        if not (own := found(method, way)):
            continue
        itself = way in (POLICY, BLIND)
        lines.append(
            [
                METHODS[method].title,
                words,
                f"{next(iter(own.values())).passes}",
                of_seeds([row.es_dice for row in own.values()]),
                "" if itself else minus(own, policy, "es_dice"),
                "" if way == BLIND else minus(own, blind, "es_dice"),
                of_seeds([row.overall for row in own.values()]),
                "" if itself else minus(own, policy, "overall"),
                of_seeds([row.worst for row in own.values()]),
            ]
        )
    return lines
