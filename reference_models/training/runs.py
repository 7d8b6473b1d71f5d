"""The folder of a run: its recipe, the task that the data define, and its splits.

The folder of a cross-validation holds the runs of its folds, fold_0, fold_1 and so on, and a
splits_final.json in nnU-Net's format. That file distinguishes it from the folder of a run.
"""

from __future__ import annotations

import contextlib
import errno
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from ..data.cases import Attribute, Dataset
from ..data.splits import FOLDS, Splits, read_folds, write_splits
from ..errors import RunError
from ..files import write_whole
from ..recipes.recipe import Recipe
from ..recipes.serial import flat, from_json, to_json

# Settings that may differ when a run is resumed: where files lie and what computes.
_MAY_DIFFER = {
    "data.root",
    "data.cache",
    "out",
    "workers",
    "devices",
    "nodes",
    "strategy",
    "checkpoint_every",
}


@dataclass(frozen=True)
class Task:
    """What the data define of the network. It is saved with the run, so that the network can be
    built without the data.

    Args:
        channels: number of channels of an image.
        classes: the names of the labels, in their order.
        attributes: the attributes that the router receives, in their order.
        channel_names: the names of a folder's channels, which decide how intensities are scaled.
    """

    channels: int
    classes: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    channel_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Dataset) -> Task:
        return cls(
            dataset.channels,
            tuple(dataset.classes),
            tuple(dataset.attributes),
            tuple(dataset.channel_names),
        )

    def differences(self, other: Task) -> list[str]:
        """Lists the fields in which another task differs, with both values."""
        here, there = to_json(self), to_json(other)
        return [
            f"{name}: the run has {here[name]}, the data {there[name]}"
            for name in here
            if here[name] != there[name]
        ]


def build_model(recipe: Recipe, task: Task) -> nn.Module:
    """Makes the network of a recipe with newly initialised weights; it reads no trained weights.

    Raises:
        RunError: the network cannot be built with these settings.
    """
    return recipe.model.build(
        in_channels=task.channels,
        n_classes=len(task.classes),
        attribute_sizes=tuple(len(attribute.values) for attribute in task.attributes),
        shape=recipe.framing.shape,
    )


def fold_folder(folder: Path, fold: int) -> Path:
    """Gives the folder of a fold's run in the folder of a cross-validation."""
    return folder / f"fold_{fold}"


def runs_in(folder: Path) -> tuple[Path, ...]:
    """Lists the folders of a cross-validation's folds, trained or not; for a run, its own "
    "folder."""
    if (folder / "recipe.json").exists() or not (folder / FOLDS).exists():
        return (folder,)
    return tuple(fold_folder(folder, fold) for fold in range(len(read_folds(folder / FOLDS))))


def read_run(run: Path) -> tuple[Recipe, Task]:
    """Reads the recipe and the task of a run.

    Raises:
        RunError: the folder holds no run, or its recipe cannot be read.
    """
    path = run / "recipe.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recipe, task = content["recipe"], content["task"]
    except FileNotFoundError as error:
        folds = [folder for folder in runs_in(run) if folder != run]
        advice = f"; it holds folds, so name one of them, such as {folds[0]}" if folds else ""
        raise RunError(
            f"{run}: there is no run here, since there is no recipe.json{advice}."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: this file is not the recipe of a run ({type(error).__name__}: {error}); name "
            "the folder that the training wrote."
        ) from error
    return from_json(Recipe, recipe, f"{path}: recipe"), from_json(Task, task, f"{path}: task")


def require_new_run(run: Path) -> None:
    """Raises unless a new run can use the folder.

    Raises:
        RunError: the folder holds a run, or is a file.
    """
    if run.exists() and not run.is_dir():
        raise RunError(
            f"{run}: this is a file, expected a folder for the run; choose another --out."
        )
    if taken := [name for name in ("recipe.json", "history.csv") if (run / name).exists()]:
        raise RunError(
            f"{run}: this folder holds a run already ({taken[0]}); go on with it by --resume, or "
            "choose another --out."
        )


def lock_run(run: Path) -> AbstractContextManager[object]:
    """Locks a run's folder against other trainings until the `with` block ends.

    Two trainings in one folder would remove each other's checkpoints. The system releases the lock
    when the process ends, in whichever way. Workers that outlive a killed training do not hold the
    lock, since filelock closes it in forked processes.

    Raises:
        RunError: another training holds the lock, or the folder cannot be written to.
    """
    path = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        # A soft lock is a file, which would remain after a kill.
        return FileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout as error:
        raise RunError(
            f"{run}: another process is training in this folder; wait until it ends, or stop it."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise _unwritable(run, error) from error
        return contextlib.nullcontext()  # a file system without locks


def write_run(run: Path, recipe: Recipe, task: Task, splits: Splits) -> None:
    """Writes the files that make a folder a run; the recipe is written last.

    Raises:
        RunError: the folder cannot be made or written to.
    """
    text = json.dumps({"recipe": to_json(recipe), "task": to_json(task)}, indent=1) + "\n"

    def write(target: Path) -> None:
        target.write_text(text, encoding="utf-8")

    try:
        run.mkdir(parents=True, exist_ok=True)
        write_splits(run / "splits.json", splits)
        write_whole(run / "recipe.json", write)
    except OSError as error:
        raise _unwritable(run, error) from error


def _unwritable(run: Path, error: OSError) -> RunError:
    why = error.strerror or error
    return RunError(f"{run}: this folder cannot be written to ({why}); choose another --out.")


def require_same_run(run: Path, recipe: Recipe, task: Task) -> None:
    """Raises unless a run can be resumed with this recipe and these data.

    Raises:
        RunError: some settings differ; the text names them.
    """
    before, before_task = read_run(run)
    now = flat(to_json(recipe))
    # The network of another preset has other settings.
    differing = [
        f"{name}: the run has {old!r}, now {now.get(name, 'no such setting')!r}"
        for name, old in flat(to_json(before)).items()
        if old != now.get(name, "no such setting") and name not in _MAY_DIFFER
    ]
    if task != before_task:
        differing += before_task.differences(task)
    if differing:
        raise RunError(
            f"{run}: this run cannot be resumed with other settings; give the same settings as "
            "before, or choose another --out. " + "; ".join(differing)
        )
