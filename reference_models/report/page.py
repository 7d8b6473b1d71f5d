"""The report of an evaluation: one HTML page that needs nothing but a browser.

Words and layout are in `page.html.j2`, drawing in `charts.py` and `pictures.py`; here is what
the page needs besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..files import write_whole
from ..metrics.scores import CaseScore, Estimate, GroupScores, RegionScores, Summary
from .charts import MOST_DOTS, chart, heat
from .pictures import LONGEST, Picture, colour_of, data_uri, examples


def write_report(
    path: Path,
    summary: Summary,
    cases: Sequence[CaseScore],
    pictures: Mapping[str, Picture],
    classes: tuple[str, ...],
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: of the HTML file.
        summary: what is reported.
        cases: the cases under the first condition, a row a region: the points of the charts.
        pictures: by case id, those of `pictures_wanted` as far as there are any.
        classes: names by label, the background first.

    Raises:
        ValueError: a picture has a label that is no class.
    """
    shown = examples(cases, summary.attributes)
    wanted = {
        example.case_id for groups in shown.values() for few in groups.values() for example in few
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        summary=summary,
        given=summary.conditions[0],
        run=[condition for condition in summary.conditions if condition.scores],
        examples=shown,
        pictures={i: data_uri(pictures[i], classes) for i in pictures if i in wanted},
        volumes=any(picture.planes > 1 for picture in pictures.values()),
        legend=[(name, colour_of(label)) for label, name in enumerate(classes) if label],
        chart=lambda attribute, scores: chart(cases, attribute, scores),
        finding=_finding,
        heat=heat,
        rows=_rows,
        zip=zip,
        longest=LONGEST,
        most_dots=MOST_DOTS,
    )
    # A file name that is no UTF-8 does not cost the report.
    content = page.encode("utf-8", errors="replace")
    write_whole(path, lambda target: target.write_bytes(content) and None)


@dataclass(frozen=True)
class Pair:
    """The lowest and the highest of some groups by Dice."""

    low: GroupScores
    high: GroupScores

    @property
    def overlap(self) -> bool | None:
        """Whether their intervals overlap; None where one of them has no interval."""
        top, bottom = self.low.metrics["dice"].high, self.high.metrics["dice"].low
        return None if top is None or bottom is None else top >= bottom


def _finding(scores: RegionScores) -> tuple[Pair | None, Pair | None]:
    """The pair that makes the gap, and the pair among the groups that are large enough to judge."""

    def dice(group: GroupScores) -> float:
        value = group.metrics["dice"].value
        return math.nan if value is None else value

    known = [g for g in scores.groups if g.value != "unknown" and not math.isnan(dice(g))]
    all_of_them, judged = (
        Pair(min(groups, key=dice), max(groups, key=dice)) if len(groups) > 1 else None
        for groups in (known, [group for group in known if group.judged])
    )
    return all_of_them, judged


def _rows(scores: RegionScores) -> list[tuple[str, str, Estimate]]:
    """What a condition changes: (name, remark, number), in the same order for each condition."""
    return [
        ("Overall Dice", "", scores.overall["dice"]),
        ("Worst group, Dice", scores.worst_group, scores.worst),
        ("Largest gap, Dice", "", scores.gap),
        ("10th percentile of Dice", "", scores.percentile_10),
        ("ES-Dice", "", scores.es_dice),
        ("ES-IoU", "", scores.es_iou),
        *((f"Dice, {group.value}", "", group.metrics["dice"]) for group in scores.groups),
    ]
