"""From the scores of cases to the tables of `scores.Summary`, to `cases.csv` and `summary.json`.

Shapes: N cases, D draws or shuffles (row 0: the cases themselves).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data.cases import UNKNOWN, Attribute, Case, Dataset
from ..files import write_whole
from ..metrics import fairness
from ..metrics.comparisons import compare
from ..metrics.region import RegionScore
from ..metrics.scores import METRICS, CaseScore, Estimate, GroupScores, RegionScores, Summary
from ..metrics.shuffles import shuffled_covariances, shuffled_groups, shuffled_means


def case_scores(
    dataset: Dataset, cases: Sequence[Case], scored: Sequence[Sequence[RegionScore]]
) -> list[CaseScore]:
    """A row of `cases.csv` for each case and region, in the cases' order."""
    return [
        CaseScore(
            case_id=case.case_id,
            attributes=attribute_names(dataset, case),
            region=region,
            **score._asdict(),
        )
        for case, regions in zip(cases, scored, strict=True)
        for region, score in zip(dataset.regions, regions, strict=True)
    ]


def attribute_names(dataset: Dataset, case: Case) -> dict[str, str]:
    """The names of a case's attribute values, by attribute name."""
    pairs = zip(dataset.attributes, case.attributes, strict=True)
    return {attribute.name: attribute.label(index) for attribute, index in pairs}


def population_shares(dataset: Dataset, cases: Sequence[Case]) -> dict[str, tuple[float, ...]]:
    """Gives by attribute the share in "overall" of each of its values.

    The data set's population, or the cases' shares where it states none; a value without cases
    has no score, and leaves its share to the others in proportion to theirs.
    """
    shares = {}
    for place, attribute in enumerate(dataset.attributes):
        groups = [case.attributes[place] for case in cases]
        counts = {value: groups.count(value) for value in range(len(attribute.values))}
        present = fairness.shares_of(counts, dataset.population.get(attribute.name))
        shares[attribute.name] = tuple(present.get(value, 0.0) for value in counts)
    return shares


def region_scores(
    dataset: Dataset,
    cases: Sequence[Case],
    scored: Sequence[Sequence[RegionScore]],
    *,
    resamples: int,
    seed: int,
) -> dict[str, tuple[RegionScores, ...]]:
    """Gives by attribute the scores of every region.

    Args:
        dataset: whose regions, attributes and population these are.
        cases: those that were scored.
        scored: for each case, the score of each region in the data set's order.
        resamples, seed: of the bootstrap, and of the shuffles of group labels. All regions share
            its draws, and so do two calls with the same cases, so that what differs between them is
            not the draw. Subjects are drawn and shuffled, with all their cases.
    """
    shares = population_shares(dataset, cases)
    tables = {}
    for place, attribute in enumerate(dataset.attributes):
        sample = _Sample.of([case.attributes[place] for case in cases], cases, resamples, seed)
        present = {
            group: shares[attribute.name][group] for group in sample.drawn if group != UNKNOWN
        }
        tables[attribute.name] = tuple(
            _region_scores(name, [row[at] for row in scored], attribute, sample, present)
            for at, name in enumerate(dataset.regions)
        )
    return tables


def comparisons(scores: Mapping[str, Sequence[RegionScores]]) -> dict[str, int]:
    """How many group means are compared, by attribute: groups that have a case, times regions."""
    return {
        attribute: sum(
            group.n > 0 and group.value != "unknown"
            for region in regions
            for group in region.groups
        )
        for attribute, regions in scores.items()
    }


@dataclass(frozen=True)
class _Sample:
    """The cases by one attribute, and what may have come out by chance instead.

    Args:
        subjects: each case's.
        drawn: by group, its cases in each draw of the bootstrap.
        known: the cases whose value is known.
        shuffled_DN: the group of each of these in each shuffle.
        seed: of all draws.
    """

    subjects: Sequence[str]
    drawn: Mapping[int, np.ndarray]
    known: Sequence[int]
    shuffled_DN: np.ndarray
    seed: int

    @classmethod
    def of(cls, groups: Sequence[int], cases: Sequence[Case], resamples: int, seed: int) -> _Sample:
        subjects = [case.subject for case in cases]
        known = [place for place, group in enumerate(groups) if group != UNKNOWN]
        return cls(
            subjects,
            fairness.draws(groups, resamples, seed, subjects),
            known,
            shuffled_groups(
                [groups[i] for i in known], [subjects[i] for i in known], resamples, seed
            ),
            seed,
        )

    def members(self, group: int) -> list[int]:
        """The cases of a group, which may have none."""
        if group not in self.drawn:
            return []
        row_P = self.drawn[group][0]
        return row_P[row_P >= 0].tolist()

    def n_subjects(self, cases: Iterable[int]) -> int:
        return len({self.subjects[case] for case in cases})


