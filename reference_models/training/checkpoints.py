"""Writes, reads and removes checkpoints, which are complete or absent.

The folder of a run holds

    recipe.json       the resolved recipe and the task; a folder with this file is a run
    splits.json       the cases for training, validation and test
    last-00000120/    the weights (model.safetensors) and the state (state.pt) to resume from
    best-00000100/    the weights with the best validation score so far
    history.csv       a row for each epoch
    tensorboard/      TensorBoard's files

The numbers are those of steps. A checkpoint is written to a hidden folder, which is renamed once it
is on the disk. Only then is the previous checkpoint removed, so that there is always a complete
one.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import RunError
from ..files import write_folder
from ..recipes.recipe import Recipe
from .runs import Task, build_model, read_run

Which = Literal["best", "last"]
WEIGHTS, STATE = "model.safetensors", "state.pt"


def name_of(which: Which, step: int) -> str:
    """Gives the name of a checkpoint's folder; names are sorted as steps are."""
    return f"{which}-{step:08d}"


def save_last(run: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes the checkpoint to resume from; `tidy` removes the previous one."""

    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS)
        torch.save(state, folder / STATE)

    write_folder(run / name_of("last", step), write, (WEIGHTS, STATE))


def save_best(run: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Writes the weights that scored best; `tidy` removes earlier ones."""

    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS)

    write_folder(run / name_of("best", step), write, (WEIGHTS,))


def tidy(run: Path, step: int, best: str) -> None:
    """Removes all checkpoints except the last, of `step`, and the best, and unfinished files.

    Call it once the last checkpoint names `best`: a run that is resumed before may need an older
    one.
    """
    for old in [*run.glob("last-*"), *run.glob("best-*")]:
        if old.name not in (name_of("last", step), best):
            discard(old)
    for left in [*run.glob(".best-*"), *run.glob(".last-*")]:
        shutil.rmtree(left)
    for name in ("history.csv", "splits.json", "recipe.json"):
        for left in run.glob(f".{name}.*"):
            left.unlink()


def load_last(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Reads the weights and the state to resume from, on the CPU; None if there is no checkpoint.

    Raises:
        RunError: a file is damaged.
    """
    folder = _newest(run, "last")
    if folder is None:
        return None
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise RunError(
            f"{path}: this file is damaged or is not the state of a run ({type(error).__name__}); "
            f"remove {folder} to start over."
        ) from error
    return _read_weights(folder / WEIGHTS), state


def load_model(
    run: Path, which: Which = "best", *, refuse_unknown: bool = True
) -> tuple[Recipe, Task, nn.Module]:
    """Loads a trained network in eval mode on the CPU, with its recipe and task, without its data.

    Args:
        run: the folder of the run.
        which: the checkpoint.
        refuse_unknown: if False, a network that was trained with unknown="error" averages over an
            attribute's values when it receives an unknown one, so that an evaluation can try that.
            The returned recipe is the one that was trained.

    Raises:
        RunError: there is no run or no such checkpoint, or a file is damaged or of another network.
    """
    recipe, task = read_run(run)
    folder = _newest(run, which)
    if folder is None:
        other = "last" if which == "best" else "best"
        hint = f"; use --which {other}" if _newest(run, other) else ""  # type: ignore[arg-type]
        raise RunError(f"{run}: this run has no {which} checkpoint yet{hint}.")
    built = recipe
    if recipe.model.unknown == "error" and not refuse_unknown:  # the parameters are the same
        settings = dataclasses.replace(recipe.model, unknown="average")
        built = dataclasses.replace(recipe, model=settings)
    model = build_model(built, task)
    load_weights(model, _read_weights(folder / WEIGHTS), folder)
    return recipe, task, model.eval()


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    """Copies weights into all parameters and buffers of a network.

    Args:
        model: the network.
        weights: the weights by name.
        origin: the folder that they were read from, for errors.

    Raises:
        RunError: names or shapes differ.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{origin}: these weights are of another network. {error}") from error


def discard(folder: Path) -> None:
    """Removes a folder; it is renamed first, so that nobody sees half of it."""
    hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.replace(folder, hidden / folder.name)
    shutil.rmtree(hidden)


def _newest(run: Path, which: Which) -> Path | None:
    return max(run.glob(f"{which}-*"), default=None)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path}: this file is damaged or is not a safetensors file ({error})."
        ) from error
