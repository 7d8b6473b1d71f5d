"""Holds the results of an evaluation: plain dataclasses for `summary.json` and the report.

Every number that rests on a sample of cases is an `Estimate`, a value with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METRICS = ("dice", "iou", "hd95", "surface_dice")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where no case defines it.

    Unless another source is named, the interval is that of a bootstrap: the cases are drawn anew
    with replacement many times, and the interval has 95 % of the values that result.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Compares a number that spans groups with what groups served alike would show by chance.

    Args:
        corrected: estimate and 95 % interval that allow for chance (`comparisons.compare`); None
            where a group has a single subject.
        chance: mean and 95 % range of the number when group labels are shuffled among subjects.
        p_value: the share of these shuffles, the true labels among them, in which groups are as
            unequal as measured, in standard errors of their means.
    """

    corrected: Estimate
    chance: Estimate
    p_value: float


@dataclass(frozen=True)
class GroupScores:
    """The cases of one attribute value.

    Args:
        value: the name of the attribute value; "unknown" for cases whose attribute is not known.
        n: number of cases.
        judged: False where the group has too few subjects to judge by. It is shown all the same.
        metrics: the mean of each of `METRICS` over the cases that define it.
        n_defined: for each metric, the number of cases that define it.
        empty_truth: number of cases whose truth is empty.
        missed: number of cases whose truth is not empty and whose prediction is.
        false_alarm: number of cases whose truth is empty and whose prediction is not.
        n_subjects: number of patients or lesions that the cases are of. The bootstrap draws these.
    """

    value: str
    n: int
    judged: bool
    metrics: Mapping[str, Estimate]
    n_defined: Mapping[str, int]
    empty_truth: int
    missed: int
    false_alarm: int
    n_subjects: int


@dataclass(frozen=True)
class RegionScores:
    """Holds one region by one attribute: the scores of each group, and those of all together.

    `overall`, `worst`, `gap`, `percentile_10`, `es_dice` and `es_iou` are over the cases whose
    value is known, the same cases for all of them; the unknown ones are a group of their own. Where
    no value is known, `worst_group` is "" and the estimates have no value.

    `compared` has the keys "worst", "gap", "es_dice" and "es_iou", and none where fewer than two
    groups have a case. Of these four, the estimate outside `compared` is what was measured, with
    the percentile interval of its draws, which leaves out the truth where groups are nearly alike.
    """

    region: str
    groups: tuple[GroupScores, ...]
    overall: Mapping[str, Estimate]
    worst_group: str
    worst: Estimate  # Dice
    gap: Estimate  # Dice of the best group minus that of the worst
    percentile_10: Estimate  # of the cases' Dice
    es_dice: Estimate
    es_iou: Estimate
    compared: Mapping[str, Comparison]


@dataclass(frozen=True)
class Condition:
    """Holds the scores of the cases with the attributes that the network received.

    Args:
        name: "as given", "shuffled", "wrong" or "unknown".
        note: how many cases got their true values, or why this condition was not run.
        scores: for each attribute name, the regions' scores; empty where it was not run.
        load: for each attribute name, the (values x experts) shares of tokens, as the mean over the
            calls.
    """

    name: str
    note: str
    scores: Mapping[str, tuple[RegionScores, ...]]
    load: Mapping[str, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class Summary:
    """Holds all of `summary.json`.

    Args:
        dataset, split: the data set and the split whose cases were scored.
        source: the run's folder, or the folder of the masks.
        n_cases: number of cases that were scored.
        n_subjects: number of patients or lesions that these cases are of.
        unit: the unit of hd95, "mm" or "px".
        tolerance: the tolerance of the surface Dice, in `unit`.
        small_group: groups with fewer subjects than this are marked as too small to judge.
        resamples: number of resamples of the bootstrap.
        attributes: for each attribute name, the names of its values.
        population: for each attribute, the share of each value in "overall". A value without cases
            has 0, and the others take over its share in proportion to theirs.
        policy: how empty masks are scored, in a sentence.
        conditions: the conditions, "as given" first.
        comparisons: for each attribute, the number of group means that are compared: the number of
            groups that have a case, times the number of regions.
        about: what the data set says of itself; empty if it says nothing.
        networks: which networks predicted, and what these cases had to do with choosing them, in
            sentences; empty where nothing needs to be said.
    """

    dataset: str
    split: str
    source: str
    n_cases: int
    n_subjects: int
    unit: str
    tolerance: float
    small_group: int
    resamples: int
    attributes: Mapping[str, tuple[str, ...]]
    population: Mapping[str, tuple[float, ...]]
    policy: str
    conditions: tuple[Condition, ...]
    comparisons: Mapping[str, int]
    about: str = ""
    networks: str = ""


@dataclass(frozen=True)
class CaseScore:
    """Holds one region of one case, with the attributes as given: a row of `cases.csv`.

    Args:
        case_id: the id of the case.
        attributes: for each attribute name, the name of the value.
        region: the region that was scored.
        truth_size, predicted_size: number of pixels or voxels.
        dice, iou, hd95, surface_dice: the scores; None where one is not defined.
    """

    case_id: str
    attributes: Mapping[str, str]
    region: str
    truth_size: int
    predicted_size: int
    dice: float
    iou: float
    hd95: float | None
    surface_dice: float
