"""Draws the demo in one picture: a row a group, and what each network outlined for it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

import matplotlib.figure
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..data import DataSettings, open_dataset
from ..data.cases import Sample
from ..evaluation.masks import read_mask
from ..files import write_whole
from ..metrics.region import score_region
from ..metrics.scores import Summary
from ..report.pictures import Picture
from .verdict import BLIND, TOLD, Verdict

# Of Okabe and Ito's colours, which colour-blind readers tell apart also on grey.
RIGHT, TOO_MUCH, MISSED = "#56B4E9", "#D55E00", "#F0E442"
OPACITY = 0.75


def write_picture(
    path: Path,
    data: DataSettings,
    summaries: Mapping[str, Summary],
    runs: Mapping[str, Path],
    verdict: Verdict,
) -> None:
    """Writes a PNG, whole or not at all.

    For each group it shows the case in the middle of the list of test cases, so the score did not
    choose it. On the MNI152 brain this is the same slice for all groups.

    Args:
        path: the file.
        data: the data set that the runs were evaluated on.
        summaries: for each method, the summary of its evaluation.
        runs: the folder of each method's run, which was evaluated on the test split.
        verdict: has the picture's title.
    """
    dataset = open_dataset(data)
    attribute = dataset.attributes[0]
    shares = summaries[TOLD[0]].population[attribute.name]
    columns = ("the scan", "the site's outline", *BLIND, *TOLD)
    figure = matplotlib.figure.Figure(figsize=(12.5, 8.4), dpi=110)
    figure.suptitle(textwrap.fill(verdict.title, 95), x=0.02, ha="left", weight="bold", size=14)
    grid = figure.subplots(
        len(attribute.values), len(columns), squeeze=False,
        gridspec_kw={
            "left": 0.13, "right": 0.99, "bottom": 0.07, "top": 0.81, "wspace": 0.05, "hspace": 0.12
        },
    )  # fmt: skip
    for value, name in enumerate(attribute.values):
        cases = [c for c in dataset.cases if c.split == "test" and c.attributes[0] == value]
        sample = dataset.load(cases[len(cases) // 2])
        row = dict(zip(columns, grid[value], strict=True))
        truth_HW = sample.truth_S > 0
        _draw(row["the scan"], sample, None)
        _draw(row["the site's outline"], sample, truth_HW)
        for method in (*BLIND, *TOLD):
            masks = runs[method] / "evaluation-test" / "masks"
            mask_HW = read_mask(masks / f"{sample.case_id}.png", sample, dataset.classes) > 0
            _draw(row[method], sample, mask_HW)
            score = score_region(mask_HW, truth_HW, spacing=sample.spacing, tolerance=1.0)
            row[method].set_xlabel(f"Dice {score.dice:.2f}", size=12)
        row["the scan"].set_ylabel(
            f"site {value + 1} outlines\n{name}\n{100 * shares[value]:.0f} % of training",
            rotation=0, ha="right", va="center", labelpad=8, size=12,
        )  # fmt: skip
    for name, axes in zip(columns, grid[0], strict=True):
        axes.set_title(name, size=13)
    for names, words in ((BLIND, "do not receive the site"), (TOLD, "receive the site")):
        first, last = (
            grid[0][columns.index(name)].get_position() for name in (names[0], names[-1])
        )
        ends = [first.x0 + 0.005, last.x1 - 0.005]
        figure.add_artist(Line2D(ends, [0.854, 0.854], color="black"))
        figure.text((first.x0 + last.x1) / 2, 0.86, words, ha="center", size=13)
    legend = {"right": RIGHT, "too much": TOO_MUCH, "missed": MISSED}
    figure.legend(
        handles=[Patch(color=colour, label=words) for words, colour in legend.items()],
        loc="lower center", ncols=3, frameon=False, fontsize=12,
    )  # fmt: skip
    write_whole(path, lambda target: figure.savefig(target, format="png"))


def _draw(axes: Axes, sample: Sample, mask_HW: np.ndarray | None) -> None:
    """Shows the image and, in three colours, what of a mask is right, too much and missed."""
    truth_HW = sample.truth_S > 0
    grey = Picture.of(sample.case_id, sample.image_CS, sample.truth_S, sample.truth_S).image_HW3
    shown_HW3 = grey / 255
    if mask_HW is not None:
        for pixels_HW, colour in (
            (mask_HW & truth_HW, RIGHT),
            (mask_HW & ~truth_HW, TOO_MUCH),
            (truth_HW & ~mask_HW, MISSED),
        ):
            fill = OPACITY * np.array(to_rgb(colour))
            shown_HW3[pixels_HW] = fill + (1 - OPACITY) * shown_HW3[pixels_HW]
    axes.imshow(shown_HW3, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
