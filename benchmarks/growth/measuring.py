"""Measures the layer, the boolean-mask loop and the dense MLP along one axis."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch

from ..layer.check import check
from ..layer.ours import OURS
from ..layer.plain import PLAIN
from ..layer.problem import Problem
from ..layer.provider import Layer, Provider
from ..layer.runner import reason, step_spreads, step_tasks
from ..layer.shapes import Shape, flops
from ..layer.step import StepMemory, step_laps, step_memory
from ..machine import RunFacts, free_bytes
from ..measure import Stopwatch, rounds_that_fit
from .axes import Axis
from .rows import SHOWN, GrowthRow, untimed_row, with_figures

PROVIDERS = [p for p in (*OURS, *PLAIN) if p.name in ("eager", "mask-loop", "dense")]
# A provider that by its last point would take more than this is left out of the next ones.
MOST_SECONDS, MOST_MEMORY = 20.0, 0.8  # of a training step; of the memory that is free
# Where no number of rounds was asked for: a point's rounds take about so many seconds.
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 3.0, 2, 20
# Above so many FLOPs a step, points are not checked against the truth, and have the fewest rounds.
LARGE = 3e10


@dataclass
class _Known:
    """What the last point of each provider took: its shape's FLOPs, seconds and bytes of a step."""

    steps: dict[str, tuple[int, float, int]] = field(default_factory=dict)

    def too_much(self, provider: str, shape: Shape) -> str:
        """Why not to try; empty if nothing is known to stand against it."""
        if provider not in self.steps:
            return ""
        work, seconds, peak = self.steps[provider]
        times = max(1.0, flops(shape, "forward+backward") / work)
        if times * seconds > MOST_SECONDS:
            return (
                f"left out: a step would take {times * seconds:.0f} s, and may {MOST_SECONDS:.0f}"
            )
        if times * peak > MOST_MEMORY * (free := free_bytes()):
            return (
                f"left out: would take {times * peak / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            )
        return ""


def measure_axis(axis: Axis, facts: RunFacts, rounds: int | None) -> list[GrowthRow]:
    """The rows of all points, in the order of ``PROVIDERS``; ``rounds`` None: by what they take."""
    rows: list[GrowthRow] = []
    known = _Known()
    for value, shape in axis.shapes():
        rows += _measure_point(axis, value, shape, facts, rounds, known)
        gc.collect()
    return rows


def _measure_point(
    axis: Axis, value: int, shape: Shape, facts: RunFacts, rounds: int | None, known: _Known
) -> list[GrowthRow]:
    problem = Problem.random(shape, "cpu", torch.float32)
    large = flops(shape, "forward+backward") > LARGE
    layers: dict[str, Layer] = {}
    memory: dict[str, StepMemory] = {}
    status: dict[str, str] = {}
    for provider in PROVIDERS:
        name = provider.name
        status[name] = known.too_much(name, shape)
        if status[name]:
            continue
        try:
            layers[name], memory[name] = _prepare(provider, problem, checked=not large)
        except Exception as error:
            status[name] = reason(error)
    watch = Stopwatch(problem.device)
    tasks = step_tasks(layers, problem, watch)
    if rounds is None:
        rounds = LEAST_ROUNDS
        if not large:
            rounds = rounds_that_fit(tasks, SECONDS, LEAST_ROUNDS, MOST_ROUNDS)
    steps = step_spreads(tasks, rounds)

    rows = []
    for provider in PROVIDERS:
        name = provider.name
        row = untimed_row(facts, axis, value, shape, name, status[name])
        if name not in layers:
            rows.append(row)
            continue
        peaks = (memory[name].peak, memory[name].eval_peak)
        for which, peak in zip(SHOWN, peaks, strict=True):
            spread = steps[name][which]
            rows.append(with_figures(row, shape, which, spread, peak, routes=provider.routes))
        work = flops(shape, "forward+backward")
        known.steps[name] = (work, steps[name]["forward+backward"].median, memory[name].peak)
    return rows


def _prepare(provider: Provider, problem: Problem, *, checked: bool) -> tuple[Layer, StepMemory]:
    """A layer that was found right, if asked, and has made a step of which the memory is known."""
    layer = provider.build(problem)
    if checked:
        check(layer, provider, problem)
        step_laps(Stopwatch(problem.device), layer.train(), problem)  # what it loads at first
    return layer, step_memory(layer.train(), problem)
