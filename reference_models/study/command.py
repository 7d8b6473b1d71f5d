"""The command `study`: checks what it is asked for, runs it, and writes what came of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ..data import open_dataset
from ..data.phantom import Rule
from ..errors import RunError
from ..files import require_replaceable, write_results
from ..recipes.recipe import resolve
from ..recipes.serial import to_json
from .cost import step_milliseconds
from .figures import FOLDER, write_figures
from .methods import METHODS
from .page import PAGE, write_page
from .plan import GRID, Plan
from .results import write_tables
from .runner import run_plan
from .scenes import FULL, QUICK, SCENES, SHARES, Design
from .tables import CONTENTS as OF_TABLES
from .trial import seconds_of

# A results folder holds tables, figures, and a page of both.
CONTENTS = (*OF_TABLES, FOLDER, PAGE)

# Nothing was tried on these before: merged experts were found, and all else chosen, on 0 to 3.
_SEEDS = (10, 11, 12, 13, 14)
_QUICK_SEEDS = _SEEDS[:2]


@dataclass(frozen=True)
class StudySettings:
    """Finds out when an attribute-aware router helps: trains every method in every scene."""

    quick: bool = False
    """Make a smoke run of some minutes: the same jobs
    with very little training and two seeds. Its
    numbers mean nothing."""
    out: Path | None = None
    """Folder of the jobs. Jobs that are done there are
    not run again. By default study_output, or
    study_output/quick with --quick."""
    results: Path | None = None
    """Folder of tables and figures. By default `results` in the folder of the jobs."""
    seeds: tuple[int, ...] | None = None
    """Seeds of the data and of the initial weights.
    Learning rates are chosen on the first seed. By
    default 10 to 14, or 10 and 11 with --quick."""
    scenes: tuple[str, ...] = tuple(SCENES)
    """Names of the scenes to train in. By default all of them."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of the methods to train. By default all of
    them. Some methods take the learning rate of
    another method, which is then trained as well."""
    shares: tuple[float, ...] = SHARES
    """Share of the phantom's training cases that each
    attribute value has. There are as many values as
    shares."""
    rule: Rule = "margin"
    """How the phantom's attribute changes the outline:
    by how far out it runs (margin), or by which half
    of the lesion it covers (direction)."""
    processes: int = 2
    """Number of jobs that run at the same time, each of them on one core."""

    @property
    def folder(self) -> Path:
        return self.out or Path("study_output") / ("quick" if self.quick else "")


def study(settings: StudySettings) -> Path:
    """Runs the jobs that are not done yet, writes all tables and figures, and returns their folder.

    Raises:
        RunError, DataError: what is asked for does not hold together, before anything is run; or as
            of `run_plan`.
    """
    torch.set_num_threads(1)
    plan, design = _plan(settings), _design(settings)
    folder = settings.folder
    results = settings.results or folder / "results"
    require_replaceable(results, CONTENTS)
    population = _population(plan, design, folder)
    outcome = run_plan(plan, design, folder, processes=settings.processes)
    firsts = {trial.job.method: trial.job for trial in outcome.main[::-1]}
    milliseconds = step_milliseconds(
        {method: design.recipe(job, folder) for method, job in firsts.items()}
    )
    shown = {
        "quick": settings.quick,
        **to_json(plan),
        **to_json(design),
        "processes": settings.processes,
    }
    trials = (*outcome.tuning, *outcome.main, *outcome.spread)

    def write(target: Path) -> None:
        write_tables(
            target,
            tuning=outcome.tuning,
            main=outcome.main,
            spread=outcome.spread,
            population=population,
            milliseconds=milliseconds,
            settings=shown,
            seconds=seconds_of({trial.job for trial in trials}, folder),
        )
        write_figures(target)
        write_page(target)

    write_results(results, write, CONTENTS)
    console = Console(highlight=False, soft_wrap=True)
    if settings.quick:
        console.print("This was a smoke run: its numbers mean nothing.")
    console.print(f"results: {results / PAGE}", markup=False)
    return results


def _population(plan: Plan, design: Design, folder: Path) -> dict[str, tuple[float, ...]]:
    """Gives, by scene, each group's share of the population that its data set stands for.

    Raises:
        RunError, DataError: the recipe of a job does not hold together, or its data cannot be made.
    """
    population = {}
    for scene in plan.scenes:
        for method in plan.methods_of(scene):
            (job, *_) = plan.main(scene, method, GRID[0])
            recipe = resolve(design.recipe(job, folder))
        dataset = open_dataset(recipe.data)
        population[scene] = tuple(dataset.population[dataset.attributes[0].name])
    return population


def _plan(settings: StudySettings) -> Plan:
    seeds = settings.seeds or (_QUICK_SEEDS if settings.quick else _SEEDS)
    _require_names("scenes", settings.scenes, SCENES)
    _require_names("methods", settings.methods, METHODS)
    if len({*seeds}) < len(seeds) or min(seeds) < 0:
        raise RunError(f"seeds: got {seeds}, expected numbers of 0 or more, each once.")
    needed = {*settings.methods} | {METHODS[name].rate_of for name in settings.methods}
    plan = Plan(
        tuple(name for name in SCENES if name in settings.scenes),
        tuple(name for name in METHODS if name in needed),
        tuple(seeds),
    )
    if bare := [s for s in plan.scenes if not {*plan.methods_of(s)} & {*settings.methods}]:
        raise RunError(
            f"methods: got {', '.join(settings.methods)}, none of which is trained on the scene "
            f"{bare[0]}; name one that is, or leave that scene out."
        )
    return plan


def _design(settings: StudySettings) -> Design:
    if settings.processes < 1:
        raise RunError(f"processes: got {settings.processes}, expected 1 or more.")
    if len(settings.shares) < 2:
        raise RunError(f"shares: got {settings.shares}, expected two shares or more.")
    return Design(QUICK if settings.quick else FULL, settings.shares, settings.rule)


def _require_names(setting: str, names: Sequence[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names or len({*names}) < len(names):
        raise RunError(
            f"{setting}: got {', '.join(names) or 'none'}, expected some of {', '.join(known)}, "
            "each once."
        )
