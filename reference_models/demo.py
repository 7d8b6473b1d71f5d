"""Trains TransUNet on real MRI dense, as a plain MoE and as a dMoE, and compares the groups.

All three are the `small` recipe with another `moe` or without the attribute: the same batches in
the same order, optimizer, learning rate and number of steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .evaluation.conditions import AS_GIVEN
from .evaluation.evaluate import EvaluateRun, evaluate_run
from .metrics.scores import RegionScores, Summary
from .recipes.networks import TransUNetSettings
from .recipes.presets import PRESETS
from .recipes.recipe import Recipe
from .report.words import findings
from .terminal import print_anything
from .training.loop import train
from .workers import workers

SMALL = PRESETS["small"]
NETWORK = TransUNetSettings(variant="small")
MODELS: Mapping[str, TransUNetSettings] = {
    "dense": dataclasses.replace(NETWORK, moe="none"),
    "plain-moe": dataclasses.replace(NETWORK, aware=False),
    "dmoe": NETWORK,
}
# Of ES-Dice; what seeds alone make of it stands beside the demo's figures in the README.
CLEAR_GAIN = 0.05

LIMITS = (
    "[bold]What it does not show.[/] This is one averaged, left-right symmetric head, an attribute "
    "made up for the purpose, one seed, settings chosen with these slices in sight, and intervals "
    "over neighbouring slices of that head: nothing here speaks of fairness in a clinic. What pays "
    "is knowing the attribute; a simpler way to tell the model, such as FiLM, can be expected to "
    "do as well at this size. And different loads prove no specialisation, since loads differ even "
    "where an attribute means nothing; the shuffled attributes are the test of that."
)


@dataclass(frozen=True)
class DemoSettings:
    """Dense, plain MoE and dMoE on the MNI152 brain."""

    out: Path = Path("demo_output")
    """Folder of the three runs; runs that are there already are not trained again."""
    seed: int = 0
    """Seed of initial weights, order, augmentation and routing noise."""
    epochs: int | None = None
    """Number of epochs; by default the preset's."""


def demo(settings: DemoSettings) -> dict[str, Summary]:
    """Trains and evaluates the three, and says what the scores say, whichever way they fell."""
    console = Console()
    # One thread a model: two take five times as long as one when something else runs on their
    # cores, and one gives the same numbers on any number of cores.
    torch.set_num_threads(1)
    reports = {name: settings.out / name / "evaluation-test" / "report.html" for name in MODELS}
    console.print(f"report: {reports['dmoe']} (in a few minutes)", soft_wrap=True)
    runs = {
        name: dataclasses.replace(
            SMALL,
            model=model,
            out=settings.out / name,
            seed=settings.seed,
            epochs=SMALL.epochs if settings.epochs is None else settings.epochs,
        )
        for name, model in MODELS.items()
    }
    # All at once, since they differ in length: one after the other left a core idle.
    with workers(len(runs)) as pool:
        trainings = [pool.submit(_train, run, name == "dmoe") for name, run in runs.items()]
        for training in as_completed(trainings):
            training.result()  # the first error breaks off the others
    logs = "".join(training.result() for training in trainings)
    console.print(logs, soft_wrap=True, markup=False, highlight=False)
    summaries = {name: evaluate_run(EvaluateRun(run.out)) for name, run in runs.items()}
    console.print(_table(summaries))
    chance = " ".join(findings(summaries["dmoe"]))
    console.print(f"\n{_finding(summaries)}\n\n[bold]Chance.[/] dmoe: {chance}\n\n{LIMITS}\n")
    for name, report in reports.items():
        console.print(f"{name:<9} {report}", soft_wrap=True)
    return summaries


def _train(run: Recipe, aloud: bool) -> str:
    """In a process of its own; returns what is not to be printed yet. Goes on where it was."""
    print_anything()
    later = io.StringIO()
    with contextlib.nullcontext() if aloud else contextlib.redirect_stdout(later):
        train(run, resume=(run.out / "recipe.json").exists())
    return later.getvalue()


def _scores(summary: Summary, condition: str = AS_GIVEN) -> RegionScores:
    """The first region by the one attribute."""
    (scores,) = (c.scores for c in summary.conditions if c.name == condition)
    ((region, *_),) = scores.values()
    return region


def _table(summaries: Mapping[str, Summary]) -> Table:
    """A row a model: Dice of each protocol, overall, of the worst group, and ES-Dice."""
    table = Table(title="Dice on the held-out slices")
    table.add_column("")
    for group in _scores(summaries["dmoe"]).groups:
        table.add_column(f"{group.value}\nn={group.n}", justify="right")
    for title in ("overall", "worst\ngroup", "ES-Dice"):
        table.add_column(title, justify="right")
    rows = {name: _scores(summary) for name, summary in summaries.items()}
    rows["dmoe, shuffled"] = _scores(summaries["dmoe"], "shuffled")
    for name, region in rows.items():
        dice = [group.metrics["dice"] for group in region.groups]
        estimates = [*dice, region.overall["dice"], region.worst, region.es_dice]
        table.add_row(name, *(f"{estimate.value:.3f}" for estimate in estimates))
    (population,) = summaries["dmoe"].population.values()
    shares = "/".join(f"{100 * share:.0f}" for share in population)
    table.caption = f"overall: weighted {shares} %, as in training"
    return table


def _finding(summaries: Mapping[str, Summary]) -> str:
    """What the scores say."""
    score = {name: _scores(summary).es_dice.value or 0.0 for name, summary in summaries.items()}
    shuffled = _scores(summaries["dmoe"], "shuffled").es_dice.value or 0.0
    without = max(score["dense"], score["plain-moe"])
    verdict = (
        "So routing by an attribute pays where the right outline depends on it and the image does "
        "not show it; experts without the attribute are not enough, and the wrong attribute "
        "undoes the gain."
        if score["dmoe"] > without + CLEAR_GAIN and shuffled < without
        else "So this run shows no clear gain from the attribute; it may need more epochs."
    )
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in score.items())
    return (
        f"[bold]What this shows.[/] ES-Dice: {numbers}, dmoe told shuffled attributes "
        f"{shuffled:.3f}. {verdict}"
    )
