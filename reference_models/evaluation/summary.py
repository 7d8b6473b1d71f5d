"""From the scores of cases to the tables of `scores.Summary`, to `cases.csv` and `summary.json`.

Shapes: N cases, D draws of the bootstrap (row 0: the cases themselves).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..data.cases import UNKNOWN, Attribute, Case, Dataset
from ..files import write_whole
from ..metrics import fairness
from ..metrics.region import RegionScore
from ..metrics.scores import METRICS, CaseScore, Estimate, GroupScores, RegionScores, Summary


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
        resamples, seed: of the bootstrap. All regions share its draws, and so do two calls with
            the same cases, so that what differs between them is not the draw.
    """
    shares = population_shares(dataset, cases)
    tables = {}
    for place, attribute in enumerate(dataset.attributes):
        groups = [case.attributes[place] for case in cases]
        drawn = fairness.draws(groups, resamples, seed)
        present = {group: shares[attribute.name][group] for group in drawn if group != UNKNOWN}
        tables[attribute.name] = tuple(
            _region_scores(name, [row[at] for row in scored], attribute, drawn, present)
            for at, name in enumerate(dataset.regions)
        )
    return tables


def _region_scores(
    region: str,
    scored: Sequence[RegionScore],
    attribute: Attribute,
    drawn: Mapping[int, np.ndarray],
    shares: Mapping[int, float],
) -> RegionScores:
    values = {
        metric: np.array([getattr(score, metric) for score in scored], dtype=np.float64)
        for metric in METRICS  # None becomes NaN
    }
    means = {metric: fairness.drawn_means(values[metric], drawn) for metric in METRICS}
    known = {metric: {group: means[metric][group] for group in shares} for metric in METRICS}
    groups = [*range(len(attribute.values)), *([UNKNOWN] if UNKNOWN in drawn else [])]
    group_scores = tuple(
        _group_scores(attribute.label(group), group, scored, drawn, values, means)
        for group in groups
    )
    if not shares:  # nobody's value is known
        none = Estimate(None)
        nothing = dict.fromkeys(METRICS, none)
        return RegionScores(region, group_scores, nothing, "", *[none] * 5)
    dice = known["dice"]
    # Without a group of two cases or more, no draw differs from another.
    spread = any(drawn[group].shape[1] > 1 for group in shares)
    cases_DN = np.concatenate([drawn[group] for group in shares], axis=1)
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
        percentile_10=_estimate(np.percentile(values["dice"][cases_DN], 10, axis=1), spread),
        es_dice=_estimate(fairness.es_dice(dice, shares), spread),
        es_iou=_estimate(fairness.es_dice(known["iou"], shares), spread),
    )


def _group_scores(
    value: str,
    group: int,
    scored: Sequence[RegionScore],
    drawn: Mapping[int, np.ndarray],
    values: Mapping[str, np.ndarray],
    means: Mapping[str, Mapping[int, np.ndarray]],
) -> GroupScores:
    members = drawn[group][0].tolist() if group in drawn else []
    defined = {metric: int(np.isfinite(values[metric][members]).sum()) for metric in METRICS}
    sizes = [(scored[at].truth_size, scored[at].predicted_size) for at in members]
    return GroupScores(
        value=value,
        n=len(members),
        judged=len(members) >= fairness.SMALL_GROUP,
        metrics={
            # One case has a value and tells nothing of how it varies.
            metric: _estimate(means[metric][group], spread=defined[metric] > 1)
            if members
            else Estimate(None)
            for metric in METRICS
        },
        n_defined=defined,
        empty_truth=sum(truth == 0 for truth, _ in sizes),
        missed=sum(truth > 0 and predicted == 0 for truth, predicted in sizes),
        false_alarm=sum(truth == 0 and predicted > 0 for truth, predicted in sizes),
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


def write_cases(path: Path, rows: Sequence[CaseScore], unit: str) -> None:
    """A csv row a case and region, at full precision; an hd95 that is not defined is left empty.

    An attribute that is called like another column here, such as region, has "attribute" before its
    name.
    """
    names = list(rows[0].attributes)
    columns = ["truth_size", "predicted_size", *METRICS]
    titles = [f"{column}_{unit}" if column == "hd95" else column for column in columns]
    taken = {"case_id", "region", *titles}
    told_titles = []
    for name in names:
        while name in taken or name in told_titles:
            name = f"attribute {name}"
        told_titles.append(name)

    def write(target: Path) -> None:
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["case_id", *told_titles, "region", *titles])
            for row in rows:
                scores = [getattr(row, column) for column in columns]
                told = [row.attributes[name] for name in names]
                writer.writerow([row.case_id, *told, row.region, *scores])

    write_whole(path, write)
