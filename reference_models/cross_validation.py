"""`cross-validate`: trains a recipe's folds, and scores each case by the fold that held it out.

    fold_0/, fold_1/ ...     runs, each as `train --fold 0` and so on would make it
    splits_final.json        the folds, in nnU-Net's format
    evaluation-validation/   the report over all held-out cases

What is there already is gone on with.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .data import open_dataset
from .data.cases import Dataset
from .data.splits import FOLDS, Splits, choose_folds, read_splits, write_folds
from .errors import DataError, RunError, shown
from .evaluation.evaluate import EvaluateRun, evaluate_run
from .metrics.scores import Summary
from .recipes.recipe import Recipe, resolve, resolve_grid
from .training.cohort import Cohort
from .training.loop import train
from .training.parallel import launch
from .training.runs import Task, fold_folder, require_same_run
from .training.state import is_finished


def cross_validate(recipe: Recipe) -> tuple[Path, Summary]:
    """Trains the folds one after another; those that are trained already are left as they are.

    Args:
        recipe: as of `train`; the folds' runs lie in the folder ``out``. Killed, it goes on by the
            same call.

    Returns:
        The folder of the report, and what it says.

    Raises:
        RunError: as of `train`, of any fold and before one is trained; or ``out`` was made with
            other settings or other folds.
        DataError: the data cannot be read, or there are no folds of them.
    """
    if recipe.data.fold is not None:
        raise RunError(
            f"fold: got {recipe.data.fold}, but all of them are trained here; leave it out, or "
            "take train."
        )
    dataset = open_dataset(recipe.data)
    resolved = resolve_grid(resolve(recipe), dataset.spacing, dataset.size)
    data = recipe.data
    folds = choose_folds(dataset, data.splits, data.split_seed, data.folds)
    _require_held_out_once(folds)
    runs = [
        dataclasses.replace(
            resolved, data=dataclasses.replace(data, fold=fold), out=fold_folder(recipe.out, fold)
        )
        for fold in range(len(folds))
    ]
    _require_trainable(recipe.out, runs, folds, dataset)
    fabric = launch(resolved)
    if fabric.is_global_zero:
        recipe.out.mkdir(parents=True, exist_ok=True)
        write_folds(recipe.out / FOLDS, folds)
    console = Console(quiet=not fabric.is_global_zero, soft_wrap=True, highlight=False)
    for fold, run in enumerate(runs):
        begun = (run.out / "recipe.json").exists()
        done = begun and is_finished(run.out)
        state = "is trained already" if done else "goes on" if begun else "begins"
        console.print(f"fold {fold} (0 to {len(runs) - 1}) {state}: {run.out}", markup=False)
        if not done:
            train(run, resume=begun)
    if not fabric.is_global_zero:
        raise SystemExit(0)  # rank 0 scores
    report = EvaluateRun(recipe.out, split="validation", root=data.root, workers=recipe.workers)
    return report.folder, evaluate_run(report)


def _require_held_out_once(folds: Sequence[Splits]) -> None:
    """Raises where a case would be scored twice.

    Raises:
        DataError: some case is in the val of several folds.
    """
    times = Counter(case_id for fold in folds for case_id in fold.validation)
    if twice := [case_id for case_id, count in times.items() if count > 1]:
        raise DataError(
            f"folds: {shown(twice, 5)}: held out by several folds, and a report over all folds "
            f"counts each case once; correct {FOLDS}, or take train and evaluate for each fold"
        )


def _require_trainable(
    out: Path, runs: Sequence[Recipe], folds: Sequence[Splits], dataset: Dataset
) -> None:
    """Raises, before anything is trained or written, unless all folds can be, or have been so.

    Raises:
        RunError: the folder holds a run, or a fold of other settings or cases; or a fold cannot be
            trained with these settings.
    """
    if (out / "recipe.json").exists():
        raise RunError(f"{out}: holds a run, expected a folder for folds; choose another --out.")
    for run, fold in zip(runs, folds, strict=True):
        if (run.out / "recipe.json").exists():
            require_same_run(run.out, run, Task.of(dataset))
            if read_splits(run.out / "splits.json", dataset, needed=()) != fold:
                raise RunError(
                    f"{run.out}: was trained on other cases than this fold has now; choose another "
                    "--out, or put back the cases and folds that there were."
                )
        Cohort.of(run, dataset, resume=False)
