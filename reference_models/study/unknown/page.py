"""The page on unknown attributes: the scores and the costs of each method of prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...files import write_whole
from ...markdown import markdown_table
from ..methods import METHODS
from ..quote import EXPLAINED
from ..scenes import SCENES
from ..sites.page import difference, of_seeds
from ..statistics import student_interval
from .plan import METHODS_TRIED, SCENES_TRIED, SEEDS
from .trials import BLIND, GUESS, POLICY, RIGHT, SHARES, UNKNOWN_SCORES, WEIGHED, UnknownScore

PAGE = "README.md"
WORDS = {
    RIGHT: "attribute known",
    POLICY: "attribute unknown, the layer's policy",
    SHARES: "outputs averaged by the training shares",
    WEIGHED: "outputs averaged by the classifier's probabilities",
    GUESS: "the classifier's best guess",
    BLIND: "blind network",
}
_ALTERNATIVES = (SHARES, WEIGHED, GUESS)
_RECEIVING = tuple(method for method in METHODS_TRIED if METHODS[method].settings.told)


def write_page(results: Path) -> None:
    """Writes the page beside the csv.

    Raises:
        DataError: the csv is missing, or holds something else.
    """
    page = text_of(UNKNOWN_SCORES.read(results))
    write_whole(results / PAGE, lambda target: target.write_text(page, encoding="utf-8"))


def text_of(rows: Sequence[UnknownScore]) -> str:
    """The page."""
    parts = [
        "# When the attribute is unknown in testing",
        "The command `python -m reference_models.study.unknown` writes this page and runs the jobs "
        f"that are left. {EXPLAINED} says what they mean.",
        "Networks, data and steps are those of the study. Nothing was chosen on the seeds "
        f"({SEEDS[0]} to {SEEDS[-1]}), and the learning rates are those that the study chose on "
        "seed 10. Except in the first line of a network, the network does not know the attribute "
        "of any test case. The classifier has three convolutional layers and learns on the "
        "training cases to predict the attribute from the image.",
        "A cell has the **mean** (lowest … highest seed; number of seeds). Overall Dice "
        "is weighted by the training shares, and so is the Dice in ES-Dice. The columns named "
        "minus have the mean difference, paired by seed, with Student's 95 % interval and the "
        "number of seeds on which the method is ahead. Passes are forward passes for each image.",
        verdict(rows),
    ]
    for scene in SCENES_TRIED:
        parts.append(f"## {SCENES[scene].title}")
        seeds = [
            {row.seed for row in rows if (row.scene, row.method) == (scene, method)}
            for method in METHODS_TRIED
        ]
        complete = len({*SEEDS}.intersection(*seeds))
        undecided = "" if complete == len(SEEDS) else ": nothing is decided yet"
        parts.append(f"**{complete} of {len(SEEDS)} seeds have all methods{undecided}.**")
        lines = [line for method in METHODS_TRIED for line in _lines(rows, scene, method)]
        header = ["network", "method", "passes", "ES-Dice", "minus the layer's policy"]
        header += ["minus blind", "overall Dice", "minus the layer's policy", "worst group's Dice"]
        parts.append(markdown_table(header, lines) if lines else "not run.")
        right = [row.guessed for row in rows if (row.scene, row.way) == (scene, RIGHT)]
        if right:
            share = sum(right) / len(right)
            parts.append(f"The classifier is right for {100 * share:.0f} % of the test cases.")
    return "\n\n".join(parts) + "\n"


def verdict(rows: Sequence[UnknownScore]) -> str:
    """Which methods have a higher ES-Dice than the layer's policy in all scenes."""
    found = {(r.scene, r.method, r.way, r.seed): r.es_dice for r in rows}
    ahead = []
    for method in _RECEIVING:
        for way in _ALTERNATIVES:
            lows = []
            for scene in SCENES_TRIED:
                pairs = [[found.get((scene, method, w, s)) for w in (way, POLICY)] for s in SEEDS]
                if any(None in pair for pair in pairs):
                    return "**Not all seeds of the plan have been run, so nothing is decided yet.**"
                limits = student_interval([a - b for a, b in pairs])  # type: ignore[operator]
                lows.append(limits[0] if limits else 0.0)
            if min(lows) > 0:
                ahead.append(f"{METHODS[method].title} with {WORDS[way]}")
    if not ahead:
        return "**No method has a clearly higher ES-Dice than the layer's policy in all scenes.**"
    return f"**Clearly above the layer's policy in all scenes by ES-Dice: {', '.join(ahead)}.**"


def _lines(rows: Sequence[UnknownScore], scene: str, method: str) -> list[list[str]]:
    """The lines of a network in the table of a scene."""

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
