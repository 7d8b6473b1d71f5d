"""The state of a run: its weights, optimizer and position, saved and restored on any strategy."""

from __future__ import annotations

import csv
import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..errors import DataError, RunError
from ..files import write_whole
from ..recipes.recipe import Recipe
from . import checkpoints
from .parallel import on_rank_0
from .runs import read_run

# States are complete and by parameters' names, also if each rank holds a part; on rank 0's CPU.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Position:
    """How far a run has come.

    Args:
        epoch: number of finished epochs.
        batch: number of batches done in the current epoch.
        step: number of steps done in all epochs.
        best, best_score, best_epoch: the best checkpoint's name ("" before the first one), its
            validation score, and the number of epochs before it.
        sums: sums of the losses over the batches of the current epoch.
        history: a row for each finished epoch.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: str = ""
    best_score: float = -math.inf
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def finished(self, recipe: Recipe) -> bool:
        patience = math.inf if recipe.patience is None else recipe.patience
        return self.epoch >= int(recipe.epochs) or self.epoch - self.best_epoch >= patience


def is_finished(run: Path) -> bool:
    """Finds whether the training of a run is finished.

    Raises:
        RunError: there is no run, or its last checkpoint is damaged.
    """
    recipe, _ = read_run(run)
    stored = checkpoints.load_last(run)
    return stored is not None and Position(**stored[1]["position"]).finished(recipe)


@dataclass
class State:
    """The whole state of a run at a step. It has no random state; see `training.loop`.

    Args:
        folder: the run's folder.
        fabric: the Fabric of the run's processes.
        network: the network without wrappers.
        optimizer: the optimizer without wrappers.
        objective: the loss, which holds the groups' weights.
        position: how far the run has come.
    """

    folder: Path
    fabric: Fabric
    network: nn.Module
    optimizer: torch.optim.Optimizer
    objective: nn.Module
    position: Position = field(default_factory=Position)

    def save(self, *, best: bool = False) -> None:
        """Writes the last checkpoint and, before it, the best one if `best`; all ranks call it."""
        weights: dict[str, Any] = get_model_state_dict(self.network, options=_WHOLE)
        optimizer = get_optimizer_state_dict(self.network, self.optimizer, options=_WHOLE)
        if best:
            self.position.best = checkpoints.name_of("best", self.position.step)
        state = {
            "optimizer": optimizer,
            "objective": self.objective.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "position": dataclasses.asdict(self.position),
        }

        def write() -> None:
            try:
                if best:
                    checkpoints.save_best(self.folder, self.position.step, weights)
                checkpoints.save_last(self.folder, self.position.step, weights, state)
                self._tidy()
            except (
                OSError,
                DataError,
                RuntimeError,
                SafetensorError,
            ) as error:  # a full disk can raise any of these
                raise RunError(
                    f"{self.folder}: the checkpoint of step {self.position.step} cannot be written "
                    f"({error}). The previous checkpoint still exists; make room, or close "
                    "programs that have its files open, and go on by --resume."
                ) from error

        on_rank_0(self.fabric, write)

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restores what `save` wrote; all ranks call it.

        Raises:
            RunError: weights or state are of another network.
        """
        named: dict[str, Any] = dict(weights)
        try:
            set_model_state_dict(self.network, named, options=_WHOLE)
            set_optimizer_state_dict(
                self.network, self.optimizer, state["optimizer"], options=_WHOLE
            )
            self.objective.load_state_dict(state["objective"])
            self.fabric.strategy.precision.load_state_dict(state["precision"])
            self.position = Position(**state["position"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(
                f"{self.folder}: the last checkpoint does not belong to this run "
                f"({type(error).__name__}: {error}); restore the checkpoint, or remove its folder "
                "to start over."
            ) from error
        if self.fabric.is_global_zero:
            self._tidy()

    def _tidy(self) -> None:
        """Removes checkpoints and rows of the history that are older or later than this "
        "position."""
        checkpoints.tidy(self.folder, self.position.step, self.position.best)
        rows = self.position.history

        def write(target: Path) -> None:
            with target.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, fieldnames=list(rows[0]))
                table.writeheader()
                table.writerows(rows)

        if rows:
            write_whole(self.folder / "history.csv", write)
