"""Shuffles group labels among subjects: the means of the groups in each shuffle, and their errors.

Shapes: N cases, D shuffles, S subjects, G groups; row 0 of a D is what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import fairness

_AT_ONCE = 2**16  # numbers at a time, which a processor's cache holds


def shuffled_groups(
    groups: Sequence[int], subjects: Sequence[str], shuffles: int, seed: int
) -> np.ndarray:
    """Gives each case's group in each shuffle, as if the groups were named at random.

    Subjects whose cases are all of one group swap their groups as a whole, so that every group
    keeps its number of subjects; a subject with cases in several groups swaps these among its own.

    Returns:
        (1 + shuffles, N). Row 0 is `groups`.

    Example:
        >>> shuffled_groups([0, 1, 1, 0, 1], ["a", "b", "b", "c", "c"], shuffles=3, seed=0)
        array([[0, 1, 1, 0, 1],
               [0, 1, 1, 0, 1],
               [1, 0, 0, 0, 1],
               [1, 0, 0, 1, 0]])
    """
    rng = np.random.default_rng((seed, 1))
    groups_N = np.array(groups)
    shuffled_DN = np.tile(groups_N, (1 + shuffles, 1))
    whole: list[list[int]] = []
    crossed: list[list[int]] = []
    for pattern, members in fairness.subjects_alike(groups, subjects):
        kind = whole if len(pattern) == 1 else crossed
        kind += [[case for of_group in own.values() for case in of_group] for own in members]
    if whole:
        of_subjects = np.tile(groups_N[[cases[0] for cases in whole]], (shuffles, 1))
        sizes = [len(cases) for cases in whole]
        shuffled_DN[1:, np.concatenate(whole)] = np.repeat(
            rng.permuted(of_subjects, axis=1), sizes, axis=1
        )
    if crossed:
        cases = np.concatenate(crossed)
        subject = np.repeat(np.arange(len(crossed)), [len(own) for own in crossed])
        # Sorted by subject, and within a subject by chance.
        order = np.argsort(subject + rng.random((shuffles, len(cases))), axis=1)
        shuffled_DN[1:, cases] = groups_N[cases][order]
    return shuffled_DN


def shuffled_means(values_N: np.ndarray, shuffled_DN: np.ndarray) -> dict[int, np.ndarray]:
    """Each group's mean in each shuffle (D,), of values that every case defines.

    Example:
        >>> shuffled_means(np.array([1.0, 0.5, 0.0]), np.array([[0, 0, 1], [0, 1, 0]]))
        {0: array([0.75, 0.5 ]), 1: array([0. , 0.5])}
    """
    means = {}
    for group in np.unique(shuffled_DN[0]).tolist():
        member_DN = (shuffled_DN == group).astype(values_N.dtype)
        means[group] = member_DN @ values_N / member_DN.sum(axis=1)
    return means


def shuffled_covariances(
    values_N: np.ndarray, shuffled_DN: np.ndarray, subjects: Sequence[str]
) -> np.ndarray:
    """Estimates how the groups' means err together in each shuffle, by the spread of subjects.

    A subject moves its group's mean by the sum of its cases' distances from it over their number;
    the (co)variance is the sum of the products of these, times n / (n - 1) of n subjects (Liang and
    Zeger, Biometrika 73(1), 1986). Of a subject a case it is the squared standard error of the
    mean, and subjects with a case in both of two groups make that of the mean of differences.

    Returns:
        (D, G, G), groups in ascending order. A group of one subject has 0.

    Example:
        >>> shuffled_covariances(np.array([1.0, 0.5, 0.0]), np.array([[0, 0, 1]]), ["a", "b", "c"])
        array([[[0.0625, 0.    ],
                [0.    , 0.    ]]])
    """
    groups = np.unique(shuffled_DN[0])
    names, subject_N = np.unique(np.asarray(subjects), return_inverse=True)
    cells = len(names) * len(groups)
    step = max(1, _AT_ONCE // max(len(values_N), cells))
    parts = []
    for start in range(0, len(shuffled_DN), step):
        group_DN = np.searchsorted(groups, shuffled_DN[start : start + step])
        shape = (len(group_DN), len(names), len(groups))
        cell_DN = cells * np.arange(shape[0])[:, None] + len(groups) * subject_N + group_DN
        counts_DSG, sums_DSG = (
            np.bincount(cell_DN.ravel(), weights, cells * shape[0]).reshape(shape)
            for weights in (None, np.tile(values_N, shape[0]))
        )
        n_DG = counts_DSG.sum(axis=1, keepdims=True)
        means_DG = sums_DSG.sum(axis=1, keepdims=True) / n_DG
        subjects_DG = (counts_DSG > 0).sum(axis=1, keepdims=True)
        moved_DSG = (sums_DSG - counts_DSG * means_DG) / n_DG
        moved_DSG *= np.sqrt(subjects_DG / np.maximum(subjects_DG - 1, 1))
        parts.append(moved_DSG.transpose(0, 2, 1) @ moved_DSG)
    return np.concatenate(parts)
