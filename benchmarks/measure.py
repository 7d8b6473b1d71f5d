"""Time, and the machine's own limits."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Layer, Problem

# Larger than any GPU's L2 cache: written before each timed step, so that none starts warm.
_FLUSH_BYTES = 256 * 2**20


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


@dataclass(frozen=True)
class Roofline:
    """What the machine reached here: FLOP/s of a large matrix product, bytes/s of a large copy."""

    flops: float
    bytes: float

    def seconds(self, flops: float, n_bytes: float) -> float:
        """The least time: all of one, the other meanwhile.

        >>> Roofline(flops=10.0, bytes=100.0).seconds(20, 300)
        3.0
        """
        return max(flops / self.flops, n_bytes / self.bytes)


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
    tasks: dict[str, Callable[[], list[float]]], rounds: int, seed: int = 0
) -> dict[str, list[list[float]]]:
    """Runs every task once a round, in a new order each time; tasks come warmed up.

    So that whatever else the machine does meets all tasks alike.
    """
    order = random.Random(seed)
    laps: dict[str, list[list[float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name in order.sample(list(tasks), len(tasks)):
            laps[name].append(tasks[name]())
    return laps


def step_laps(watch: Stopwatch, layer: Layer, problem: Problem) -> list[float]:
    """Seconds of a training step's forward, and of its forward and backward."""
    x_BTD, outputs = fresh_input(layer, problem), []
    return watch.laps(
        lambda: outputs.append(layer(x_BTD, problem.attributes_B)),
        lambda: outputs[0].backward(problem.dy_BTD),
    )


def measure_roofline(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Roofline:
    """The best of a few large matrix products in ``dtype``, and of a few large copies."""
    watch, cuda = Stopwatch(device), device.type == "cuda"
    n, copied = (8192, 2**30) if cuda else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product, copy = (
        min(watch.laps(step)[0] for _ in range(repeats + 1))
        for step in (lambda: a @ b, lambda: target.copy_(source))
    )
    return Roofline(2 * n**3 / product, 2 * copied / copy)


def fresh_input(layer: Layer, problem: Problem) -> Tensor:
    """x without a gradient; nor have the parameters."""
    layer.zero_grad(set_to_none=True)
    return problem.x_BTD.detach().requires_grad_()
