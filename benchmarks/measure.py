"""Time, memory and the machine's own limits."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from .problem import Layer, Problem

# Larger than any GPU's L2 cache: written before each timed step, so that none starts warm.
_FLUSH_BYTES = 256 * 2**20
_MARK = "benchmarks: mark"


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

    def laps(self, *steps: Callable[[], object]) -> list[float]:
        """Seconds from the start to the end of each step."""
        if not self.cuda:
            start, ends = time.perf_counter(), []
            for step in steps:
                step()
                ends.append(time.perf_counter() - start)
            return ends
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        self._scratch.zero_()
        torch.cuda.synchronize()
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
    x_BTD, outputs = _fresh(layer, problem), []
    return watch.laps(
        lambda: outputs.append(layer(x_BTD, problem.attributes_B)),
        lambda: outputs[0].backward(problem.dy_BTD),
    )


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step, beyond x, y's gradient and the parameters.

    Attributes:
        forward_peak: at most, during forward; y included.
        peak: at most, during forward and backward; y and all gradients included.
        held: between the two, y excluded: what is kept for backward beside x.
        excess: ``peak`` less y, x's gradient and the parameters' gradients.
    """

    forward_peak: int
    peak: int
    held: int
    excess: int


def step_memory(layer: Layer, problem: Problem) -> StepMemory:
    """Memory of one training step. On a CPU, what its libraries take unseen is not in it."""
    x_BTD = _fresh(layer, problem)
    with Meter(problem.device) as meter:
        y_BTD = layer(x_BTD, problem.attributes_B)
        meter.mark()
        y_BTD.backward(problem.dy_BTD)
    (held, forward_peak), (_, peak) = meter.marks
    y_bytes = y_BTD.numel() * y_BTD.element_size()
    gradients = sum(p.numel() * p.element_size() for p in layer.parameters() if p.grad is not None)
    return StepMemory(
        forward_peak=forward_peak,
        peak=peak,
        held=held - y_bytes,
        excess=max(0, peak - 2 * y_bytes - gradients),
    )


class Meter:
    """Bytes allocated since the start of a ``with`` block, at each :meth:`mark` and at its end.

    ``marks`` holds pairs: what is live, and the most that was live until then. On a CPU they are
    read from the profiler's record of allocations, so that code runs slowly inside, and what was
    allocated before is not missed when it is released; on a GPU from the caching allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self.marks: list[tuple[int, int]] = []
        self.cuda = device.type == "cuda"

    def mark(self) -> None:
        """One more pair in ``marks``."""
        if self.cuda:
            torch.cuda.synchronize()
            now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            self.marks.append((now - self._start, most - self._start))
        else:
            with record_function(_MARK):
                pass

    def __enter__(self) -> Meter:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.mark()
        if self.cuda:
            return
        self._profile.__exit__(kind, error, trace)
        live = peak = 0
        for event in _events(self._profile):
            if event["name"] == _MARK:
                self.marks.append((live, peak))
            else:
                live += event["args"]["Bytes"]
                peak = max(peak, live)


def _events(profile: profile) -> list[dict[str, Any]]:
    """Allocations, releases (of negative size) and marks in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [event for event in events if event.get("name") in ("[memory]", _MARK)]
    return sorted(events, key=lambda event: event["ts"])


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


def _fresh(layer: Layer, problem: Problem) -> Tensor:
    """x without a gradient; nor have the parameters."""
    layer.zero_grad(set_to_none=True)
    return problem.x_BTD.detach().requires_grad_()
