"""What the counts foretell of the goals' times on an H200, before anything has run on one.

A model, not a measurement. Of a launch: the longest of its instructions over the rate at which they
issue, of what a program waits for over how many programs wait together, of its traffic and of its
matrix products. Of other providers: the traffic and the products of each of PyTorch's operations,
counted in a step of fewer tokens on a CPU, with no wait between two of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reference_models.markdown import markdown_table

from ..layer.plain import PLAIN
from ..layer.problem import Problem
from ..layer.shapes import Shape, min_bytes
from .binary import Binary, read_binary
from .gpus import H200
from .launches import Launch, LayerStep
from .work import kernel_work, trips, warp_instructions

DTYPE, CAPABILITY = torch.bfloat16, 90
CLOCK, ISSUE_SLOTS = 1.9e9, 4  # of a multiprocessor
# What a warp alone issues in a cycle; how much of the issue slots, of the bandwidth and of the
# matrix units a good kernel reaches; cycles that a program waits for memory, and the least time of
# any kernel.
ALONE, OF_ISSUE, OF_BANDWIDTH, OF_MATRIX, WAIT, LEAST = 0.30, 0.80, 0.85, 0.75, 2600, 2e-6
# By token: all others are by pair of token and slot.
_OF_TOKENS = ("route_kernel", "sort_kernel", "route_backward_kernel", "sum_slots_kernel")
_COUNTED_TOKENS = 8192


class Seconds(NamedTuple):
    """The times of one launch, of which the longest is what it takes."""

    issue: float
    wait: float
    traffic: float
    products: float

    @property
    def predicted(self) -> float:
        return max(*self, LEAST)


def launch_seconds(launch: Launch, binary: Binary, step: LayerStep) -> Seconds:
    """What the model makes of a launch."""
    resident = H200.resident_blocks(binary.warps, binary.registers, binary.shared_bytes)
    resident = min(resident, math.ceil(launch.programs / H200.multiprocessors))
    rounds = launch.programs / H200.multiprocessors / resident
    a_warp = warp_instructions(launch, binary.instructions) / launch.programs / binary.warps
    issue = resident * a_warp * binary.warps / ISSUE_SLOTS / OF_ISSUE
    # What is not loaded ahead is waited for each time that the loop over rows is passed.
    waits = 1 if binary.loads_ahead else max((1, *trips(launch)[:1]))
    work = kernel_work(launch.kernel.__name__, launch.options, step.dim, DTYPE.itemsize)
    if work is None:
        moved = sum(float(a.nbytes) for a in launch.arguments if isinstance(a, Tensor))
        operations = 0.0
    else:
        of_tokens = launch.kernel.__name__ in _OF_TOKENS
        rows = step.batch * step.tokens * (1 if of_tokens else step.k)
        slices = launch.grid[1] if launch.options.get("OF_WEIGHTS") else 1
        moved = rows * (work.loaded * slices + work.stored)
        operations = rows * work.operations / work.useful
    return Seconds(
        issue=rounds * issue / CLOCK,
        wait=rounds * (a_warp / ALONE + waits * WAIT) / CLOCK,
        traffic=moved / H200.bandwidth / OF_BANDWIDTH,
        products=operations / H200.flops["bf16"] / OF_MATRIX,
    )


def prediction_table(shapes: list[Shape]) -> str:
    """Every launch of each shape's training step; then each step beside its floor and others'."""
    parts, lines = [], []
    for shape in shapes:
        step = LayerStep.of(shape, DTYPE, balanced=False)
        launches = []
        total = _gradient_sum(shape)
        for launch in step.launches():
            binary = read_binary(launch, CAPABILITY)
            seconds = launch_seconds(launch, binary, step)
            bound = max(zip(seconds, Seconds._fields, strict=True))[1]
            launches.append(
                [
                    f"{launch.kernel.__name__} {launch.variant}",
                    f"{launch.programs} × {binary.warps}",
                    f"{warp_instructions(launch, binary.instructions) / shape.total_tokens:.1f}",
                    *(f"{1e3 * s:.3f}" for s in seconds),
                    f"{1e3 * seconds.predicted:.3f}",
                    bound if seconds.predicted > LEAST else "launch",
                ]
            )
            total += seconds.predicted
        header = ["launch", "programs × warps", "instructions a token", *Seconds._fields]
        parts.append(f"### {shape.name}: {shape}\n\nms on an H200, {DTYPE}.\n")
        parts.append(markdown_table([*header, "predicted", "by"], launches) + "\n")
        floor = min_bytes(shape, "forward+backward", DTYPE.itemsize) / H200.bandwidth
        others = {p.name: provider_seconds(p, shape) for p in PLAIN if p.name != "grouped-mm"}
        lines.append(
            [
                shape.name,
                f"{1e3 * floor:.2f}",
                f"{1e3 * total:.2f}",
                *(f"{1e3 * s:.2f} ({s / total:.1f})" for s in others.values()),
            ]
        )
    names = [f"{p.name} (× ours)" for p in PLAIN if p.name != "grouped-mm"]
    parts.append(markdown_table(["forward+backward, ms", "floor", "ours", *names], lines))
    return "\n".join(parts)


def _gradient_sum(shape: Shape) -> float:
    """Of x's two gradients, the router's and the experts', which autograd adds."""
    moved = 3 * shape.total_tokens * shape.dim * DTYPE.itemsize
    return moved / H200.bandwidth / OF_BANDWIDTH


def provider_seconds(provider: Any, shape: Shape) -> float:
    """What the model makes of a training step of plain PyTorch.

    Traffic and products grow with the tokens; the number of operations does not.
    """
    fewer = min(shape.tokens, _COUNTED_TOKENS)
    cut = Shape("", shape.batch, fewer, shape.dim, shape.values)
    problem = Problem.random(cut, "cpu", DTYPE)
    layer = provider.build(problem).train()
    with _Counted(shape.tokens / fewer) as counted:
        layer(problem.x_BTD, problem.attributes_B).backward(problem.dy_BTD)
    return counted.seconds


class _Counted(TorchDispatchMode):
    """Adds up the time of operations by their traffic and products, ``times`` as large."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self.times, self.seconds = times, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with FlopCounterMode(display=False) as flops:
            out = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in str(func) or "detach" in str(func):
            return out
        moved = sum(t.nbytes for t in _tensors((*args, *(kwargs or {}).values(), out)))
        traffic = self.times * moved / H200.bandwidth / OF_BANDWIDTH
        products = self.times * flops.get_total_flops() / H200.flops["bf16"] / OF_MATRIX
        self.seconds += max(traffic, products, LEAST)
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in what an operation takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
