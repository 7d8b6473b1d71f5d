"""Times several steps, which take turns, on the device's own clock.

By hand, since ``torch.utils.benchmark`` and ``triton.testing`` time one step after the other: here
all take turns in a new order each round, with quartiles over the rounds, laps inside a step (its
forward, then its backward) and one code for CPUs and for GPUs, whose L2 cache is flushed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

# Larger than any GPU's L2 cache: written before each timed step, so that none starts warm.
_FLUSH_BYTES = 256 * 2**20
Name = TypeVar("Name")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles, in seconds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.5, high=2.5, rounds=3)
        """
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))


class Stopwatch:
    """Laps on the device's own clock: CUDA events on a GPU, a wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        flushed = _FLUSH_BYTES if self.cuda else 0
        self._scratch = torch.empty(flushed, dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Empties a GPU's L2 cache of what the last step left, and waits."""
        self._scratch.zero_()
        if self.cuda:
            torch.cuda.synchronize()

    def laps(self, *steps: Callable[[], object]) -> list[float]:
        """Seconds from the start to the end of each step."""
        if not self.cuda:
            start, ends = time.perf_counter(), []
            for step in steps:
                step()
                ends.append(time.perf_counter() - start)
            return ends
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        self.flush()
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            step()
            event.record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) / 1e3 for event in events[1:]]


def interleaved(
    tasks: Mapping[Name, Callable[[], list[float]]], rounds: int, seed: int = 0
) -> dict[Name, list[list[float]]]:
    """Runs every task once a round, in a new order each time; tasks come warmed up.

    So that whatever else the machine does meets all tasks alike.
    """
    order = random.Random(seed)
    laps: dict[Name, list[list[float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name in order.sample(list(tasks), len(tasks)):
            laps[name].append(tasks[name]())
    return laps


def rounds_that_fit(
    tasks: Mapping[Name, Callable[[], list[float]]], seconds: float, least: int, most: int
) -> int:
    """As many rounds as take about ``seconds``, by one that does not count; ``least`` to ``most``.

    A median of steps of a millisecond needs many rounds, steps of a second are the same every time.
    """
    once = sum(laps[-1] for (laps,) in interleaved(tasks, 1).values())
    return most if once * most <= seconds else max(least, int(seconds / once))
