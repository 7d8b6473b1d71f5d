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
        "No test case's attribute is known to the network. The classifier is a convolutional network "
        "of three layers, trained on the training cases to tell the attribute from the image. A "
        "cell has the mean ES-Dice (lowest … highest; number of seeds); against: the mean "
        "difference, paired by seed, and Student's 95 % interval.",
    ]
    for scene in SCENES_TRIED:
        parts.append(f"## {SCENES[scene].title}")
        lines = [line for method in METHODS_TRIED for line in _lines(rows, scene, method)]
        header = [
            "",
            "",
            "passes",
            "ES-Dice",
            "against today's policy",
            "against blind",
        ]
        parts.append(markdown_table(header, lines) if lines else "not run.")
        right = [row.guessed for row in rows if (row.scene, row.way) == (scene, RIGHT)]
        if right:
            share = sum(right) / len(right)
            parts.append(f"The classifier guesses {100 * share:.0f} % of the test cases right.")
    return "\n\n".join(parts) + "\n"


def _lines(rows: Sequence[UnknownScore], scene: str, method: str) -> list[list[str]]:
    """A method's lines in a scene's table."""

    def scores(of: str, way: str) -> dict[int, float]:
        return {
            row.seed: row.es_dice
            for row in rows
            if (row.scene, row.method, row.way) == (scene, of, way)
        }

    def minus(a: dict[int, float], b: dict[int, float]) -> str:
        return difference([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])

    lines = []
    policy, blind = scores(method, POLICY), scores("wide", BLIND)
    for way, words in WORDS.items():
        found = scores(method, way)
        passes = {row.passes for row in rows if (row.scene, row.way) == (scene, way)}
        if found:
            lines.append(
                [
                    METHODS[method].title,
                    words,
                    ", ".join(map(str, sorted(passes))),
                    of_seeds([*found.values()]),
                    "" if way in (POLICY, BLIND) else minus(found, policy),
                    "" if way == BLIND else minus(found, blind),
                ]
            )
    return lines
