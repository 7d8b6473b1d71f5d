"""Holds out subjects, stratified and by a seed: a share of them, or each in turn, as folds do.

Which fold holds a subject out depends only on the seed, the subjects' names and their strata, not
on the machine, the order of the cases or a library's random numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from .cases import Case, Dataset

COUNT = 5  # nnU-Net makes as many


def make_folds(dataset: Dataset, count: int, seed: int) -> list[frozenset[str]]:
    """Makes folds of all cases that have a mask, except the data set's own test cases.

    The data set's own training and validation cases are all divided into the folds.

    Args:
        dataset: the data set.
        count: the number of folds.
        seed: the seed that assigns subjects to folds.

    Returns:
        The ids of the cases that each fold holds out; every case is held out once.

    Raises:
        DataError: there are fewer subjects than folds, a number is out of range, or the data set's
            subjects are too similar to be held out from each other.
    """
    if not dataset.foldable:
        raise DataError(
            f"fold: the cases of {dataset.name} are neighbouring slices of one head, so that folds "
            "would not be independent; leave --fold out to use the data set's own split"
        )
    if count < 2:
        raise DataError(f"folds: got {count}, expected 2 or more")
    if seed < 0:
        raise DataError(f"split_seed: got {seed}, expected 0 or more")
    pool = [case for case in dataset.cases if case.labelled and case.split != "test"]
    subjects = {case.subject for case in pool}
    if len(subjects) < count:
        raise DataError(
            f"folds: got {count}, but {dataset.name} has only {len(subjects)} subjects with a mask "
            "that are not test cases, and each fold needs one; choose fewer by --folds"
        )
    dealt = deal_subjects(pool, count, seed)
    return [
        frozenset(case.case_id for case in pool if dealt[case.subject] == fold)
        for fold in range(count)
    ]


def deal_subjects(cases: Sequence[Case], count: int, seed: int) -> dict[str, int]:
    """Assigns subjects to folds of equal size, to within one subject, also within each stratum.

    Returns:
        The number of the fold, from 0 to `count` - 1, by subject.

    Example:
        >>> cases = [Case(f"c{i}", f"patient {i}", (), stratum=i % 2) for i in range(6)]
        >>> sorted(deal_subjects(cases, 3, seed=0).values())
        [0, 0, 1, 1, 2, 2]
    """
    stratum: dict[str, int] = {}
    for case in cases:  # if a subject's cases differ, the highest value counts
        stratum[case.subject] = max(case.stratum, stratum.get(case.subject, case.stratum))

    def lot(subject: str) -> tuple[int, bytes]:
        text = f"{seed} {subject}".encode("utf-8", errors="surrogateescape")
        return stratum[subject], hashlib.sha256(text).digest()

    return {subject: place % count for place, subject in enumerate(sorted(stratum, key=lot))}


def draw_subjects(cases: Sequence[Case], share: float, rng: np.random.Generator) -> set[str]:
    """Draws a `share` of the subjects, and of each stratum the same share to within one subject.

    The subjects are sorted by stratum, shuffled within it, and every 1/share-th one is drawn.
    """
    # If a subject's cases differ, such as a lesion seen at two ages, the last case counts.
    stratum = {case.subject: case.stratum for case in cases}
    if not stratum:
        return set()
    subjects = [list(stratum)[i] for i in rng.permutation(len(stratum))]
    subjects.sort(key=lambda subject: stratum[subject])
    share = max(share, 1 / len(subjects))  # at least one subject
    passed = np.floor(np.arange(1, len(subjects) + 1) * share + rng.uniform())
    return {s for s, drawn in zip(subjects, np.diff(passed, prepend=0) > 0, strict=True) if drawn}
