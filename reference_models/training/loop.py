"""The training loop, for any data set and network here, in one or many processes.

    with routing(attributes) as r:
        logits = model(images)
    loss = objective(logits, masks, groups) + balance_weight · balance + z_weight · z

The noise and dropout of a step depend on (seed, step, rank), and the batches on (seed, epoch,
index). So a run that was stopped goes on exactly as it would have, without a saved random state.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from torch import Tensor, nn

from dmoe_layer import routing

from ..data import open_dataset
from ..data.cases import UNKNOWN
from ..data.datasets import unused_settings
from ..data.loading import Batch, eval_batches, train_batches
from ..errors import RunError
from ..models.inference import forward_with_attributes
from ..models.weights import load_pretrained
from ..recipes.recipe import Recipe, describe_grid, learning_rate, resolve, resolve_grid
from ..recipes.serial import flat, to_json
from . import checkpoints
from .cohort import Cohort
from .objectives import Objective
from .parallel import global_sum, launch, on_rank_0, setup
from .progress import Reporter
from .runs import Task, build_model, lock_run, require_new_run, require_same_run, write_run
from .state import State
from .validation import Validation, share_of, validate

# Steps of a whole training. The preset small, the shortest one, takes 532 on its own data.
FEW_STEPS, USUAL_STEPS = 100, 500


class NonFiniteLossError(RunError):
    """A loss is NaN or infinite; the text names the step and the cases."""


def train(recipe: Recipe, *, resume: bool = False) -> Path:
    """Trains by a recipe, and writes weights, history and TensorBoard's files to the run's folder.

    Args:
        recipe: the settings.
        resume: whether to go on with the run in ``recipe.out``. On a CPU the result is the same as
            if it had never stopped.

    Returns:
        The run's folder.

    Raises:
        RunError: settings contradict each other, the folder holds a run already (or, to resume,
            none or another one), or a loss is not finite.
        DataError: the data cannot be read.
    """
    recipe = resolve(recipe)
    fabric = launch(recipe)
    try:
        with ExitStack() as held:
            return Run(fabric, recipe, resume, held).train()
    except NonFiniteLossError:
        if fabric.global_rank:  # all ranks find it together, and rank 0 reports it
            raise SystemExit(1) from None
        raise


class Run:
    """A training under way.

    Args:
        fabric: what `launch` returned.
        recipe: the resolved recipe.
        resume: as for `train`.
        held: a stack that holds the lock of the run's folder until it is closed.

    Raises:
        RunError, DataError: as for `train`, before anything is written.
    """

    def __init__(self, fabric: Fabric, recipe: Recipe, resume: bool, held: ExitStack) -> None:
        self.fabric, self.folder, self.held = fabric, recipe.out, held
        self.dataset = open_dataset(recipe.data)
        self.recipe = recipe = resolve_grid(recipe, self.dataset.spacing, self.dataset.size)
        self.task = Task.of(self.dataset)
        on_rank_0(fabric, self._admit, resume)
        self.cohort = Cohort.of(recipe, self.dataset, resume=resume)
        self.frames = self.cohort.frames(self.cohort.train, training=True)
        self.steps_an_epoch = len(self.frames) // recipe.batch_size
        torch.manual_seed(recipe.seed)
        network = build_model(recipe, self.task)
        stored = checkpoints.load_last(self.folder)
        if stored is None and recipe.model.weights is not None:
            load_pretrained(network, recipe.model.weights)
        # Errors in the settings have been raised by now, and nothing has been written before.
        if not resume:
            on_rank_0(fabric, self._begin)
        self.model = setup(fabric, network)
        # Fabric's wrapper is used for steps only: when a state is loaded it holds the old groups.
        self.optimizer = _optimizer(recipe, network)
        self.stepper: Any = fabric.setup_optimizers(self.optimizer)
        self.objective = Objective(
            recipe.fairness,
            lambda_dice=recipe.lambda_dice,
            lambda_ce=recipe.lambda_ce,
            group_counts=self.cohort.group_counts(),
            rate=recipe.group_dro_rate,
            temperature=recipe.fair_dro_temperature,
            gamma=recipe.febs_gamma,
        ).to(fabric.device)
        self.state = State(self.folder, fabric, network, self.optimizer, self.objective)
        if stored is not None:
            self.state.restore(*stored)

    def train(self) -> Path:
        recipe, position = self.recipe, self.state.position
        cohort, fabric = self.cohort, self.fabric
        validation = cohort.frames(
            share_of(cohort.validation, fabric.global_rank, fabric.world_size)
        )
        batch_size = recipe.batch_size // self.fabric.world_size
        steps = int(recipe.epochs) * self.steps_an_epoch
        speaks = self.fabric.is_global_zero
        with Reporter(self.folder, speaks=speaks, step=position.step, steps=steps) as reporter:
            foreign = unused_settings(recipe.data.data)
            settings = (
                f"{name}={value}"
                for name, value in flat(to_json(recipe)).items()
                if not name.startswith(foreign)
            )
            reporter.say(textwrap.fill(" ".join(settings), 100))
            if grid := describe_grid(recipe):
                reporter.say(grid)
            for remark in cohort.remarks():
                reporter.say(remark)
            if 0 < steps < FEW_STEPS:
                more = math.ceil(USUAL_STEPS / self.steps_an_epoch)
                reporter.say(
                    f"this training has {steps} steps, which are few to learn from; --epochs "
                    f"{more} would give {more * self.steps_an_epoch}"
                )
            if position.step:
                reporter.say(f"resumed after epoch {position.epoch}, step {position.step}")
            if not recipe.epochs and not position.best:
                self.state.save(best=True)  # the weights as they are
            while not position.finished(recipe):
                self._epoch(reporter)
                scored = validate(
                    self.model,
                    eval_batches(validation, batch_size=batch_size, workers=recipe.workers),
                    self.dataset,
                    self.fabric.device,
                    windows=recipe.framing.windows(batch_size),
                    affine=validation.framing.affine,
                )
                reporter.flush()
                row = self._close_epoch(scored)
                reporter.epoch(position.step, row, scored, self.task.classes)
            score = f"validation Dice {position.best_score:.4f}, " if position.epoch else ""
            reporter.say(
                f"best: {score}epoch {position.best_epoch} of {position.epoch}: "
                f"{self.folder / position.best}"
            )
        self.fabric.barrier()
        return self.folder

    def _epoch(self, reporter: Reporter) -> None:
        recipe, position = self.recipe, self.state.position
        batches = train_batches(
            self.frames,
            batch_size=recipe.batch_size,
            epoch=position.epoch,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            first_batch=position.batch,
            workers=recipe.workers,
        )
        self.model.train()
        for batch in batches:
            rate = learning_rate(recipe, position.step, self.steps_an_epoch)
            losses = self.step(batch.to(self.fabric.device), rate)
            position.step += 1
            position.batch += 1
            for name, value in losses.items():
                position.sums[name] = position.sums.get(name, 0.0) + value
            reporter.step(position.step, position.epoch, losses, rate, recipe.batch_size)
            every = recipe.checkpoint_every
            if every and not position.step % every and position.batch < self.steps_an_epoch:
                reporter.flush()
                self.state.save()

    def step(self, batch: Batch, rate: float) -> dict[str, float]:
        """Does one update, and returns the losses over all ranks."""
        recipe = self.recipe
        torch.manual_seed(step_seed(recipe.seed, self.state.position.step, self.fabric.global_rank))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        attributes_BN = batch.attributes_BN
        if recipe.attribute_dropout:
            dropped_B1 = (
                torch.rand(len(attributes_BN), 1, device=attributes_BN.device)
                < recipe.attribute_dropout
            )
            attributes_BN = attributes_BN.masked_fill(dropped_B1, UNKNOWN)
        logits_BKS, r = forward_with_attributes(self.model, batch.inputs, attributes_BN)
        segmentation, loss_B = self.objective(
            logits_BKS.float(), batch.mask_BS, batch.attributes_BN[:, 0]
        )
        losses = {"segmentation": segmentation}
        loss = segmentation
        for name, weight, of_calls in (
            ("balance", recipe.balance_weight, balance_losses(r)[recipe.balance]),
            ("z", recipe.z_weight, r.router_z_loss),
        ):
            if weight and r.routings:
                losses[name] = global_sum(of_calls()) / self.fabric.world_size
                loss = loss + weight * losses[name]
        values = {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}
        if not math.isfinite(values["loss"]):
            self._refuse(values, batch, loss_B, rate)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.stepper.step()
        return values

    def _refuse(self, values: dict[str, float], batch: Batch, loss_B: Tensor, rate: float) -> None:
        finite = loss_B.isfinite().tolist()
        cases = [case for case, fine in zip(batch.case_ids, finite, strict=True) if not fine]
        if dist.is_initialized():
            shares: list[list[str]] = [[]] * self.fabric.world_size
            dist.all_gather_object(shares, cases)  # from this run's own processes
            cases = [case for share in shares for case in share]
        position, kept = self.state.position, max(self.folder.glob("last-*"), default=None)
        raise NonFiniteLossError(
            f"step {position.step + 1} (epoch {position.epoch + 1}), learning rate {rate:.3g}: "
            "the loss is not finite ("
            + ", ".join(f"{name} {value}" for name, value in values.items())
            + (
                f"). These cases have such a loss: {', '.join(cases)}. "
                if cases
                else "), although that of each case is. "
            )
            + (f"The last checkpoint is {kept}. " if kept else "There is no checkpoint yet. ")
            + "Look at the cases, lower --learning-rate, or compute with --precision 32."
        )

    def _close_epoch(self, scored: Validation) -> dict[str, float]:
        """Counts the epoch and writes a checkpoint, also as the best one if its score is the best.

        If no case is held out, no score can choose among epochs, and the last one is the best.
        """
        position = self.state.position
        rate = learning_rate(self.recipe, position.step - 1, self.steps_an_epoch)
        row = {"epoch": position.epoch + 1.0, "step": float(position.step), "learning_rate": rate}
        row |= {name: total / self.steps_an_epoch for name, total in position.sums.items()}
        row |= {"score": scored.score} | {f"dice {name}": d for name, d in scored.dice.items()}
        position.epoch, position.batch, position.sums = position.epoch + 1, 0, {}
        position.history.append(row)
        best = scored.score > position.best_score or not self.cohort.held_out
        if best:
            position.best_score, position.best_epoch = scored.score, position.epoch
        self.state.save(best=best)
        return row

    def _admit(self, resume: bool) -> None:
        if resume:
            require_same_run(self.folder, self.recipe, self.task)
            self.held.enter_context(lock_run(self.folder))
        else:
            require_new_run(self.folder)

    def _begin(self) -> None:
        self.held.enter_context(lock_run(self.folder))
        require_new_run(self.folder)  # another process may have come first
        write_run(self.folder, self.recipe, self.task, self.cohort.splits)


def balance_losses(scope: routing) -> dict[str, Callable[[], Tensor]]:
    """Gives the balance losses by the names of `Recipe.balance`."""
    return {
        "load": scope.load_balancing_loss,
        "within": functools.partial(scope.load_balancing_loss, per_attribute=True),
        "importance": scope.importance_loss,
    }


def step_seed(seed: int, step: int, rank: int) -> int:
    """Gives the seed, of 63 mixed bits, of the noise and dropout of a rank in a step."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def _optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=recipe.momentum, **options)
    return torch.optim.AdamW(network.parameters(), **options)
