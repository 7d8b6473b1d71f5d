"""What makes a folder a run: its recipe, what the data make of the network, and its splits.

The folder of a cross-validation holds its folds' runs, fold_0, fold_1 and so on, and the folds in
nnU-Net's splits_final.json, by which it is known.
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

# What may differ between a run and its resumption: where things lie and what computes them.
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
    """What the data make of the network; saved with the run, so that it can be built without them.

    Args:
        channels: of an image.
        classes: names by label.
        attributes: that the router knows, in their order.
        channel_names: of a folder, whose intensities are scaled by them.
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
        """Says where another task differs: each of its settings with this one's and that one's."""
        here, there = to_json(self), to_json(other)
        return [
            f"{name}: the run has {here[name]}, the data {there[name]}"
            for name in here
            if here[name] != there[name]
        ]


def build_model(recipe: Recipe, task: Task) -> nn.Module:
    """The network of a recipe, newly initialised; pretrained weights are not read.

    Raises:
        RunError: the network cannot be built so.
    """
    return recipe.model.build(
        in_channels=task.channels,
        n_classes=len(task.classes),
        attribute_sizes=tuple(len(attribute.values) for attribute in task.attributes),
        shape=recipe.framing.shape,
    )


def fold_folder(folder: Path, fold: int) -> Path:
    """The folder of a fold's run in that of a cross-validation."""
    return folder / f"fold_{fold}"


def runs_in(folder: Path) -> tuple[Path, ...]:
    """The folders of the folds of a cross-validation, trained or not; of a run its own."""
    if (folder / "recipe.json").exists() or not (folder / FOLDS).exists():
        return (folder,)
    return tuple(fold_folder(folder, fold) for fold in range(len(read_folds(folder / FOLDS))))


def read_run(run: Path) -> tuple[Recipe, Task]:
    """The recipe and the task that a run's folder was made with.

    Raises:
        RunError: there is no run, or its recipe cannot be read.
    """
    path = run / "recipe.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recipe, task = content["recipe"], content["task"]
    except FileNotFoundError as error:
        folds = [folder for folder in runs_in(run) if folder != run]
        advice = f"; it has folds, so name one of them, such as {folds[0]}" if folds else ""
        raise RunError(f"{run}: no run here, since there is no recipe.json{advice}.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: not a run's recipe ({type(error).__name__}: {error}); name the folder that "
            "training wrote."
        ) from error
    return from_json(Recipe, recipe, f"{path}: recipe"), from_json(Task, task, f"{path}: task")


def require_new_run(run: Path) -> None:
    """Raises unless a folder is free for a new run.

    Raises:
        RunError: it holds a run, or is no folder.
    """
    if run.exists() and not run.is_dir():
        raise RunError(f"{run}: is a file, expected a folder for the run; choose another --out.")
    if taken := [name for name in ("recipe.json", "history.csv") if (run / name).exists()]:
        raise RunError(
            f"{run}: holds a run already ({taken[0]}); go on with it by --resume, or choose "
            "another --out."
        )


def lock_run(run: Path) -> AbstractContextManager[object]:
    """Keeps every other training out of a run's folder from now on, until the `with` block ends.

    Two trainings in one folder would clear away each other's checkpoints. The system lets go of
    the lock when the process ends, however it does. Workers that outlive a killed training do not
    keep it: filelock closes what a fork has inherited of it.

    Raises:
        RunError: another training holds it, or the folder cannot be written to.
    """
    path = run / ".lock"
    try:
        run.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise _unwritable(run, error) from error
    try:
        # A soft lock is a file, which would stay after a kill.
        return FileLock(path, fallback_to_soft=False).acquire(blocking=False)
    except Timeout as error:
        raise RunError(
            f"{run}: another process is training in it; wait for its end, or stop it first."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise _unwritable(run, error) from error
        return contextlib.nullcontext()  # a file system without locks


def write_run(run: Path, recipe: Recipe, task: Task, splits: Splits) -> None:
    """Makes a folder a run; last of all its recipe is there.

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
    return RunError(f"{run}: cannot be written to ({why}); choose another --out.")


def require_same_run(run: Path, recipe: Recipe, task: Task) -> None:
    """Raises unless a run can go on by this recipe and these data.

    Raises:
        RunError: naming the settings that differ.
    """
    before, before_task = read_run(run)
    now = flat(to_json(recipe))
    # Another preset's network has other settings.
    differing = [
        f"{name}: the run has {old!r}, now {now.get(name, 'no such setting')!r}"
        for name, old in flat(to_json(before)).items()
        if old != now.get(name, "no such setting") and name not in _MAY_DIFFER
    ]
    if task != before_task:
        differing += before_task.differences(task)
    if differing:
        raise RunError(
            f"{run}: cannot be resumed with other settings; leave them as they were, or choose "
            "another --out. " + "; ".join(differing)
        )
