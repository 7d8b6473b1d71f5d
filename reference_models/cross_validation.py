"""`cross-validate`: trains every fold, and scores each case by the fold that held it out.

    fold_0/, fold_1/ ...     a run for each fold, as `train --fold 0` and so on would write it
    splits_final.json        the folds, in nnU-Net's format
    evaluation-validation/   the report over all held-out cases

The same call goes on with runs that are there already.
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
    """Trains the folds one after another, and leaves folds that are trained already as they are.

    Args:
        recipe: as for `train`. The runs of the folds lie in the folder ``out``. If a call was
            stopped, the same call goes on.

    Returns:
        The folder of the report, and the scores.

    Raises:
        RunError: `train` would raise it for one of the folds, which is found before any fold is
            trained; or ``out`` was made with other settings or other folds.
        DataError: the data cannot be read, or they cannot be divided into folds.
    """
    if recipe.data.fold is not None:
        raise RunError(
            f"fold: got {recipe.data.fold}, but cross-validate trains all folds; leave --fold out, "
            "or use the command train."
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
        state = "is trained already" if done else "is continued" if begun else "begins"
        console.print(f"fold {fold} (0 to {len(runs) - 1}) {state}: {run.out}", markup=False)
        if not done:
            train(run, resume=begun)
    if not fabric.is_global_zero:
        raise SystemExit(0)  # only rank 0 scores
    report = EvaluateRun(recipe.out, split="validation", root=data.root, workers=recipe.workers)
    return report.folder, evaluate_run(report)


def _require_held_out_once(folds: Sequence[Splits]) -> None:
    """Raises if a case would be scored twice.

    Raises:
        DataError: several folds have the same case in their val.
    """
    times = Counter(case_id for fold in folds for case_id in fold.validation)
    if twice := [case_id for case_id, count in times.items() if count > 1]:
        raise DataError(
            f"folds: several folds hold out the same case ({shown(twice, 5)}), but the report over "
            f"all folds counts each case once; correct {FOLDS}, or use train and evaluate for each "
            "fold."
        )


def _require_trainable(
    out: Path, runs: Sequence[Recipe], folds: Sequence[Splits], dataset: Dataset
) -> None:
    """Raises, before anything is trained or written, unless every fold can be trained.

    Raises:
        RunError: the folder holds a run, or a fold that was trained with other settings or cases;
            or a fold cannot be trained with these settings.
    """
    if (out / "recipe.json").exists():
        raise RunError(
            f"{out}: this folder holds a single run, expected a folder for folds; choose another "
            "--out."
        )
    for run, fold in zip(runs, folds, strict=True):
        if (run.out / "recipe.json").exists():
            require_same_run(run.out, run, Task.of(dataset))
            if read_splits(run.out / "splits.json", dataset, needed=()) != fold:
                raise RunError(
                    f"{run.out}: this run was trained on other cases than the fold has now; choose "
                    "another --out, or restore the cases and the folds that it was trained on."
                )
        Cohort.of(run, dataset, resume=False)
