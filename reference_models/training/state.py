"""Where a run is: its weights, optimizer and position, to the disk and back on every strategy."""

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

# By parameters' names and in full, also where ranks hold a part each; on rank 0's CPU.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Position:
    """How far a run has come; with weights, optimizer and groups' weights, all of its state.

    Args:
        epoch: epochs finished.
        batch: batches of the epoch now begun that were trained on.
        step: of all.
        best, best_score, best_epoch: the best checkpoint's name ("" before the first), its
            validation score and after how many epochs it came.
        sums: of the losses over the epoch's batches so far.
        history: the finished epochs' rows.
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
    """Whether a run's training has come to its end.

    Raises:
        RunError: there is no run, or its last checkpoint is damaged.
    """
    recipe, _ = read_run(run)
    stored = checkpoints.load_last(run)
    return stored is not None and Position(**stored[1]["position"]).finished(recipe)


@dataclass
class State:
    """All that a run has at a step; random numbers are none of it, see `training`.

    Args:
        folder: the run's.
        fabric: whose ranks hold it.
        network: not wrapped.
        optimizer: not wrapped.
        objective: has the groups' weights.
        position: how far the run has come.
    """

    folder: Path
    fabric: Fabric
    network: nn.Module
    optimizer: torch.optim.Optimizer
    objective: nn.Module
    position: Position = field(default_factory=Position)

    def save(self, *, best: bool = False) -> None:
        """Makes this the last checkpoint, and the best one first if it is; all ranks call it."""
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
            ) as error:  # each for a full disk
                raise RunError(
                    f"{self.folder}: the checkpoint of step {self.position.step} cannot be written "
                    f"({error}). The one before is still there; make room, or close what has a "
                    "file open, and go on by --resume."
                ) from error

        on_rank_0(self.fabric, write)

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Goes back to what `save` wrote; all ranks call it.

        Raises:
            RunError: weights or state are another network's, or no run's.
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
                f"{self.folder}: its last checkpoint is not this run's ({type(error).__name__}: "
                f"{error}); put back what was there, or remove its folder to start over."
            ) from error
        if self.fabric.is_global_zero:
            self._tidy()

    def _tidy(self) -> None:
        """Leaves in the folder what belongs to this position, nothing older or later."""
        checkpoints.tidy(self.folder, self.position.step, self.position.best)
        rows = self.position.history

        def write(target: Path) -> None:
            with target.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, fieldnames=list(rows[0]))
                table.writeheader()
                table.writerows(rows)

        if rows:
            write_whole(self.folder / "history.csv", write)
