"""Trains a small U-Net on real MRI in four ways, and shows what each outlines for every group.

All four are the `demo` preset with another MLP in the network's stages: the same batches in the
same order, optimizer, learning rate, number of steps and, but for what chooses experts and reads
the attribute, the same multiply-adds.
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
# By the name that is shown, what is changed of the preset's network: those that are told the
# attribute last.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"block": "mlp"},
    "plain MoE": {"aware": False},
    "FiLM": {"block": "film"},
    "dMoE": {},
}

LIMITS = (
    "This is one averaged, left-right symmetric head, an attribute made up for the purpose, "
    "settings chosen with these slices in sight, and intervals over neighbouring slices of that "
    "head: nothing here speaks of fairness in a clinic. And different loads of the experts prove "
    "no specialisation, since loads differ even where an attribute means nothing; the shuffled "
    "attributes are the test of that."
)


@dataclass(frozen=True)
class DemoSettings:
    """Dense, plain MoE, FiLM and dMoE on the MNI152 brain."""

    out: Path = Path("demo_output")
    """Folder of the runs, the picture and the report; runs that are there already are not trained
    again."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of initial weights, order, augmentation and routing noise. Picture and report show the
    first; scores.csv has all of them."""
    epochs: int | None = None
    """Number of epochs; by default the preset's."""
    processes: int = min(len(METHODS), os.cpu_count() or 1)
    """Number of trainings at a time, each on a core of its own."""


@dataclass(frozen=True)
class _Done:
    """A training that was scored: its summary, and the last line that it printed."""

    summary: Summary
    line: str


def demo(settings: DemoSettings) -> dict[str, Summary]:
    """Trains and evaluates all, and says what the scores say, whichever way they fell.

    Returns:
        By method, the scores of the first seed.

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
    write_page(report, picture, table, verdict, chance, LIMITS, folders)
    console.print(_table(table))
    console.print(f"\n[bold]What this shows.[/] {verdict.sentences}")
    console.print(
        f"\n[bold]Chance.[/] dMoE: {chance}\n\n[bold]What it does not show.[/] {LIMITS}\n"
    )
    for name, path in {"report": report, "picture": picture}.items():
        console.print(f"{name + ':':<8} {path.resolve()}", soft_wrap=True, markup=False)
    return summaries


def _train_and_score(run: Recipe) -> _Done:
    """In a process of its own, silently. A training that was stopped goes on where it was."""
    print_anything()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(run, resume=(run.out / "recipe.json").exists())
    summary = evaluate_run(EvaluateRun(run.out))
    return _Done(summary, printed.getvalue().strip().splitlines()[-1])


def _rows(done: Mapping[tuple[int, str], _Done]) -> list[Row]:
    """A row a training, and one more for dMoE told shuffled attributes."""
    rows = []
    for (seed, method), result in done.items():
        for told in (AS_GIVEN, "shuffled") if method == "dMoE" else (AS_GIVEN,):
            dice = dice_of(region_of(result.summary, told))
            capability = torch.backends.cpu.get_cpu_capability()
            rows.append(Row(seed, capability, method, told, dice))
    return rows


def _cells(summaries: Mapping[str, Summary]) -> list[list[str]]:
    """The table that terminal and page show, its header first: a row a method."""
    groups = region_of(summaries["dMoE"]).groups
    header = ["", *(f"{group.value} (n={group.n})" for group in groups)]
    lines = [[*header, "overall", "worst group", "ES-Dice"]]
    regions = {name: region_of(summary) for name, summary in summaries.items()}
    regions["dMoE, shuffled"] = region_of(summaries["dMoE"], "shuffled")
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
