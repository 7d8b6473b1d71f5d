"""A training step of one layer: its time and its memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..measure import Stopwatch
from ..profiled import Meter
from .problem import Problem
from .provider import Layer

# What is timed of a step, each from its start.
PASSES = ("forward", "forward+backward")


def step_laps(watch: Stopwatch, layer: Layer, problem: Problem) -> list[float]:
    """Seconds of each of ``PASSES``."""
    x_BTD = _fresh_input(layer, problem)
    outputs: list[Tensor] = []
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
    x_BTD = _fresh_input(layer, problem)
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


def _fresh_input(layer: Layer, problem: Problem) -> Tensor:
    """x without a gradient; nor have the parameters."""
    layer.zero_grad(set_to_none=True)
    return problem.x_BTD.detach().requires_grad_()
