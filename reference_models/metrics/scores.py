"""Holds what an evaluation found: plain dataclasses for `summary.json` and the report.

Every number that rests on a sample of cases is an `Estimate`, a value with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METRICS = ("dice", "iou", "hd95", "surface_dice")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval, of a bootstrap; None where no case defines it."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A number that spans groups, held against what groups served alike would show by chance.

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
        value: its name; "unknown" for cases whose attribute is not known.
        n: cases.
        judged: False where there are too few subjects to judge by; shown all the same.
        metrics: mean of each of `METRICS` over the cases that define it.
        n_defined: how many cases those are, by metric.
        empty_truth, missed, false_alarm: cases whose truth is empty; whose truth is not and the
            prediction is; whose truth is empty and the prediction is not.
        n_subjects: patients or lesions that the cases are of; these are what the bootstrap draws.
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
    """One region by one attribute: the groups, and what they come to together.

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
    """The test set under one way of telling the model its attributes.

    Args:
        name: "as given", "shuffled", "wrong" or "unknown".
        note: how many samples were told something else than the truth, or why it was not run.
        scores: by attribute name, the regions' scores; empty where it was not run.
        load: by attribute name, the (values x experts) shares of tokens, mean over the calls.
    """

    name: str
    note: str
    scores: Mapping[str, tuple[RegionScores, ...]]
    load: Mapping[str, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True)
class Summary:
    """All of `summary.json`.

    Args:
        dataset, split: whose cases were scored.
        source: the run folder or the folder of predictions.
        n_cases: number of cases that were scored.
        n_subjects: number of patients or lesions that these cases are of.
        unit: of hd95 ("mm" or "px").
        tolerance: of the surface Dice, in `unit`.
        small_group: groups with fewer subjects are marked as too small to judge.
        resamples: of the bootstrap.
        attributes: names, each with the names of its values.
        population: by attribute, each value's share in "overall"; 0 for a value without cases,
            whose share the others take over in proportion to theirs.
        policy: how empty masks are scored, in a sentence.
        conditions: "as given" comes first.
        comparisons: by attribute, how many group means are compared: groups that have a case, times
            regions.
        about: what the data say of themselves, empty if they say nothing.
        networks: who predicted the cases, and what the cases had to do with how the networks were
            chosen, in sentences; empty where that goes without saying.
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
    """One region of one case, under the attributes as given: a row of `cases.csv`.

    Args:
        case_id: the case's.
        attributes: by attribute name, the value's name.
        region: what was scored.
        truth_size, predicted_size: pixels or voxels.
        dice, iou, hd95, surface_dice: None where not defined.
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
