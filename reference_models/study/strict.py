"""Stricter intervals of the differences between methods, as far as the tables allow them.

The bootstrap of `statistics.Resampled` underestimates three things: there are only five seeds,
neighbouring slices of real MRI are alike, and learning rates were chosen on the first seed.
Student's t and blocks of slices allow for the first two, leaving out that seed for the third.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data.mni152 import TRAIN_SHARES
from .results import Results
from .scenes import SCENES
from .statistics import BLOCKS, es_dice_by_block, student_interval


class StrictDifference(NamedTuple):
    """A difference in ES-Dice: its mean over seeds, and Student's 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


class StrictTerms:
    """Differences in ES-Dice between two methods of a study that receive the right attribute.

    Args:
        results: the study's.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._blocks: dict[tuple[str, str], dict[int, list[float]]] = {}

    def difference(
        self, scene: str, a: str, b: str, *, untuned: bool = False
    ) -> StrictDifference | None:
        """How two methods differ.

        Args:
            scene, a, b: which.
            untuned: leave out the first seed, by whose validation split learning rates were chosen.

        Returns:
            None where there is no such row, fewer than two seeds are left, or a test set that all
            seeds share has fewer subjects than blocks.
        """
        row = self._results.difference(scene, a, b)
        if row is None:
            return None
        skipped = int(untuned)
        by_seed, by_block = row.by_seed[skipped:], []
        if SCENES[scene].effect is None:
            own, other = self._by_block(scene, a), self._by_block(scene, b)
            seeds = sorted(own.keys() & other.keys())[skipped:]
            if not seeds:
                return None
            apart = [np.subtract(own[seed], other[seed]) for seed in seeds]
            by_block = np.mean(apart, axis=0).tolist()
        limits = student_interval(by_seed, by_block)
        if limits is None:
            return None
        return StrictDifference(float(np.mean(by_seed)) if untuned else row.difference, *limits)

    def _by_block(self, scene: str, method: str) -> dict[int, list[float]]:
        """Each seed's ES-Dice in every block of the test set; none where that is too small."""
        key = scene, method
        if key not in self._blocks:
            found = {}
            for seed, cases in self._results.cases_of(scene, method).items():
                subjects = [case.case.rpartition("-")[0] for case in cases]
                if len({*subjects}) >= BLOCKS:
                    dice = [case.dice[method] for case in cases]
                    groups = [case.group for case in cases]
                    found[seed] = es_dice_by_block(dice, groups, subjects, TRAIN_SHARES)
            self._blocks[key] = found
        return self._blocks[key]
