"""Trains four small U-Nets on real MRI, and shows what each of them outlines for every group.

All four are the `demo` preset with another MLP in the network's stages. They see the same batches
in the same order, with the same optimizer, learning rate and number of steps. They also have the
same multiply-adds (the arithmetic of one image), except for what reads the attribute and chooses
experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..evaluation.conditions import AS_GIVEN
from ..evaluation.evaluate import EvaluateRun, evaluate_run
from ..metrics.scores import Summary
from ..recipes.framings import require
from ..recipes.presets import PRESETS
from ..recipes.recipe import Recipe
from ..report.words import findings
from ..terminal import print_anything
from ..training.loop import train
from ..workers import workers
from .page import write_page
from .picture import write_picture
from .scores import Row, dice_of, region_of, write_rows
from .verdict import judge

DEMO = PRESETS["demo"]
# For each name that is shown, what changes in the preset's network. The networks that receive the
# attribute come last.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"block": "mlp"},
    "plain MoE": {"aware": False},
    "FiLM": {"block": "film"},
    "dMoE": {},
}

TERMS = (
    "Dice is the mean over a group's slices of how well a prediction agrees with the site's "
    "outline, from 0 (they share nothing) to 1 (they are the same). The overall Dice weights the "
    "groups by their shares of the training slices. The worst group is the group with the lowest "
    "Dice. ES-Dice, equity-scaled Dice, is Dice / (1 + Σ_g |Dice − Dice_g|), where Dice is the "
    "overall Dice and Dice_g that of group g. It equals the overall Dice where all groups have the "
    "same, and is lower otherwise."
)
LIMITS = (
    "Nothing here says anything about fairness in a clinic. The data are one averaged, left-right "
    "symmetric head, and the attribute was made up for this demo. The settings were chosen with "
    "these slices in sight, and the intervals are over neighbouring slices of that head. Different "
    "loads of the experts do not prove that experts specialise, because loads differ even where an "
    "attribute means nothing. The shuffled attributes test that."
)


@dataclass(frozen=True)
class DemoSettings:
    """Trains a dense network, a plain MoE, FiLM and dMoE on the MNI152 brain, and compares them."""

    out: Path = Path("demo_output")
    """Folder for the runs, the picture and the report.
    Runs that are there already are not trained again."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights, the order of the
    cases, the augmentation and the routing noise. The
    picture and the report show the first seed, and
    scores.csv has all of them."""
    epochs: int | None = None
    """Number of epochs. The default is that of the preset."""
    processes: int = min(len(METHODS), os.cpu_count() or 1)
    """Number of trainings that run at the same time, each on one core."""


@dataclass(frozen=True)
class _Done:
    """Holds a training that was scored: its summary, and the last line that it printed."""

    summary: Summary
    line: str


def demo(settings: DemoSettings) -> dict[str, Summary]:
    """Trains and evaluates all methods, and says what the scores show, whoever is ahead.

    Returns:
        For each method, the scores of the first seed.

    Raises:
        RunError: there is no seed or process, or the folder has runs of other settings.
    """
    require(settings, "seeds", bool(settings.seeds), "at least one")
    require(settings, "processes", settings.processes >= 1, "1 or more")
    console = Console(highlight=False)
    report, picture = settings.out / "report.html", settings.out / "picture.png"
    console.print(f"report: {report} (in about two minutes)", soft_wrap=True, markup=False)
    runs = {
        (seed, name): dataclasses.replace(
            DEMO,
            model=dataclasses.replace(DEMO.model, **changes),
            out=settings.out / f"seed{seed}" / name.replace(" ", "-"),
            seed=seed,
            epochs=DEMO.epochs if settings.epochs is None else settings.epochs,
        )
        for seed in settings.seeds
        for name, changes in METHODS.items()
    }
    done: dict[tuple[int, str], _Done] = {}
    # One thread a training: two take five times as long as one when something else runs on their
    # cores, and one gives the same numbers on any number of cores. Those with experts take longest
    # and start first, so that no core is idle in the end.
    order = sorted(runs, key=lambda run: (run[0], "block" in METHODS[run[1]]))
    training_all = console.status(f"training {', '.join(METHODS)}")  # turns on a terminal
    with training_all, workers(settings.processes) as pool:
        trainings = {pool.submit(_train_and_score, runs[run]): run for run in order}
        for training in as_completed(trainings):
            seed, name = trainings[training]
            done[seed, name] = training.result()  # the first error breaks off the others
            line = f"seed {seed}, {name}: {done[seed, name].line}"
            console.print(line, soft_wrap=True, markup=False)
            write_rows(settings.out / "scores.csv", _rows({r: done[r] for r in runs if r in done}))
    (first, *_) = settings.seeds
    summaries = {name: done[first, name].summary for name in METHODS}
    verdict = judge(summaries)
    folders = {name: runs[first, name].out for name in METHODS}
    write_picture(picture, DEMO.data, summaries, folders, verdict)
    chance = " ".join(findings(summaries["dMoE"]))
    table = _cells(summaries)
    write_page(report, picture, table, TERMS, verdict, chance, LIMITS, folders)
    console.print(_table(table))
    console.print(f"\n{TERMS}", markup=False)
    console.print(f"\n[bold]What this shows.[/] {verdict.sentences}")
    console.print(
        f"\n[bold]How much of it is chance.[/] These sentences are about dMoE. {chance}"
        f"\n\n[bold]What it does not show.[/] {LIMITS}\n"
    )
    for name, path in {"report": report, "picture": picture}.items():
        console.print(f"{name + ':':<8} {path.resolve()}", soft_wrap=True, markup=False)
    return summaries


def _train_and_score(run: Recipe) -> _Done:
    """Trains and scores without printing. A training that was stopped goes on where it was."""
    print_anything()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(run, resume=(run.out / "recipe.json").exists())
    summary = evaluate_run(EvaluateRun(run.out))
    return _Done(summary, printed.getvalue().strip().splitlines()[-1])


def _rows(done: Mapping[tuple[int, str], _Done]) -> list[Row]:
    """Makes a row for each training, and one more for dMoE with shuffled attributes."""
    rows = []
    for (seed, method), result in done.items():
        for attributes in (AS_GIVEN, "shuffled") if method == "dMoE" else (AS_GIVEN,):
            dice = dice_of(region_of(result.summary, attributes))
            capability = torch.backends.cpu.get_cpu_capability()
            rows.append(Row(seed, capability, method, attributes, dice))
    return rows


def _cells(summaries: Mapping[str, Summary]) -> list[list[str]]:
    """Makes the table that terminal and page show: the header, then a row for each method."""
    groups = region_of(summaries["dMoE"]).groups
    header = ["", *(f"{group.value} ({group.n} slices)" for group in groups)]
    lines = [[*header, "overall", "worst group", "ES-Dice"]]
    regions = {name: region_of(summary) for name, summary in summaries.items()}
    regions["dMoE, shuffled attributes"] = region_of(summaries["dMoE"], "shuffled")
    for name, region in regions.items():
        dice = [group.metrics["dice"] for group in region.groups]
        estimates = [*dice, region.overall["dice"], region.worst, region.es_dice]
        lines.append([name, *(f"{estimate.value:.3f}" for estimate in estimates)])
    return lines


def _table(cells: Sequence[Sequence[str]]) -> Table:
    table = Table(title="Dice on the held-out slices")
    for place, title in enumerate(cells[0]):
        table.add_column(title, justify="right" if place else "left")
    for line in cells[1:]:
        table.add_row(*line)
    return table
