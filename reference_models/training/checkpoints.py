"""Checkpoints that are whole or absent: written, read, and let go of.

A run's folder holds

    recipe.json       the resolved recipe and what the data make of the network; it makes it a run
    splits.json       who is trained, validated and tested on
    last-00000120/    weights (model.safetensors) and all else that going on needs (state.pt)
    best-00000100/    weights with the best validation score so far
    history.csv       a row an epoch
    tensorboard/

The number is that of the step. A checkpoint is prepared in a hidden folder and renamed when it is
on the disk; the one before it goes only then, so that at any moment a whole one is there.
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
    """The name of a checkpoint's folder; names sort as steps do."""
    return f"{which}-{step:08d}"


def save_last(run: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes what going on needs; the checkpoint before stays until `tidy`."""

    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS)
        torch.save(state, folder / STATE)

    write_folder(run / name_of("last", step), write, (WEIGHTS, STATE))


def save_best(run: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Writes weights that scored best; older ones stay until `tidy`."""

    def write(folder: Path) -> None:
        save_file(weights, folder / WEIGHTS)

    write_folder(run / name_of("best", step), write, (WEIGHTS,))


def tidy(run: Path, step: int, best: str) -> None:
    """Removes all checkpoints but the last, of `step`, and the best, and what is half written.

    To be called when the last checkpoint names `best`: until then a resumed run may need an older.
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
    """Weights and state to go on from, on the CPU; None where no checkpoint was reached.

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
            f"{path}: damaged or not a run's state ({type(error).__name__}); remove {folder} to "
            "start over."
        ) from error
    return _read_weights(folder / WEIGHTS), state


def load_model(
    run: Path, which: Which = "best", *, refuse_unknown: bool = True
) -> tuple[Recipe, Task, nn.Module]:
    """A trained network in eval mode on the CPU, with its recipe and task; needs no data.

    Args:
        run: its folder.
        which: of its checkpoints.
        refuse_unknown: no: a network that was trained with unknown="error" takes the average over
            an attribute's values where it is told an unknown one, so that an evaluation can tell
            it so. The recipe stays as it was trained.

    Raises:
        RunError: there is no run or no such checkpoint, or a file is damaged or of another network.
    """
    recipe, task = read_run(run)
    folder = _newest(run, which)
    if folder is None:
        other = "last" if which == "best" else "best"
        hint = f"; there is a {other} one" if _newest(run, other) else ""  # type: ignore[arg-type]
        raise RunError(f"{run}: has no {which} checkpoint yet{hint}.")
    built = recipe
    if recipe.model.unknown == "error" and not refuse_unknown:  # which have the same parameters
        settings = dataclasses.replace(recipe.model, unknown="average")
        built = dataclasses.replace(recipe, model=settings)
    model = build_model(built, task)
    load_weights(model, _read_weights(folder / WEIGHTS), folder)
    return recipe, task, model.eval()


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    """Copies weights into a network, every one of its parameters and buffers.

    Args:
        model: the network.
        weights: by name.
        origin: where they were read, for errors.

    Raises:
        RunError: names or shapes differ.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{origin}: weights of another network. {error}") from error


def discard(folder: Path) -> None:
    """Removes a folder, which is gone from sight before it is half gone."""
    hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.replace(folder, hidden / folder.name)
    shutil.rmtree(hidden)


def _newest(run: Path, which: Which) -> Path | None:
    return max(run.glob(f"{which}-*"), default=None)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: damaged or not a safetensors file ({error}).") from error
