"""Measures any code's memory and a GPU's kernel times, by PyTorch's profiler and its allocator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .measure import Stopwatch

_MARK = "benchmarks: mark"
_KERNELS = ("kernel", "gpu_memset")


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
        """Adds a pair to ``marks``."""
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
            elif event["name"] == "[memory]":
                live += event["args"]["Bytes"]
                peak = max(peak, live)


def kernel_seconds(step: Callable[[], object], watch: Stopwatch, rounds: int) -> list[list[float]]:
    """The time of each kernel that a step launches on a GPU, round by round."""
    found = named_kernel_seconds(step, watch, rounds)
    return [[seconds for _, seconds in kernels] for kernels in found]


def named_kernel_seconds(
    step: Callable[[], object], watch: Stopwatch, rounds: int
) -> list[list[tuple[str, float]]]:
    """Name and time of each kernel that a step launches on a GPU, round by round.

    From the profiler, so that neither Python nor the wait for a launch is in it.
    """
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiled:
        for _ in range(rounds):
            watch.flush()
            with record_function(_MARK):
                pass
            step()
            torch.cuda.synchronize()
            with record_function(_MARK):
                pass
    return kernels_between_marks(_events(profiled))


def kernels_between_marks(events: list[dict[str, Any]]) -> list[list[tuple[str, float]]]:
    """Kernels and their seconds between the first mark and the second, the third and fourth, ...

    >>> mark, kernel = {"name": _MARK}, {"name": "k", "cat": "kernel", "dur": 5e6}
    >>> kernels_between_marks([kernel, mark, kernel, kernel, mark, kernel, mark, kernel, mark])
    [[('k', 5.0), ('k', 5.0)], [('k', 5.0)]]
    """
    rounds: list[list[tuple[str, float]]] = []
    marks = 0
    for event in events:
        if event["name"] == _MARK:
            marks += 1
            if marks % 2:
                rounds.append([])
        elif marks % 2 and event.get("cat") in _KERNELS:
            rounds[-1].append((event["name"], event["dur"] / 1e6))
    return rounds


def _events(profiled: profile) -> list[dict[str, Any]]:
    """Marks, allocations, releases (of negative size) and kernels in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = [
        event
        for event in events
        if event.get("name") == "[memory]"
        or (event.get("name") == _MARK and event.get("cat") == "user_annotation")
        or event.get("cat") in _KERNELS
    ]
    return sorted(events, key=lambda event: event["ts"])
