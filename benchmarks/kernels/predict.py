"""Predicts the goals' times on an H200 from counts, before anything has run on one.

This is a model, not a measurement. A launch takes the longest of four times: its instructions at
the rate at which they issue, its waits shared by the programs that wait together, its memory
traffic, and its matrix products. The few operations of PyTorch between the kernels are left out.
For other providers the model adds up the traffic and the products of each PyTorch operation,
counted in a step of fewer tokens on a CPU, without a wait between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dmoe_layer import DMoE
from reference_models.markdown import markdown_table

from ..layer.goals import goals_table
from ..layer.ours import OURS
from ..layer.plain import PLAIN
from ..layer.problem import Problem
from ..layer.provider import Layer, Provider
from ..layer.roofline import Roofline
from ..layer.rows import LayerRow, LayerRun, timed_row
from ..layer.shapes import Shape, min_bytes
from ..layer.step import StepMemory, step_memory
from ..machine import run_facts
from ..measure import Spread
from ..paper import DROPOUT
from .binary import Binary, read_binary
from .gpus import H200
from .launches import Launch, LayerStep, intercepted
from .work import kernel_work, trips, warp_instructions

DTYPE, CAPABILITY = torch.bfloat16, 90
CLOCK, ISSUE_SLOTS = 1.9e9, 4  # of a multiprocessor
# What a warp alone issues in a cycle, and how much of the issue slots, of the bandwidth and of the
# matrix units a good kernel reaches.
ALONE, OF_ISSUE, OF_BANDWIDTH, OF_MATRIX = 0.30, 0.80, 0.85, 0.75
# Cycles that a program waits for its rows, whose order it reads first, and for weights. Seconds of
# any kernel at least.
WAIT, WAIT_FOR_L2, LEAST = 2600, 300, 2e-6
# By token: all others are by pair of token and slot.
_OF_TOKENS = ("route_kernel", "sort_kernel", "route_backward_kernel", "sum_pairs_kernel")
_COUNTED_TOKENS = 8192
_OURS = next(provider for provider in OURS if provider.name == "triton")
# grouped-mm's product is another on a CPU.
_OTHERS = [provider for provider in PLAIN if provider.name != "grouped-mm"]


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
    """The times of a launch by the model."""
    resident = H200.resident_blocks(binary.warps, binary.registers, binary.shared_bytes)
    resident = min(resident, math.ceil(launch.programs / H200.multiprocessors))
    rounds = launch.programs / H200.multiprocessors / resident
    a_warp = warp_instructions(launch, binary.instructions) / launch.programs / binary.warps
    issue = resident * a_warp * binary.warps / ISSUE_SLOTS / OF_ISSUE
    # What is not loaded ahead is waited for each time that a loop is passed: rows by rows, from
    # memory; or the weights of all rows, slice by slice, from the L2 cache.
    passes = 1 if binary.loads_ahead else max((1, *trips(launch)[:1]))
    by_rows = any(p.name in ("window_tiles", "chunk_tokens") for p in launch.kernel.params)
    waits = WAIT * passes if by_rows else WAIT + WAIT_FOR_L2 * passes
    work = kernel_work(launch.kernel.__name__, launch.options, step.dim, DTYPE.itemsize)
    if work is None:
        moved = sum(float(a.nbytes) for a in launch.arguments if isinstance(a, Tensor))
        operations = 0.0
    else:
        of_tokens = launch.kernel.__name__ in _OF_TOKENS
        rows = step.batch * step.tokens * (1 if of_tokens else step.k)
        moved = rows * (work.loaded + work.stored)
        operations = rows * work.operations / work.useful
    return Seconds(
        issue=rounds * issue / CLOCK,
        wait=rounds * (a_warp / ALONE + waits) / CLOCK,
        traffic=moved / H200.bandwidth / OF_BANDWIDTH,
        products=operations / H200.flops["bf16"] / OF_MATRIX,
    )


class Prediction(NamedTuple):
    """The prediction for a shape: a line for each launch, and rows as of a timed step."""

    shape: Shape
    launches: list[list[str]]
    rows: list[LayerRow]

    def table(self) -> str:
        """Every launch of a training step."""
        header = ["launch", "programs × warps", "instructions a token", *Seconds._fields]
        return markdown_table([*header, "predicted", "by"], self.launches)


def predict(shape: Shape) -> Prediction:
    """The prediction of a training step at a shape, beside those of other providers."""
    step, lines = LayerStep.of(shape, DTYPE, balanced=False), []
    seconds, router = {"triton": 0.0}, 0.0
    for launch in step.launches():
        binary = read_binary(launch, CAPABILITY)
        found = launch_seconds(launch, binary, step)
        seconds["triton"] += found.predicted
        if launch.kernel.__name__ == "route_kernel":
            router = found.predicted
        longest = max(zip(found, Seconds._fields, strict=True))[1]
        a_token = warp_instructions(launch, binary.instructions) / shape.total_tokens
        lines.append(
            [
                f"{launch.kernel.__name__} {launch.variant}",
                f"{launch.programs} × {binary.warps}",
                f"{a_token:.1f}",
                *(f"{1e3 * s:.3f}" for s in (*found, found.predicted)),
                longest if found.predicted > LEAST else "launch",
            ]
        )
    for provider in _OTHERS:
        seconds[provider.name] = provider_seconds(provider, shape)
    facts = replace(run_facts(torch.device("cpu"), DTYPE), device="cuda", machine="predicted")
    roofline = Roofline(H200.flops["bf16"], H200.bandwidth)
    run = LayerRun(facts, torch.device("cuda"), DTYPE, rounds=None, roofline=roofline)
    memory = _memory(shape)
    rows = [
        timed_row(
            run, shape, provider, "forward+backward", Spread.of([seconds[provider.name]]),
            loop=Spread.of([seconds["mask-loop"]]), error=None,
            memory=memory if provider.name == "triton" else None,
        )
        for provider in (_OURS, *_OTHERS)
    ]  # fmt: skip
    kernel = Spread.of([router])
    rows.append(
        timed_row(run, shape, _OURS, "router kernel", kernel, loop=None, memory=None, error=None)
    )
    return Prediction(shape, lines, rows)


def section(predictions: list[Prediction]) -> str:
    """What the page shows: the steps' times, and the goals."""
    lines = []
    for prediction in predictions:
        floor = min_bytes(prediction.shape, "forward+backward", DTYPE.itemsize) / H200.bandwidth
        times = [row.median_ms for row in prediction.rows if row.which == "forward+backward"]
        cells = [f"{ms:.2f}" for ms in (1e3 * floor, *times) if ms is not None]
        lines.append([prediction.shape.name, *cells])
    names = ["least traffic alone", "this layer", *(provider.name for provider in _OTHERS)]
    steps = markdown_table(["forward+backward, predicted ms", *names], lines)
    rows = [row for prediction in predictions for row in prediction.rows]
    return f"{steps}\n\n{goals_table(rows, 'predicted')}"


def _memory(shape: Shape) -> StepMemory:
    """The memory of the kernels' step, which allocates the same without running."""
    problem = Problem.random(shape, "cpu", DTYPE)
    with intercepted(lambda launch: None):
        return step_memory(_OnGpu(shape), problem)


class _OnGpu(Layer):
    """The layer with its kernels, where they are intercepted."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layer = DMoE(
            shape.dim, attribute_sizes=shape.values, dropout=DROPOUT, backend="triton", dtype=DTYPE
        )

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        y_BTD: Tensor = self.layer(x_BTD, attributes_B)
        return y_BTD


def provider_seconds(provider: Provider, shape: Shape) -> float:
    """The predicted time of a training step of plain PyTorch.

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
    """The tensors among the inputs or outputs of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
