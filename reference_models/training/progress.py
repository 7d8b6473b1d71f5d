"""Reports the progress of a training: a bar or lines on the terminal, and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import matplotlib.figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from ..report.pictures import overlay
from .validation import Validation


class Reporter:
    """Reports the progress on rank 0; on other ranks its methods do nothing.

    Args:
        run: the run's folder; TensorBoard's files go to `tensorboard/` in it.
        speaks: whether this is rank 0.
        step: the step of the last checkpoint; TensorBoard's values of later steps are removed.
        steps: number of steps of the whole run.
    """

    def __init__(self, run: Path, *, speaks: bool, step: int, steps: int) -> None:
        self.speaks = speaks
        self.console = Console(quiet=not speaks, highlight=False)
        self.steps, self.first_step = steps, step
        self.started = time.monotonic()
        self.samples = 0
        self.writer = SummaryWriter(run / "tensorboard", purge_step=step + 1) if speaks else None
        # Only terminals show a moving bar; elsewhere each epoch prints a line.
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[rate]:.2e}"),
            TextColumn("{task.fields[speed]:.1f} samples/s"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not (speaks and self.console.is_terminal),
        )
        fields: dict[str, Any] = {"epoch": 1, "loss": float("nan"), "rate": 0.0, "speed": 0.0}
        self.task = self.bar.add_task("", total=steps, completed=step, **fields)

    def __enter__(self) -> Reporter:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def step(
        self, step: int, epoch: int, losses: Mapping[str, float], rate: float, samples: int
    ) -> None:
        """Reports a step: its losses, its learning rate and its number of samples."""
        self.samples += samples
        if self.writer is None:
            return
        for name, value in losses.items():
            self.writer.add_scalar(f"train/{name}", value, step)
        self.writer.add_scalar("train/learning_rate", rate, step)
        shown: dict[str, Any] = {
            "epoch": epoch + 1,
            "loss": losses["loss"],
            "rate": rate,
            "speed": self._speed(),
        }
        self.bar.update(self.task, completed=step, **shown)

    def flush(self) -> None:
        """Writes TensorBoard's values to disk before a checkpoint, since no resumed run adds "
        "them."""
        if self.writer is not None:
            self.writer.flush()

    def epoch(
        self, step: int, row: Mapping[str, float], validation: Validation, classes: tuple[str, ...]
    ) -> None:
        """Reports an epoch: a line, and TensorBoard's scores, loads and overlays."""
        if self.writer is None:
            return
        elapsed = time.monotonic() - self.started
        left = elapsed / max(step - self.first_step, 1) * (self.steps - step)
        groups = "  ".join(f"{name} {score:.3f}" for name, score in validation.dice.items())
        self.say(
            f"epoch {row['epoch']:.0f}  step {step}/{self.steps}  loss {row['loss']:.4f}  "
            f"lr {row['learning_rate']:.2e}  validation Dice {validation.score:.4f} ({groups})  "
            f"{self._speed():.1f} samples/s  {timedelta(seconds=round(left))} left"
        )
        self.writer.add_scalar("validation/score", validation.score, step)
        for name, dice in validation.dice.items():
            self.writer.add_scalar(f"validation/dice/{name}", dice, step)
        for name, load_AE in validation.load.items():
            self.writer.add_figure(f"load/{name}", _heat_map(load_AE), step)
        for picture in validation.examples:
            image = overlay(picture, classes)
            self.writer.add_image(f"overlay/{picture.case_id}", image, step, dataformats="HWC")
        self.writer.flush()

    def _speed(self) -> float:
        return self.samples / max(time.monotonic() - self.started, 1e-9)


def _heat_map(load_AE: Sequence[Sequence[float]]) -> matplotlib.figure.Figure:
    """Draws the shares of tokens: a row for each attribute value, a column for each expert."""
    figure = matplotlib.figure.Figure(figsize=(6, 1 + 0.4 * len(load_AE)), layout="constrained")
    axes = figure.add_subplot(xlabel="expert", ylabel="value")
    figure.colorbar(axes.imshow(load_AE, vmin=0, aspect="auto"), label="share of tokens")
    axes.set_yticks(range(len(load_AE)))
    return figure