def _region_scores(
    region: str,
    scored: Sequence[RegionScore],
    attribute: Attribute,
    sample: _Sample,
    shares: Mapping[int, float],
) -> RegionScores:
    drawn = sample.drawn
    values = {
        metric: np.array([getattr(score, metric) for score in scored], dtype=np.float64)
        for metric in METRICS  # None becomes NaN
    }
    means = {metric: fairness.drawn_means(values[metric], drawn) for metric in METRICS}
    known = {metric: {group: means[metric][group] for group in shares} for metric in METRICS}
    groups = [*range(len(attribute.values)), *([UNKNOWN] if UNKNOWN in drawn else [])]
    group_scores = tuple(
        _group_scores(attribute.label(group), group, scored, sample, values, means)
        for group in groups
    )
    if not shares:  # nobody's value is known
        none = Estimate(None)
        nothing = dict.fromkeys(METRICS, none)
        return RegionScores(
            region, group_scores, nothing, "", none, none, none, none, none, compared={}
        )
    dice = known["dice"]
    n_subjects = {group: sample.n_subjects(sample.members(group)) for group in shares}
    # Without a group of two subjects or more, no draw differs from another.
    spread = max(n_subjects.values()) > 1
    cases_DN = np.concatenate([drawn[group] for group in shares], axis=1)
    dice_DN = np.append(values["dice"], np.nan)[cases_DN]  # at -1, no case
    compared, compared_iou = (
        compare(
            known[metric],
            shuffled_means(values[metric][sample.known], sample.shuffled_DN),
            shuffled_covariances(
                values[metric][sample.known],
                sample.shuffled_DN,
                [sample.subjects[case] for case in sample.known],
            ),
            shares,
            n_subjects,
            sample.seed,
        )
        for metric in ("dice", "iou")
    )
    lowest = fairness.worst_group({group: float(means_D[0]) for group, means_D in dice.items()})
    return RegionScores(
        region=region,
        groups=group_scores,
        overall={
            metric: _estimate(fairness.overall(known[metric], shares), spread) for metric in METRICS
        },
        worst_group=attribute.label(lowest),
        worst=_estimate(fairness.worst(dice), spread),
        gap=_estimate(fairness.gap(dice), spread),
        percentile_10=_estimate(np.nanpercentile(dice_DN, 10, axis=1), spread),
        es_dice=_estimate(fairness.es_dice(dice, shares), spread),
        es_iou=_estimate(fairness.es_dice(known["iou"], shares), spread),
        compared=compared | ({"es_iou": compared_iou["es_dice"]} if compared_iou else {}),
    )


def _group_scores(
    value: str,
    group: int,
    scored: Sequence[RegionScore],
    sample: _Sample,
    values: Mapping[str, np.ndarray],
    means: Mapping[str, Mapping[int, np.ndarray]],
) -> GroupScores:
    members = sample.members(group)
    defined = {
        metric: [at for at in members if math.isfinite(values[metric][at])] for metric in METRICS
    }
    n_subjects = sample.n_subjects(members)
    sizes = [(scored[at].truth_size, scored[at].predicted_size) for at in members]
    return GroupScores(
        value=value,
        n=len(members),
        judged=n_subjects >= fairness.SMALL_GROUP,
        metrics={
            # One subject has a value and tells nothing of how it varies.
            metric: _estimate(means[metric][group], spread=sample.n_subjects(defined[metric]) > 1)
            if members
            else Estimate(None)
            for metric in METRICS
        },
        n_defined={metric: len(cases) for metric, cases in defined.items()},
        empty_truth=sum(truth == 0 for truth, _ in sizes),
        missed=sum(truth > 0 and predicted == 0 for truth, predicted in sizes),
        false_alarm=sum(truth == 0 and predicted > 0 for truth, predicted in sizes),
        n_subjects=n_subjects,
    )


def _estimate(values_D: np.ndarray, spread: bool) -> Estimate:
    """Row 0 with the interval of the rest; no interval where there is no spread to speak of."""
    value = float(values_D[0])
    if math.isnan(value):
        return Estimate(None)
    limits = fairness.interval(values_D[1:]) if spread else None
    return Estimate(value, *limits) if limits else Estimate(value)


def write_summary(path: Path, summary: Summary) -> None:
    """All of the summary as json (no NaN: what is not defined is null), whole or not at all."""
    text = json.dumps(asdict(summary), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def write_cases(path: Path, rows: Sequence[CaseScore], unit: str, folds: Mapping[str, int]) -> None:
    """A csv row a case and region, at full precision; an hd95 that is not defined is left empty.

    Of a cross-validation, the column fold says which one held the case out (`folds`, by case id).
    An attribute that is called like another column here, such as region, has "attribute" before its
    name.
    """
    names = list(rows[0].attributes)
    columns = ["truth_size", "predicted_size", *METRICS]
    titles = [f"{column}_{unit}" if column == "hd95" else column for column in columns]
    keys = ["case_id", *(["fold"] if folds else [])]
    taken = {*keys, "region", *titles}
    told_titles = []
    for name in names:
        while name in taken or name in told_titles:
            name = f"attribute {name}"
        told_titles.append(name)

    def write(target: Path) -> None:
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*keys, *told_titles, "region", *titles])
            for row in rows:
                scores = [getattr(row, column) for column in columns]
                told = [row.attributes[name] for name in names]
                key = [row.case_id, *([folds[row.case_id]] if folds else [])]
                writer.writerow([*key, *told, row.region, *scores])

    write_whole(path, write)
