"""Tells on the screen how many of the study's jobs are done, and how long the rest will take."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .jobs import Trial

_LINE_EVERY = 20.0  # seconds between lines, where there is no terminal


class JobProgress:
    """A bar on a terminal, lines elsewhere.

    Args:
        total: number of jobs.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done, self.new = total, 0, 0
        self.started = self.told = time.monotonic()
        self.console = Console(highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("jobs", total=total, left="?")

    def __enter__(self) -> JobProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def found(self) -> None:
        """Counts a job that was done before."""
        self.done += 1
        self.bar.update(self.task, completed=self.done)

    def trained(self, trial: Trial) -> None:
        """Counts a job that was done now."""
        self.done, self.new, now = self.done + 1, self.new + 1, time.monotonic()
        seconds = (now - self.started) / self.new * (self.total - self.done)
        left = str(timedelta(seconds=round(seconds)))
        self.bar.update(self.task, completed=self.done, left=left, description=trial.job.name)
        last = self.done == self.total
        if not self.console.is_terminal and (last or now - self.told > _LINE_EVERY):
            self.told = now
            self.console.print(
                f"{self.done} of {self.total} jobs, {left} left; {trial.job.name}: "
                f"validation Dice {trial.validation:.3f}",
                soft_wrap=True,
            )
