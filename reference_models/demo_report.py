"""What the demo shows: tables on the console, a CSV and a figure, each written whole or not at all.

Shapes: B samples, A protocols, E experts.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from rich.table import Table
from torch import Tensor

from . import fairness
from .data.mni152 import PROTOCOLS, TRAIN_SHARES, Contours
from .files import write_whole

SHARES = dict(enumerate(TRAIN_SHARES))
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#CC79A7", "#0072B2", "#D55E00", "#F0E442")
TRUTH_COLOUR = "#00E5A8"


@dataclass(frozen=True)
class Outcome:
    """One method's predictions on the test set and their Dice, case by case."""

    predicted_B1HW: Tensor  # bool
    dice_B: list[float]
    told_B: Tensor  # the attributes in the scope; a model without attributes does not look at them

    def by_protocol(self, test: Contours) -> dict[int, float]:
        return fairness.group_means(self.dice_B, test.protocol_B.tolist())


def dice_table(outcomes: Mapping[str, Outcome], test: Contours) -> Table:
    """A row a method: Dice of each protocol, overall, of the worst group, and ES-Dice."""
    counts = test.protocol_B.bincount(minlength=len(PROTOCOLS)).tolist()
    shares = "/".join(f"{100 * share:.0f}" for share in TRAIN_SHARES)
    table = Table(title="Dice on the held-out slices", caption=f"overall: weighted {shares} %")
    table.add_column("")
    for protocol, count in zip(PROTOCOLS, counts, strict=True):
        table.add_column(f"{protocol.replace(' ', chr(10))}\nn={count}", justify="right")
    for title in ("overall", "worst\ngroup", "ES-Dice"):
        table.add_column(title, justify="right")
    for name, outcome in outcomes.items():
        means = outcome.by_protocol(test)
        scores = [
            *means.values(),
            fairness.overall(means, SHARES),
            means[fairness.worst_group(means)],
            fairness.es_dice(means, SHARES),
        ]
        table.add_row(name, *(f"{score:.3f}" for score in scores))
    return table


def load_table(load_AE: Tensor) -> Table:
    """A row a protocol: which share of its tokens went to which expert."""
    table = Table(title="dMoE: each protocol's share of tokens by expert, mean of the 12 blocks, %")
    table.add_column("expert")
    for expert in range(load_AE.shape[1]):
        table.add_column(str(expert), justify="right")
    for protocol, load_E in zip(PROTOCOLS, load_AE.tolist(), strict=True):
        table.add_row(protocol, *(f"{100 * share:.0f}" for share in load_E))
    return table


def write_csv(path: Path, outcomes: Mapping[str, Outcome], test: Contours) -> None:
    """A row a method and protocol: share in training, test cases, mean and lowest Dice."""
    protocol_B = test.protocol_B.tolist()

    def write(target: Path) -> None:
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "protocol", "train_share", "n", "dice", "lowest_dice"])
            for name, outcome in outcomes.items():
                for group, mean in outcome.by_protocol(test).items():
                    pairs = zip(outcome.dice_B, protocol_B, strict=True)
                    cases = [score for score, of in pairs if of == group]
                    numbers = [len(cases), f"{mean:.4f}", f"{min(cases):.4f}"]
                    writer.writerow([name, PROTOCOLS[group], SHARES[group], *numbers])

    write_whole(path, write)


def write_figure(path: Path, outcomes: Mapping[str, Outcome], test: Contours) -> None:
    """The middle test slice under each protocol, by method, beside the Dice of every case."""
    middle = test.slice_B.unique().median()
    figure = Figure(figsize=(16, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2, 1))[0]
    axes = np.atleast_2d(left.subplots(len(PROTOCOLS), 1 + len(outcomes)))
    for group, row in enumerate(axes):
        case = int(((test.slice_B == middle) & (test.protocol_B == group)).nonzero()[0])
        row[0].set_ylabel(PROTOCOLS[group], fontsize=12)
        _draw_slice(row[0], test, case, test.mask_B1HW[case, 0].bool(), TRUTH_COLOUR)
        for axis, colour, outcome in zip(row[1:], COLOURS, outcomes.values(), strict=True):
            _draw_slice(axis, test, case, outcome.predicted_B1HW[case, 0], colour)
            told = int(outcome.told_B[case])
            wrong = "" if told == group else f" (told: {PROTOCOLS[told]})"
            axis.set_xlabel(f"Dice {outcome.dice_B[case]:.3f}{wrong}")
    for axis, name in zip(axes[0], ("truth", *outcomes), strict=True):
        axis.set_title(name, fontsize=11)
    left.suptitle(f"Slice {int(middle)} of the MNI152 template: fill = mask, line = truth")
    _draw_points(right.subplots(), outcomes, test)
    write_whole(path, lambda target: figure.savefig(target, dpi=110, format="png"))


def _draw_slice(axis: Axes, test: Contours, case: int, mask_HW: Tensor, colour: str) -> None:
    axis.imshow(test.image_B1HW[case, 0], cmap="gray", vmin=-3, vmax=2)
    axis.contourf(mask_HW.float(), levels=[0.5, 1.5], colors=[colour], alpha=0.5)
    axis.contour(test.mask_B1HW[case, 0], levels=[0.5], colors=[TRUTH_COLOUR], linewidths=0.8)
    axis.set(xticks=[], yticks=[])


def _draw_points(axis: Axes, outcomes: Mapping[str, Outcome], test: Contours) -> None:
    """Every case as a point, the group's mean as a bar behind it."""
    width = 0.8 / len(outcomes)
    for place, (colour, outcome) in enumerate(zip(COLOURS, outcomes.values(), strict=True)):
        for group, mean in outcome.by_protocol(test).items():
            x = group + (place - (len(outcomes) - 1) / 2) * width
            pairs = zip(outcome.dice_B, test.protocol_B.tolist(), strict=True)
            cases = [score for score, of in pairs if of == group]
            axis.bar(x, mean, width * 0.9, color=colour, alpha=0.55)
            axis.scatter(
                np.linspace(x - width / 4, x + width / 4, len(cases)),
                cases,
                7,
                colour,
                edgecolors="black",
                linewidths=0.2,
            )
            axis.text(x, 0.02, f"{mean:.2f}".lstrip("0"), ha="center", fontsize=8)
    labels = [f"{name}\n{100 * SHARES[a]:.0f} % of training" for a, name in enumerate(PROTOCOLS)]
    axis.set_xticks(range(len(PROTOCOLS)), labels)
    axis.set(ylim=(0, 1.02), ylabel="Dice", title="Held-out slices: bar = mean, point = one case")
    axis.spines[["top", "right"]].set_visible(False)
    handles: list[Patch | Line2D] = [
        Patch(color=colour, alpha=0.55, label=name)
        for colour, name in zip(COLOURS, outcomes, strict=True)
    ]
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, frameon=False
    )
