"""Measures one shape: builds every provider, checks it, and times those that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..measure import Spread, Stopwatch, interleaved, rounds_that_fit
from ..profiled import kernel_seconds
from .check import WrongResult, check
from .ours import Ours
from .problem import Problem
from .provider import Layer, Provider, Unavailable
from .rows import LayerRow, LayerRun, timed_row, untimed_row
from .shapes import Shape
from .step import EVAL, TRAINING, StepMemory, eval_laps, step_laps, step_memory

# Where no number of rounds was asked for: a shape's rounds take about so many seconds.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 20.0, 5, 50
Tasks = dict[tuple[str, str], Callable[[], list[float]]]


@dataclass(frozen=True)
class Checked:
    """A layer that was built, found right and warmed up."""

    layer: Layer
    error: float | None
    memory: StepMemory


def measure_shape(shape: Shape, providers: list[Provider], run: LayerRun) -> list[LayerRow]:
    """The rows of one shape, in the order of ``providers``."""
    problem, watch = Problem.random(shape, run.device.type, run.dtype), Stopwatch(run.device)
    found: dict[str, Checked] = {}
    reasons: dict[str, str] = {}
    for provider in providers:
        try:
            found[provider.name] = _prepare(provider, problem, watch)
        except Exception as error:
            reasons[provider.name] = reason(error)
    layers = {name: checked.layer for name, checked in found.items()}
    tasks = step_tasks(layers, problem, watch)
    rounds = run.rounds or rounds_that_fit(tasks, SECONDS, LEAST_ROUNDS, MOST_ROUNDS)
    steps = step_spreads(tasks, rounds)
    routers = _router_spreads(layers, problem, watch, rounds)

    rows = []
    for provider in providers:
        name = provider.name
        if name in reasons:
            rows.append(untimed_row(run, shape, provider, reasons[name]))
            continue
        checked = found[name]
        row = partial(timed_row, run, shape, provider, error=checked.error)
        for which, spread in steps[name].items():
            loop = steps.get("mask-loop", {}).get(which)
            rows.append(row(which, spread, loop=loop, memory=checked.memory))
        for which, spread in routers.get(name, {}).items():
            rows.append(row(which, spread, loop=None, memory=None))
    return rows


def _prepare(provider: Provider, problem: Problem, watch: Stopwatch) -> Checked:
    layer = provider.build(problem)
    error = check(layer, provider, problem)
    step_laps(watch, layer.train(), problem)  # compiles and tunes what has to be
    eval_laps(watch, layer, problem)
    return Checked(layer, error, step_memory(layer, problem))


def reason(error: Exception) -> str:
    """Why a provider was not timed, as its row's status says it."""
    first_line = (str(error).splitlines() or [""])[0]
    if isinstance(error, WrongResult):
        return f"wrong ({first_line}), not timed"
    if isinstance(error, Unavailable):
        return f"unavailable: {first_line}"
    if isinstance(error, ImportError):
        return f"unavailable: not installed ({first_line})"
    return f"failed: {type(error).__name__}: {first_line}"


def step_tasks(layers: dict[str, Layer], problem: Problem, watch: Stopwatch) -> Tasks:
    """The tasks that take turns: each layer's training step, and its call in eval mode."""
    tasks: Tasks = {}
    for name, layer in layers.items():
        tasks[name, TRAINING[-1]] = partial(step_laps, watch, layer, problem)
        tasks[name, EVAL] = partial(eval_laps, watch, layer, problem)
    return tasks


def step_spreads(tasks: Tasks, rounds: int) -> dict[str, dict[str, Spread]]:
    """By layer, the times of each of ``PASSES``."""
    spreads: dict[str, dict[str, Spread]] = {}
    for (name, which), laps in interleaved(tasks, rounds).items():
        passes = (EVAL,) if which == EVAL else TRAINING
        for at, seconds in zip(passes, zip(*laps, strict=True), strict=True):
            spreads.setdefault(name, {})[at] = Spread.of([*seconds])
    return spreads


def _router_spreads(
    layers: dict[str, Layer], problem: Problem, watch: Stopwatch, rounds: int
) -> dict[str, dict[str, Spread]]:
    """Our routers alone by provider, noise on, without gradients.

    On a GPU: all the kernels of a call, and the longest of them; Python's time is not in it.
    """
    routes = {
        name: partial(_route, layer, problem)
        for name, layer in layers.items()
        if isinstance(layer, Ours)
    }
    if not watch.cuda:
        tasks = {name: partial(watch.laps, route) for name, route in routes.items()}
        laps = interleaved(tasks, rounds)
        return {name: {"router": Spread.of([s for (s,) in lap])} for name, lap in laps.items()}
    return {name: _kernel_spreads(route, watch, rounds) for name, route in routes.items()}


def _route(layer: Ours, problem: Problem) -> None:
    with torch.no_grad():
        layer.route(problem.x_BTD, problem.attributes_B)


def _kernel_spreads(
    route: Callable[[], object], watch: Stopwatch, rounds: int
) -> dict[str, Spread]:
    route()  # compiles what has to be
    kernels = kernel_seconds(route, watch, rounds)
    if not kernels or not all(kernels):
        return {}  # a round without kernels means that the profiler saw none of them
    return {
        "router": Spread.of([sum(seconds) for seconds in kernels]),
        "router kernel": Spread.of([max(seconds) for seconds in kernels]),
    }
