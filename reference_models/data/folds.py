"""Holds out subjects, stratified and by seed: a share of them, or all in turn, as folds do.

Which fold holds a subject out depends on the seed, the subjects' names and their strata alone: not
on the machine, on the order of cases or on a library's random numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import DataError
from .cases import Case, Dataset

COUNT = 5  # as nnU-Net makes


def make_folds(dataset: Dataset, count: int, seed: int) -> list[frozenset[str]]:
    """Makes folds of all cases that have a mask and are not the data set's own test cases.

    Cases that the data set itself calls training or validation cases are among them.

    Args:
        dataset: whose cases.
        count: of folds.
        seed: by which subjects are dealt out.

    Returns:
        The ids of the cases that each fold holds out; every case is held out once.

    Raises:
        DataError: there are fewer subjects than folds, a number is out of range, or the data set's
            subjects are too alike to be held out from each other.
    """
    if not dataset.foldable:
        raise DataError(
            f"fold: the cases of {dataset.name} are neighbours within one subject, so that folds "
            "of them would be no independent evidence; leave --fold out for its own split"
        )
    if count < 2:
        raise DataError(f"folds: got {count}, expected 2 or more")
    if seed < 0:
        raise DataError(f"the split's seed must be 0 or more, got {seed}")
    pool = [case for case in dataset.cases if case.labelled and case.split != "test"]
    subjects = {case.subject for case in pool}
    if len(subjects) < count:
        raise DataError(
            f"folds: {count} folds hold out a subject each, but {dataset.name} has "
            f"{len(subjects)} with a mask that are not test cases; choose fewer by --folds"
        )
    dealt = deal_subjects(pool, count, seed)
    return [
        frozenset(case.case_id for case in pool if dealt[case.subject] == fold)
        for fold in range(count)
    ]


def deal_subjects(cases: Sequence[Case], count: int, seed: int) -> dict[str, int]:
    """Deals subjects out evenly, those of each stratum too, to within one.

    Returns:
        By subject a number from 0 to `count` - 1.

    Example:
        >>> cases = [Case(f"c{i}", f"patient {i}", (), stratum=i % 2) for i in range(6)]
        >>> sorted(deal_subjects(cases, 3, seed=0).values())
        [0, 0, 1, 1, 2, 2]
    """
    stratum: dict[str, int] = {}
    for case in cases:  # a subject whose cases differ counts by the highest value
        stratum[case.subject] = max(case.stratum, stratum.get(case.subject, case.stratum))

    def lot(subject: str) -> tuple[int, bytes]:
        text = f"{seed} {subject}".encode("utf-8", errors="surrogateescape")
        return stratum[subject], hashlib.sha256(text).digest()

    return {subject: place % count for place, subject in enumerate(sorted(stratum, key=lot))}


def draw_subjects(cases: Sequence[Case], share: float, rng: np.random.Generator) -> set[str]:
    """Draws a `share` of the subjects, of each stratum to within one of its share.

    The subjects are lined up by stratum, shuffled within it, and every 1/share-th is drawn.
    """
    # A subject whose cases differ, such as a lesion seen at two ages, counts by its last.
    stratum = {case.subject: case.stratum for case in cases}
    if not stratum:
        return set()
    subjects = [list(stratum)[i] for i in rng.permutation(len(stratum))]
    subjects.sort(key=lambda subject: stratum[subject])
    share = max(share, 1 / len(subjects))  # of few, one
    passed = np.floor(np.arange(1, len(subjects) + 1) * share + rng.uniform())
    return {s for s, drawn in zip(subjects, np.diff(passed, prepend=0) > 0, strict=True) if drawn}
