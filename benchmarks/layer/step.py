"""A training step of one layer, and a call in eval mode: their time and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measure import Stopwatch
from ..profiled import Meter
from .problem import Problem
from .provider import Layer

# What is timed: of a training step forward, and forward with backward, each from its start; and a
# call in eval mode, without noise, dropout and gradients.
TRAINING, EVAL = ("forward", "forward+backward"), "eval"
PASSES = (*TRAINING, EVAL)


def step_laps(watch: Stopwatch, layer: Layer, problem: Problem) -> list[float]:
    """Seconds of each of ``TRAINING``."""
    x_BTD = _fresh_input(layer, problem)
    outputs: list[Tensor] = []
    return watch.laps(
        lambda: outputs.append(layer(x_BTD, problem.attributes_B)),
        lambda: outputs[0].backward(problem.dy_BTD),
    )


def eval_laps(watch: Stopwatch, layer: Layer, problem: Problem) -> list[float]:
    """Seconds of ``EVAL``. Behind it the layer is in training mode again."""
    x_BTD = problem.x_BTD.detach()
    with _evaluated(layer):
        return watch.laps(lambda: layer(x_BTD, problem.attributes_B))


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step and of a call in eval mode.

    Beyond x, y's gradient and the parameters.

    Attributes:
        forward_peak: at most, during forward; y included.
        peak: at most, during forward and backward; y and all gradients included.
        held: between the two, y excluded: what is stored for backward beside x.
        excess: ``peak`` less y, x's gradient and the parameters' gradients.
        eval_peak: at most, in eval mode without gradients; y included.
    """

    forward_peak: int
    peak: int
    held: int
    excess: int
    eval_peak: int


def step_memory(layer: Layer, problem: Problem) -> StepMemory:
    """Memory of a training step and of a call in eval mode, behind which the layer trains again.

    On a CPU, what its libraries take unseen is not in it.
    """
    x_BTD = _fresh_input(layer, problem)
    with Meter(problem.device) as meter:
        y_BTD = layer(x_BTD, problem.attributes_B)
        meter.mark()
        y_BTD.backward(problem.dy_BTD)
    (held, forward_peak), (_, peak) = meter.marks
    y_bytes = y_BTD.numel() * y_BTD.element_size()
    gradients = sum(p.numel() * p.element_size() for p in layer.parameters() if p.grad is not None)
    x_BTD = _fresh_input(layer, problem).detach()
    with _evaluated(layer), Meter(problem.device) as in_eval:
        layer(x_BTD, problem.attributes_B)
    return StepMemory(
        forward_peak=forward_peak,
        peak=peak,
        held=held - y_bytes,
        excess=max(0, peak - 2 * y_bytes - gradients),
        eval_peak=in_eval.marks[-1][1],
    )


@contextmanager
def _evaluated(layer: Layer) -> Iterator[None]:
    """In eval mode and without gradients, then in training mode."""
    layer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        layer.train()


def _fresh_input(layer: Layer, problem: Problem) -> Tensor:
    """x without a gradient; nor have the parameters."""
    layer.zero_grad(set_to_none=True)
    return problem.x_BTD.detach().requires_grad_()
