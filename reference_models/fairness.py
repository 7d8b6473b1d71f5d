"""Scores of a segmentation by group: pure functions that take and return numbers.

The overall score weights each group by its share of the population, not by how many of its cases
happen to be in the test set, so that a balanced test set does not change what "overall" means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def dice(prediction: Tensor, truth: Tensor) -> list[float]:
    """Dice of each case: 2 |P ∩ T| / (|P| + |T|)  (Dice, Ecology 26(3), 1945).

    Both empty is agreement and scores 1. One of the two empty scores 0, a false alarm as well as
    a miss. No case is left out.

    Args:
        prediction: bool, (cases, ...).
        truth: bool, the same shape.

    Returns:
        One number a case.

    Raises:
        TypeError: one of them is not bool.
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> truth = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
        >>> prediction = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
        >>> [round(score, 3) for score in dice(prediction, truth)]
        [0.667, 1.0, 0.0]
    """
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: got {mask.dtype}, expected torch.bool; compare first (> 0).")
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction: got shape {tuple(prediction.shape)}, expected that of truth, "
            f"{tuple(truth.shape)}."
        )
    shared = (prediction & truth).flatten(1).sum(1).tolist()
    sizes = (prediction.flatten(1).sum(1) + truth.flatten(1).sum(1)).tolist()
    return [2 * s / size if size else 1.0 for s, size in zip(shared, sizes, strict=True)]


def group_means(scores: Sequence[float], groups: Sequence[int]) -> dict[int, float]:
    """The mean score of each group that has a case: Dice_g = (1/n_g) Σ_{i in g} Dice_i.

    Raises:
        ValueError: there is not one group a score, or there are no scores.

    Example:
        >>> group_means([0.5, 1.0, 0.25], [0, 0, 2])
        {0: 0.75, 2: 0.25}
    """
    if len(scores) != len(groups) or not scores:
        raise ValueError(f"got {len(scores)} scores and {len(groups)} groups, expected one each.")
    members: dict[int, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        members.setdefault(group, []).append(score)
    return {group: math.fsum(members[group]) / len(members[group]) for group in sorted(members)}


def overall(means: Mapping[int, float], shares: Mapping[int, float]) -> float:
    """The mean over the population: Dice = Σ_g share_g · Dice_g.

    Args:
        means: each group's mean score.
        shares: each group's share of the population (here: of the training set); they sum to 1.

    Raises:
        ValueError: the groups differ (a group without cases has no score), or the shares do not
            sum to 1.

    Example:
        >>> round(overall({0: 0.9, 1: 0.5}, {0: 0.75, 1: 0.25}), 3)
        0.8
    """
    if means.keys() != shares.keys():
        raise ValueError(f"means are of groups {sorted(means)}, shares of {sorted(shares)}.")
    if not math.isclose(math.fsum(shares.values()), 1, abs_tol=1e-6):
        raise ValueError(f"shares: got {dict(shares)}, expected a sum of 1.")
    return math.fsum(shares[group] * means[group] for group in means)


def worst_group(means: Mapping[int, float]) -> int:
    """The group with the lowest mean, the first of them if several are equal.

    Example:
        >>> worst_group({0: 0.9, 1: 0.5, 2: 0.7})
        1
    """
    return min(means, key=lambda group: means[group])


def es_dice(means: Mapping[int, float], shares: Mapping[int, float]) -> float:
    """Equity-scaled Dice: Dice / (1 + Σ_g |Dice_g − Dice|)  (Tian et al., FairSeg, ICLR 2024).

    It equals the overall Dice when all groups are alike, and falls with every group's distance
    from it. Arguments and errors are those of `overall`.

    Example:
        >>> round(es_dice({0: 0.9, 1: 0.5}, {0: 0.75, 1: 0.25}), 4)  # 0.8 / (1 + 0.1 + 0.3)
        0.5714
    """
    mean = overall(means, shares)
    return mean / (1 + math.fsum(abs(score - mean) for score in means.values()))
