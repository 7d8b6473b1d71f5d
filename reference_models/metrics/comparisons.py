"""Says what the lowest group mean, the largest gap and ES-Dice tell where groups may be alike.

All three pick extremes of group means that each vary by chance, and chance looks like inequality:
groups served exactly alike have a lowest mean, a gap above 0 and an ES-Dice below the overall Dice,
and percentile intervals of a bootstrap leave the truth out (`simulation` counts how often). Here is

* what chance alone shows: the same numbers in `shuffles` of the group labels among subjects;
* how probable means as unequal as measured are, by distances in standard errors of their own;
* an estimate from group means that are drawn together by as much as chance has spread them;
* an interval that holds the truth whether groups are alike or not.

The interval rests on this: each number is the minimum of smooth ones, its members. The lowest mean
is the minimum of the means, the gap (with its sign turned) that of the differences of two groups,
and -1/ES-Dice that of -(1 + Σ_g s_g (Dice_g - Dice)) / Dice over all choices of signs s_g. A
minimum lies above the lowest of its members' own lower limits, unless the limit of the one member
that is lowest in truth fails; and below all upper limits, if these hold at once (Chernozhukov, Lee,
Rosen: Intersection Bounds, Econometrica 81(2), 2013). Members are those that are lowest in some
draw. Choices of signs soon outnumber draws, so that ES-Dice's upper limit is taken from elsewhere:
the sum of the groups' distances from the overall Dice is at most as much larger than the true one
as the same sum of the means' errors (the triangle inequality). Other intervals were simulated
beside it, for the scenes of `simulation`: percentile, BCa and double bootstrap hold the gap of
equal groups never, the basic bootstrap holds the truth in as few as 52 of 100 samples, and one
about shrunken means in as few as 55, where groups differ a little.

Distances are held against their own standard errors, since a shuffle spreads the scores of a group
that varies much over all groups: a small one of them would be far from the others more often than
its shuffled self (Janssen, Statistics and Probability Letters 36(1), 1997).

Shapes: N cases, D draws or shuffles, S subjects, G groups, J members; row 0 of a D is what was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.stats import chi2, norm

from . import fairness
from .scores import Comparison, Estimate

_TINY = 1e-9  # stands for a spread, or a Dice, of 0 where it divides
_LEAST_ERROR = 1e-6  # stands for a standard error of 0: far above rounding, far below a real one


def compare(
    drawn: Mapping[int, np.ndarray],
    shuffled: Mapping[int, np.ndarray],
    covariances_DGG: np.ndarray,
    shares: Mapping[int, float],
    n_subjects: Mapping[int, int],
    seed: int,
) -> dict[str, Comparison]:
    """Holds the lowest group mean, the largest gap and the equity-scaled score against chance.

    Args:
        drawn: by group, its mean in each draw of `fairness.draws`, between 0 and 1.
        shuffled: by group, its mean in each shuffle.
        covariances_DGG: of these means, as of `shuffles.shuffled_covariances`.
        shares: of each group in "overall", as of `fairness.overall`.
        n_subjects: by group.
        seed: of the draws of what is not known of the groups' variances.

    Returns:
        For "worst", "gap" and "es_dice". Nothing is compared without a second group, nor where
        all groups have one subject, so that shuffles only swap their names. Where some have one,
        which does not tell how subjects vary, there is no corrected estimate, and the p-value takes
        the subjects of all groups to vary alike.
    """
    if len(drawn) < 2 or max(n_subjects[group] for group in drawn) < 2:
        return {}
    chance = {
        "worst": fairness.worst(shuffled),
        "gap": fairness.gap(shuffled),
        "es_dice": fairness.es_dice(shuffled, shares),
    }
    corrected = dict.fromkeys(chance, Estimate(None))
    unequal = {name: values_D if name == "gap" else -values_D for name, values_D in chance.items()}
    if min(n_subjects[group] for group in drawn) > 1:
        means_DG = np.stack([*drawn.values()], axis=1)
        shares_G = np.array([shares[group] for group in drawn])
        n_subjects_G = np.array([n_subjects[group] for group in drawn])
        corrected = _corrected(means_DG, shares_G, n_subjects_G, seed)
        shuffled_DG = np.stack([shuffled[group] for group in drawn], axis=1)
        unequal = _studentized(shuffled_DG, covariances_DGG, shares_G)
    return {
        name: Comparison(
            corrected[name],
            Estimate(float(values_D[1:].mean()), *(fairness.interval(values_D[1:]) or ())),
            _p_value(unequal[name]),
        )
        for name, values_D in chance.items()
    }


def _p_value(values_D: np.ndarray) -> float:
    """The share of shuffles, what was measured among them, with as high a value as that."""
    return float(np.mean(values_D >= values_D[0] - _TINY * max(1.0, abs(values_D[0]))))


def _studentized(
    means_DG: np.ndarray, covariances_DGG: np.ndarray, shares_G: np.ndarray
) -> dict[str, np.ndarray]:
    """How unequal means are in standard errors, (D,) for each of the three numbers.

    For the gap, the largest difference of two groups; for the worst group, how far a mean is below
    the overall one at the most; for ES-Dice, the sum of the distances from the overall one.
    """
    low, high = np.triu_indices(len(shares_G), 1)
    pairs_JG = np.eye(len(shares_G))[high] - np.eye(len(shares_G))[low]
    from_overall_GG = np.eye(len(shares_G)) - shares_G

    def in_errors(weights_JG: np.ndarray) -> np.ndarray:
        variance_DJ = ((weights_JG @ covariances_DGG) * weights_JG).sum(axis=2)
        errors_DJ = np.sqrt(np.maximum(variance_DJ, 0))
        return (means_DG @ weights_JG.T) / np.maximum(errors_DJ, _LEAST_ERROR)

    apart_DG = in_errors(from_overall_GG)
    return {
        "worst": -apart_DG.min(axis=1),
        "gap": np.abs(in_errors(pairs_JG)).max(axis=1),
        "es_dice": np.abs(apart_DG).sum(axis=1),
    }


def _corrected(
    means_DG: np.ndarray, shares_G: np.ndarray, n_subjects_G: np.ndarray, seed: int
) -> dict[str, Estimate]:
    """Estimates and intervals of the three."""
    # The bootstrap's variance of a mean of n falls short by (n - 1) / n.
    deviations_DG = (means_DG - means_DG[0]) * np.sqrt(n_subjects_G / (n_subjects_G - 1))
    tails_DG = _student_tails(deviations_DG, n_subjects_G - 1, seed)
    wide_DG = np.clip(means_DG[0] + tails_DG * deviations_DG, 0, 1)

    shrunk = dict(enumerate(shrunk_means(means_DG[0], deviations_DG[1:]).tolist()))
    measured = dict(enumerate(means_DG[0].tolist()))
    shares = dict(enumerate(shares_G.tolist()))
    means_DJ, gaps_DJ = _lowest(wide_DG), _negative_gap(wide_DG)
    limits = {
        "worst": (lower_limit(means_DJ), upper_limit(means_DJ)),
        "gap": (-upper_limit(gaps_DJ), -lower_limit(gaps_DJ)),
        "es_dice": (
            -1 / lower_limit(_negative_inverse_es_dice(wide_DG, shares_G)),
            _highest_es_dice(wide_DG, shares_G),
        ),
    }
    numbers = {
        "worst": [min(means.values()) for means in (shrunk, measured)],
        "gap": [max(means.values()) - min(means.values()) for means in (shrunk, measured)],
        "es_dice": [fairness.es_dice(means, shares) for means in (shrunk, measured)],
    }
    return {
        name: _within(estimate, min(limits[name][0], value), max(limits[name][1], value))
        for name, (estimate, value) in numbers.items()
    }


def _student_tails(deviations_DG: np.ndarray, freedom_G: np.ndarray, seed: int) -> np.ndarray:
    """Factors that give a normal number's deviations the tails of Student's t.

    A bootstrap takes the cases' variance for the true one; ten cases would count for more than ten.
    Where groups share their subjects, what their variances err by correlates as well, by the square
    of the means' correlation.
    """
    centred_DG = deviations_DG - deviations_DG.mean(axis=0)
    scaled_DG = centred_DG / np.maximum(centred_DG.std(axis=0), _TINY)
    squared_GG = (scaled_DG.T @ scaled_DG / len(scaled_DG)) ** 2
    np.fill_diagonal(squared_GG, 1.0)
    normal_DG = np.random.default_rng((seed, 2)).multivariate_normal(
        np.zeros(len(freedom_G)), squared_GG, size=len(deviations_DG), method="eigh"
    )
    return np.sqrt(freedom_G / chi2.isf(norm.sf(normal_DG), freedom_G))


def _within(value: float, low: float, high: float) -> Estimate:
    low, high = (np.clip([low, high], 0, 1) + 0.0).tolist()  # no -0.0
    return Estimate(min(max(value, low), high), low, high)


def shrunk_means(means_G: np.ndarray, deviations_DG: np.ndarray) -> np.ndarray:
    """The groups' means, drawn to a common one until they spread as the groups themselves do.

    The variance τ² between groups is what is left of the means' spread when what chance adds to it
    is taken away (DerSimonian and Laird, Controlled Clinical Trials 7(3), 1986, with the chance of
    the draws); a distance from the common mean is then scaled by √(τ² / (τ² + its variance by
    chance)), so that the extremes are not drawn in too far (Louis, JASA 79, 1984).

    Args:
        means_G: as measured.
        deviations_DG: of each draw's means from them.

    Example:
        >>> noise_DG = np.array([[0.1, -0.1], [-0.1, 0.1]])
        >>> shrunk_means(np.array([0.5, 0.6]), noise_DG)  # no further apart than by chance
        array([0.55, 0.55])
        >>> shrunk_means(np.array([0.5, 0.6]), noise_DG / 1000).round(3)
        array([0.5, 0.6])
    """
    weights_G = 1 / np.maximum((deviations_DG**2).mean(axis=0), _TINY**2)
    shares_G = weights_G / weights_G.sum()
    common = shares_G @ means_G
    apart_G = means_G - common
    chance_G = ((deviations_DG - (deviations_DG @ shares_G)[:, None]) ** 2).mean(axis=0)
    # By how much τ² = 1 spreads a mean about the common one.
    unit_G = 1 - 2 * shares_G + (shares_G**2).sum()
    between = max(0.0, weights_G @ (apart_G**2 - chance_G) / (weights_G @ unit_G))
    return common + apart_G * np.sqrt(
        between * unit_G / np.maximum(between * unit_G + chance_G, _TINY**2)
    )


def lower_limit(members_DJ: np.ndarray) -> float:
    """Lower 97.5 % limit of the lowest of several numbers: the lowest of their own.

    Example:
        >>> one_D = np.linspace(-20, 20, 401)[:, None]
        >>> lower_limit(np.concatenate([[[0.0]], one_D]))
        -19.0
    """
    return float(np.percentile(members_DJ[1:], 2.5, axis=0).min())


def upper_limit(members_DJ: np.ndarray) -> float:
    """Upper 97.5 % limit of the lowest of several numbers: the lowest of limits that hold at once.

    All of these lie equally many spreads above what was measured.

    Example:
        >>> one_D = np.linspace(-20, 20, 401)[:, None]
        >>> upper_limit(np.concatenate([[[0.0]], one_D]))
        19.0
    """
    values_J, draws_DJ = members_DJ[0], members_DJ[1:]
    spread_J = np.maximum(np.sqrt(((draws_DJ - values_J) ** 2).mean(axis=0)), _TINY)
    at_once = np.percentile(((draws_DJ - values_J) / spread_J).max(axis=1), 97.5)
    return float((values_J + at_once * spread_J).min())


def _lowest(means_DG: np.ndarray) -> np.ndarray:
    """The means of the groups that are lowest in some draw."""
    return means_DG[:, np.unique(means_DG.argmin(axis=1))]


def _negative_gap(means_DG: np.ndarray) -> np.ndarray:
    """Of each two groups that make the gap in some draw, the lower mean minus the higher."""
    pairs = np.stack([means_DG.argmin(axis=1), means_DG.argmax(axis=1)], axis=1)
    low_J, high_J = np.unique(pairs, axis=0).T
    return means_DG[:, low_J] - means_DG[:, high_J]


def _negative_inverse_es_dice(means_DG: np.ndarray, shares_G: np.ndarray) -> np.ndarray:
    """-(1 + Σ_g s_g (Dice_g - Dice)) / Dice for the signs s_g that some draw has."""
    overall_D = means_DG @ shares_G
    signs_DG = np.where(means_DG >= overall_D[:, None], 1.0, -1.0)
    signs_JG = np.unique(signs_DG, axis=0)
    # Σ_g s_g (Dice_g - Dice) = Σ_g (s_g - share_g Σ_h s_h) Dice_g
    weights_JG = signs_JG - signs_JG.sum(axis=1, keepdims=True) * shares_G
    return -(1 + means_DG @ weights_JG.T) / np.maximum(overall_D, _TINY)[:, None]


def _highest_es_dice(means_DG: np.ndarray, shares_G: np.ndarray) -> float:
    """Upper limit of Dice / (1 + Σ_g |Dice_g - Dice|), by how large that sum is of errors alone."""
    errors_DG = means_DG[1:] - means_DG[0]
    errors_D, overall = errors_DG @ shares_G, means_DG[0] @ shares_G
    apart_D = np.abs(errors_DG - errors_D[:, None]).sum(axis=1)
    apart = np.abs(means_DG[0] - overall).sum()
    inverse = np.percentile((1 + apart - apart_D) / np.maximum(overall - errors_D, _TINY), 2.5)
    return 1 / max(float(inverse), 1.0)
