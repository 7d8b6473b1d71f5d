"""Reads and writes the scores of the demo's trainings, and gives the ranges of many of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.conditions import AS_GIVEN
from ..files import write_whole
from ..markdown import markdown_table
from ..metrics.scores import RegionScores, Summary

COLUMNS = ("seed", "cpu_capability", "method", "attributes")


@dataclass(frozen=True)
class Row:
    """Holds the scores of one training on the test set.

    Args:
        seed: the seed of the training.
        cpu_capability: the instruction set that PyTorch's operators used.
        method: one of the demo's methods.
        attributes: those that the network received: "as given", or "shuffled" among the cases.
        dice: the mean Dice of each group and, under "ES-Dice", that score.
    """

    seed: int
    cpu_capability: str
    method: str
    attributes: str
    dice: Mapping[str, float]


def region_of(summary: Summary, condition: str = AS_GIVEN) -> RegionScores:
    """Gives the scores of the first region, by the only attribute."""
    (scores,) = (c.scores for c in summary.conditions if c.name == condition)
    ((region, *_),) = scores.values()
    return region


def dice_of(region: RegionScores) -> dict[str, float]:
    """Gives `Row.dice`; a score that is not defined counts as 0."""
    dice = {group.value: group.metrics["dice"].value or 0.0 for group in region.groups}
    return dice | {"ES-Dice": region.es_dice.value or 0.0}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A csv file of these rows, at least one, whole or not at all; Dice with four decimals."""

    def write(target: Path) -> None:
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *rows[0].dice])
            for row in rows:
                cells = [f"{dice:.4f}" for dice in row.dice.values()]
                writer.writerow([row.seed, row.cpu_capability, row.method, row.attributes, *cells])

    write_whole(path, write)


def read_rows(path: Path) -> list[Row]:
    """Reads what `write_rows` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                int(line["seed"]),
                line["cpu_capability"],
                line["method"],
                line["attributes"],
                {name: float(line[name]) for name in line if name not in COLUMNS},
            )
            for line in csv.DictReader(file)
        ]


def ranges(rows: Iterable[Row]) -> str:
    """Makes a Markdown table of the lowest and the highest score of each method.

    Example:
        >>> dice = (0.81, 0.834)
        >>> print(ranges(Row(0, "AVX2", "FiLM", "as given", {"A": a}) for a in dice))
        |  | A |
        |---|---|
        | FiLM | .81 to .83 |
    """
    found: dict[str, list[Mapping[str, float]]] = {}
    for row in rows:
        received = "" if row.attributes == AS_GIVEN else f", {row.attributes} attributes"
        found.setdefault(row.method + received, []).append(row.dice)
    columns = list(next(iter(found.values()))[0])
    lines = []
    for name, dice in found.items():
        ends = [(min(d[c] for d in dice), max(d[c] for d in dice)) for c in columns]
        lines.append([name, *(_between(low, high) for low, high in ends)])
    return markdown_table(["", *columns], lines)


def _between(low: float, high: float) -> str:
    first, last = (f"{dice:.2f}".removeprefix("0") for dice in (low, high))
    return first if first == last else f"{first} to {last}"
