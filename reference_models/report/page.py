"""Writes the report of an evaluation: one HTML page that needs nothing but a browser.

Words and layout are in `page.html.j2`, drawing in `charts.py` and `pictures.py`; here is what
the page needs besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from ..files import write_whole
from ..metrics.scores import (
    CaseScore,
    Comparison,
    Estimate,
    GroupScores,
    RegionScores,
    Summary,
)
from .charts import MOST_DOTS, chart, heat
from .pictures import LONGEST, Picture, colour_of, data_uris, examples, pictures_wanted
from .words import LIMITS, comparisons_made, gap_by_chance, without_truth


def write_report(
    path: Path,
    summary: Summary,
    cases: Sequence[CaseScore],
    pictures: Mapping[str, Picture],
    classes: tuple[str, ...],
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file.
        summary: what is reported.
        cases: the cases under the first condition, a row a region: the points of the charts.
        pictures: by case id, those of `pictures_wanted` as far as there are any.
        classes: names by label, the background first.

    Raises:
        ValueError: a picture has a label that is no class.
    """
    wanted = pictures_wanted(cases, summary.attributes)
    page = page_template(Path(__file__).parent).render(
        summary=summary,
        given=summary.conditions[0],
        run=[condition for condition in summary.conditions if condition.scores],
        examples=examples(cases, summary.attributes),
        pictures={i: data_uris(pictures[i], classes) for i in pictures if i in wanted},
        blank=_blank(pictures),
        regions=list(dict.fromkeys(case.region for case in cases)),
        volumes=any(picture.planes > 1 for picture in pictures.values()),
        legend=[(name, colour_of(label)) for label, name in enumerate(classes) if label],
        chart=lambda attribute, scores: chart(cases, attribute, scores),
        finding=_finding,
        compared=_compared,
        by_chance=lambda scores: gap_by_chance(scores, summary),
        comparisons_made=comparisons_made(summary),
        limits=LIMITS,
        without_truth=without_truth,
        counted=_counted(summary),
        heat=heat,
        rows=_rows,
        zip=zip,
        longest=LONGEST,
        most_dots=MOST_DOTS,
    )
    # A file name that is no UTF-8 does not cost the report.
    content = page.encode("utf-8", errors="replace")
    write_whole(path, lambda target: target.write_bytes(content))


def _blank(pictures: Mapping[str, Picture]) -> dict[str, set[str]]:
    """Finds by mask, truth and prediction, the pictures in which it has nothing to outline."""
    blank: dict[str, set[str]] = {"truth": set(), "prediction": set()}
    for case_id, picture in pictures.items():
        for title, mask_HW in picture.masks.items():
            if not mask_HW.any():
                blank[title].add(case_id)
    return blank


def _counted(summary: Summary) -> str:
    """Names what a group's size is counted in: subjects, where some have several cases."""
    groups = (
        group
        for regions in summary.conditions[0].scores.values()
        for region in regions
        for group in region.groups
    )
    return "subjects" if any(group.n_subjects < group.n for group in groups) else "cases"


@dataclass(frozen=True)
class Pair:
    """Two of some groups: the one of the lowest and the one of the highest Dice."""

    low: GroupScores
    high: GroupScores


def _finding(scores: RegionScores) -> tuple[Pair | None, Pair | None]:
    """Finds the pair that makes the gap, and the pair among the groups large enough to judge."""
    known = [
        group
        for group in scores.groups
        if group.value != "unknown" and group.metrics["dice"].value is not None
    ]
    return _pair(known), _pair([group for group in known if group.judged])


def _pair(groups: Sequence[GroupScores]) -> Pair | None:
    """Picks the lowest and the highest of groups that have a Dice; None of fewer than two."""

    def dice(group: GroupScores) -> float:
        return group.metrics["dice"].value or 0.0

    return Pair(min(groups, key=dice), max(groups, key=dice)) if len(groups) > 1 else None


def _with_interval(scores: RegionScores, name: str) -> Estimate:
    """Gives what was measured with the interval that holds where groups are alike, too."""
    measured: Estimate = getattr(scores, name)
    if name not in scores.compared:
        return measured
    return replace(scores.compared[name].corrected, value=measured.value)


def _compared(scores: RegionScores) -> list[tuple[str, Estimate, Comparison]]:
    """Lists the numbers that are held against chance: (name, as measured, against chance)."""
    titles = {
        "worst": "Worst group, Dice",
        "gap": "Largest gap, Dice",
        "es_dice": "ES-Dice",
        "es_iou": "ES-IoU",
    }
    return [(titles[name], getattr(scores, name), found) for name, found in scores.compared.items()]


def _rows(scores: RegionScores) -> list[tuple[str, str, Estimate]]:
    """Lists what a condition changes: (name, remark, number), in one order for all conditions."""
    return [
        ("Overall Dice", "", scores.overall["dice"]),
        ("Worst group, Dice", scores.worst_group, _with_interval(scores, "worst")),
        ("Largest gap, Dice", "", _with_interval(scores, "gap")),
        ("10th percentile of Dice", "", scores.percentile_10),
        ("ES-Dice", "", _with_interval(scores, "es_dice")),
        ("ES-IoU", "", _with_interval(scores, "es_iou")),
        *((f"Dice, {group.value}", "", group.metrics["dice"]) for group in scores.groups),
    ]


def page_template(folder: Path) -> Template:
    """A folder's page.html.j2. Text is escaped, and a name that is not given is an error."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
