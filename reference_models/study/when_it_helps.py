"""The figure of "Should I use this?": four networks in every scene of the studies.

All scores are the mean Dice over the values of the attribute, each value counted alike, so that the
study and that of many sites can be drawn side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_whole
from .jobs import TOLD_RIGHT
from .results import Results
from .sites.plan import SCENES as SITE_SCENES
from .sites.plan import SEEDS
from .sites.runner import SiteRows

FIGURE = "start/when-it-helps.png"  # in docs/
# Colour, marker and size: for the colour-blind, two differ in more than the colour.
DRAWN: Mapping[str, tuple[str, str, float]] = {
    "wide": ("#7a7a7a", "X", 11.0),
    "film": ("#D55E00", "o", 11.0),
    "per_value": ("#009E73", "s", 10.0),
    "dmoe": ("#0072B2", "D", 10.0),
}
_LEGEND = {
    "wide": "no attribute: a wider MLP",
    "film": "FiLM + MLP",
    "per_value": "one MLP for each value",
    "dmoe": "dMoE",
}
# What the attribute does in a scene, in the order of the figure.
_HEADINGS = {
    "few": "A few values decide, unseen in the image",
    "sites": "Many sites decide, unseen in the image",
    "shown": "The image shows the attribute",
    "none": "The attribute has no effect",
}
_STUDY = {
    "rule": ("few", "phantom, a rule for each of 4 values"),
    "two": ("few", "phantom, two attributes"),
    "mri": ("few", "real MRI, 3 protocols"),
    "appearance": ("shown", "phantom, 4 appearances"),
    "none": ("none", "phantom, 4 values"),
}
_WIDTH, _DPI = 6.4, 150  # inches, and pixels of an inch


@dataclass(frozen=True)
class Drawn:
    """A line of the figure.

    Args:
        kind: what the attribute does, a key of `_HEADINGS`.
        title: the scene in words.
        scores: by method, the score of every seed.
    """

    kind: str
    title: str
    scores: Mapping[str, Sequence[float]]


def scenes_drawn(study: Results, sites: SiteRows) -> list[Drawn]:
    """Every scene with a seed on which all four networks were tested."""
    found = []
    for scene, (kind, title) in _STUDY.items():
        trials = [
            row
            for row in study.trials
            if (row.scene, row.condition, row.spread) == (scene, TOLD_RIGHT, False)
        ]
        scores = {
            method: [
                sum(row.dice.values()) / len(row.dice) for row in trials if row.method == method
            ]
            for method in DRAWN
        }
        found.append(Drawn(kind, title, scores))
    for name, of_sites in SITE_SCENES.items():
        by_method = {
            method: {
                run.seed: run.dice
                for run in sites.runs
                if (run.task, run.scene, run.method) == ("train", name, method)
                and run.seed in SEEDS
                and run.dice is not None
            }
            for method in DRAWN
        }
        seeds = sorted(set.intersection(*(set(scores) for scores in by_method.values())))
        scores = {method: [of[seed] for seed in seeds] for method, of in by_method.items()}
        found.append(Drawn("sites", of_sites.title, scores))
    complete = [scene for scene in found if all(scene.scores.values())]
    return sorted(complete, key=lambda scene: [*_HEADINGS].index(scene.kind))


def digest(scenes: Sequence[Drawn]) -> str:
    """What a file of the figure carries, by which it is known to be drawn from these scores."""
    numbers = [
        [scene.kind, scene.title, {m: [f"{x:.4f}" for x in of] for m, of in scene.scores.items()}]
        for scene in scenes
    ]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def write_figure(scenes: Sequence[Drawn], path: Path) -> None:
    """Draws the figure into a png file, whose text `Source` is the `digest`."""
    figure = draw(scenes)
    metadata = {"Source": digest(scenes)}
    write_whole(path, partial(figure.savefig, format="png", dpi=_DPI, metadata=metadata))


def draw(scenes: Sequence[Drawn]) -> Any:
    """The figure: a line for each scene; a large mark is a mean, a small dot is a seed."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(scene.kind for scene in scenes))
    rows = len(scenes) + 0.6 * len(kinds)
    figure = Figure(figsize=(_WIDTH, 1.9 + 0.78 * rows), layout="constrained", facecolor="white")
    axes = figure.subplots()
    y, shown = 0.0, [x for scene in scenes for of in scene.scores.values() for x in of]
    left = min(shown) - 0.02
    for kind in kinds:
        axes.text(left, y, _HEADINGS[kind], fontsize=14, weight="bold", va="center")
        y += 0.6
        for scene in (scene for scene in scenes if scene.kind == kind):
            axes.axhspan(y - 0.36, y + 0.58, color="#f1f3f5", zorder=0, lw=0)
            seeds = len(scene.scores["dmoe"])
            title = f"{scene.title} ({seeds} seed{'s' if seeds > 1 else ''})"
            axes.text(left + 0.003, y - 0.2, title, fontsize=12, va="center")
            for place, (method, scores) in enumerate(scene.scores.items()):
                colour, marker, size = DRAWN[method]
                at = y + 0.07 + 0.12 * place
                axes.plot(scores, [at] * seeds, "o", color=colour, ms=3.5, alpha=0.45, mew=0)
                mean = sum(scores) / seeds
                axes.plot([mean], [at], marker, color=colour, ms=size, mec="white", mew=0.8)
            y += 1.0
    for method, (colour, marker, size) in DRAWN.items():
        axes.plot([], [], marker, color=colour, ms=size, label=_LEGEND[method])
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=13)
    axes.set(xlim=(left, max(shown) + 0.01), ylim=(y - 0.3, -0.35), yticks=[])
    axes.tick_params(axis="x", labelsize=13)
    axes.grid(axis="x", color="#d0d4d8", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.set_xlabel("Dice, mean over attribute values (higher is better)", fontsize=13)
    return figure
