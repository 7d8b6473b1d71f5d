"""Fills Triton's cache before anything is timed: every kernel of a run, in many processes at once.

A kernel is compiled by the very call that launches it, so that the launch finds it; nothing runs.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from .launches import Launch, LayerStep


class Compilation(NamedTuple):
    """A launch of a step, by its place in it."""

    step: LayerStep
    place: int

    @property
    def launch(self) -> Launch:
        return _launches(self.step)[self.place]


def compilations(steps: Sequence[LayerStep]) -> list[Compilation]:
    """The launches of all steps; those that are compiled alike appear once."""
    found: dict[tuple[Any, ...], Compilation] = {}
    for step in steps:
        for place, launch in enumerate(_launches(step)):
            found.setdefault(launch.key, Compilation(step, place))
    return list(found.values())


def prewarm(todo: Sequence[Compilation], processes: int | None) -> Iterator[tuple[str, str]]:
    """The kernels that could not be compiled or loaded, with the reason.

    Args:
        processes: None for one a core.
    """
    count = min(processes or os.cpu_count() or 1, max(len(todo), 1))
    # Not forked: a process that has used a GPU leaves its children none.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        for one, error in zip(todo, pool.map(compile_one, todo), strict=True):
            if error:
                yield f"{one.step.dim} {one.step.blocks} {one.launch.kernel.__name__}", error


@functools.cache
def _launches(step: LayerStep) -> list[Launch]:
    return step.launches()


def compile_one(one: Compilation) -> str:
    """The error, if there is one: of the compiler, or of the GPU that cannot load the kernel."""
    torch.set_num_threads(1)
    try:
        launch = one.launch
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        compiled._init_handles()  # as the first launch does, which compiles a launcher in C
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""
