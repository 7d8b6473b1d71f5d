"""Counts how often the intervals of a report contain the truth, in made scores of known truth.

`python -m reference_models.metrics.simulation docs/explanation/gaps.md` simulates all `SCENES` and
renews the table of that page.

Scores are drawn, and then treated as a report treats the scores of cases: by `fairness.draws`,
`comparisons.compare` and the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from ..errors import DataError
from ..markdown import markdown_table, replace_section
from . import fairness
from .comparisons import compare
from .shuffles import shuffled_covariances, shuffled_groups, shuffled_means

MARK = "coverage"  # the name of the part of a page that is this file's
NUMBERS = ("worst", "gap", "es_dice")
MEAN, DEVIATION = 0.8, 0.12  # of the Dice of a case
MISSED = 0.05  # share of the cases with a Dice of 0, where some are missed


@dataclass(frozen=True)
class Scene:
    """Groups of cases whose scores are to be drawn.

    Args:
        sizes: number of cases of each group.
        lower: by how much the last group's mean is below that of the others.
        images: cases of a subject, which have the same score.
        crossed: every subject has a case in every group, and two thirds of the scores' variance.
        missed: `MISSED` of the cases have a Dice of 0, the others one of a beta distribution.
        wider: how many times as much the last group's scores vary as those of the others, if not
            once: then all are of beta distributions.
    """

    sizes: tuple[int, ...]
    lower: float = 0.0
    images: int = 1
    crossed: bool = False
    missed: bool = False
    wider: float = 1.0

    @property
    def means(self) -> list[float]:
        return [MEAN] * (len(self.sizes) - 1) + [MEAN - self.lower]

    @property
    def title(self) -> str:
        remarks = (
            f"{self.images} images a subject" if self.images > 1 else "",
            "every subject in every group" if self.crossed else "",
            f"{100 * MISSED:.0f} % missed" if self.missed else "",
            f"the last varying {self.wider:g} times as much" if self.wider != 1 else "",
        )
        equal = len({*self.sizes}) == 1 and len(self.sizes) > 3
        sizes = f"{len(self.sizes)} × {self.sizes[0]}" if equal else "/".join(map(str, self.sizes))
        return ", ".join(filter(None, (sizes, *remarks)))

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, list[int], list[str]]:
        """Each case's score, group and subject."""
        subjects = [-(-size // self.images) for size in self.sizes]
        groups = np.repeat(range(len(self.sizes)), self.sizes).tolist()
        names = [
            f"{0 if self.crossed else group}-{case // self.images}"
            for group, size in enumerate(self.sizes)
            for case in range(size)
        ]
        shared = rng.normal(0, DEVIATION, max(subjects)) * (2 / 3) ** 0.5
        scores = []
        deviations = [DEVIATION] * (len(self.sizes) - 1) + [DEVIATION * self.wider]
        for mean, deviation, number, size in zip(
            self.means, deviations, subjects, self.sizes, strict=True
        ):
            if self.crossed:
                own = mean + shared[:number] + rng.normal(0, DEVIATION / 3**0.5, number)
            elif self.missed:
                own = _beta(rng, mean / (1 - MISSED), deviation, number)
                own = np.where(rng.random(number) < MISSED, 0.0, own)
            elif self.wider != 1:
                own = _beta(rng, mean, deviation, number)
            else:
                own = rng.normal(mean, deviation, number)
            scores.append(np.repeat(own, self.images)[:size])
        return np.concatenate(scores), groups, names


def _beta(rng: np.random.Generator, mean: float, deviation: float, number: int) -> np.ndarray:
    total = mean * (1 - mean) / deviation**2 - 1
    return rng.beta(mean * total, (1 - mean) * total, number)


SIZES = ((1500, 300, 200), (30, 30, 30), (10,) * 5, (10, 60, 200, 300, 80))
SCENES = (
    *(Scene(sizes, lower) for sizes in SIZES for lower in (0.0, 0.02, 0.04, 0.08)),
    *(Scene(sizes, lower) for sizes in ((20,) * 10, (30,) * 20) for lower in (0.0, 0.04)),
    *(Scene((200, 200), lower, images) for images in (2, 5) for lower in (0.0, 0.04)),
    *(Scene((40, 40, 40), lower, crossed=True) for lower in (0.0, 0.02)),
    *(Scene(sizes, lower, missed=True) for sizes in SIZES for lower in (0.0, 0.04)),
    *(
        Scene(sizes, lower, images, wider=2.5)
        for sizes, images in (
            ((300, 10), 1),
            ((150, 150, 10), 1),
            ((1000, 300, 30), 1),
            ((300, 100), 5),
        )
        for lower in (0.0, 0.08)
    ),
)


@dataclass(frozen=True)
class Coverage:
    """What came out of a scene; numbers by the names of `NUMBERS`.

    Args:
        percentile, corrected: share of the repetitions whose 95 % interval holds the truth: the
            percentile interval of the bootstrap, and that of `comparisons`.
        measured_bias, corrected_bias: mean of what was measured, and of the corrected estimate,
            minus the truth.
        unlikely: share of the repetitions with a p-value of .05 or less.
    """

    percentile: Mapping[str, float]
    corrected: Mapping[str, float]
    measured_bias: Mapping[str, float]
    corrected_bias: Mapping[str, float]
    unlikely: Mapping[str, float]


def coverage(scene: Scene, repetitions: int, resamples: int, seed: int = 0) -> Coverage:
    """Draws a scene again and again, and counts.

    Raises:
        ValueError: there is not one repetition.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions: got {repetitions}, expected 1 or more.")
    rng = np.random.default_rng(seed)
    shares = fairness.shares_of(dict(enumerate(scene.sizes)))
    true = truth(scene)
    rows = []
    for repetition in range(repetitions):
        scores_N, groups, subjects = scene.draw(rng)
        drawn = fairness.drawn_means(
            scores_N, fairness.draws(groups, resamples, repetition, subjects)
        )
        shuffled_DN = shuffled_groups(groups, subjects, resamples, repetition)
        n_subjects = {
            group: len({s for g, s in zip(groups, subjects, strict=True) if g == group})
            for group in drawn
        }
        found = compare(
            drawn,
            shuffled_means(scores_N, shuffled_DN),
            shuffled_covariances(scores_N, shuffled_DN, subjects),
            shares,
            n_subjects,
            repetition,
        )
        for name, values_D in _numbers(drawn, shares).items():
            estimate = found[name].corrected
            low, high = fairness.interval(values_D[1:]) or (np.nan, np.nan)
            # What cannot be estimated holds nothing.
            value, least, most = (
                np.nan if number is None else number
                for number in (estimate.value, estimate.low, estimate.high)
            )
            rows.append(
                (
                    low <= true[name] <= high,
                    # The interval of groups that are alike ends at the truth itself.
                    least - 1e-9 <= true[name] <= most + 1e-9,
                    values_D[0] - true[name],
                    value - true[name],
                    found[name].p_value <= 0.05,
                )
            )
    means = np.array(rows, dtype=float).reshape(repetitions, len(NUMBERS), -1).mean(axis=0)
    return Coverage(*(dict(zip(NUMBERS, column, strict=True)) for column in means.T.tolist()))


def truth(scene: Scene) -> dict[str, float]:
    """What there is to be found, by the names of `NUMBERS`."""
    means = {group: np.array([mean]) for group, mean in enumerate(scene.means)}
    shares = fairness.shares_of(dict(enumerate(scene.sizes)))
    return {name: value.item() for name, value in _numbers(means, shares).items()}


def _numbers(means: Mapping[int, np.ndarray], shares: Mapping[int, float]) -> dict[str, np.ndarray]:
    return {
        "worst": fairness.worst(means),
        "gap": fairness.gap(means),
        "es_dice": fairness.es_dice(means, shares),
    }


def table(found: Sequence[tuple[Scene, Coverage]]) -> str:
    """The table in Markdown, a row a scene."""

    def percents(values: Mapping[str, float]) -> str:
        return " / ".join(f"{100 * values[name]:.0f}" for name in NUMBERS)

    def values(scene: Scene, bias: Mapping[str, float]) -> str:
        true = truth(scene)
        return " / ".join(f"{true[name] + bias[name]:.3f}".removeprefix("0") for name in NUMBERS)

    lines = [
        [
            scene.title,
            f"{scene.lower:g}",
            percents(counts.percentile),
            percents(counts.corrected),
            values(scene, dict.fromkeys(NUMBERS, 0.0)),
            values(scene, counts.measured_bias),
            values(scene, counts.corrected_bias),
            f"{100 * counts.unlikely['gap']:.0f}",
        ]
        for scene, counts in found
    ]
    header = [
        "cases by group", "last group lower by", "percentile interval holds, %",
        "report's interval holds, %", "truth", "measured, mean", "corrected, mean",
        "p of the gap ≤ .05, %",
    ]  # fmt: skip
    return markdown_table(header, lines)


def renew(page: Path, /, repetitions: int = 400, resamples: int = 400) -> None:
    """Simulates all scenes and renews a page's table.

    Args:
        page: Markdown file with the marks.
        repetitions: how often each scene is drawn.
        resamples: of the bootstrap, and shuffles, of each.
    """
    found = []
    for scene in SCENES:
        found.append((scene, coverage(scene, repetitions, resamples)))
        print(table(found).splitlines()[-1], flush=True)
    content = (
        f"Each row is from {repetitions} samples with {resamples} resamples each.\n\n{table(found)}"
    )
    replace_section(page, MARK, content)


if __name__ == "__main__":
    try:
        tyro.cli(renew, prog="python -m reference_models.metrics.simulation")
    except DataError as error:
        sys.exit(str(error))
