"""The report: a row for each kernel as the layer launches it, by width, dtype and GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ..layer.shapes import GPU_SHAPES
from .binary import read_binary
from .gpus import GPUS
from .launches import Launch, LayerStep
from .work import kernel_work, roofline_share, warp_instructions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GOALS = {shape.name: shape for shape in GPU_SHAPES["goals"]}
# Of these capabilities these dtypes: what the goals are set for on each, the others on two.
REPORTED = {80: tuple(DTYPES), 86: ("bf16",), 89: ("bf16",), 90: tuple(DTYPES), 100: ("bf16",)}


@dataclass(frozen=True)
class KernelRow:
    """A line of the CSV; what a row does not have is None, and empty in the file.

    ``launches``: how many of a step are alike. Registers are a thread's. ``stack_bytes`` are what
    spills. ``instructions``: those of the program; ``instructions_a_token``: what all warps of one
    launch run together, by the model of ``work``, over the tokens. ``occupancy``: resident warps
    over the multiprocessor's, as registers and shared memory allow. ``roofline``: the share of it
    that the launch allows, by the same model; none of the small reductions.
    """

    capability: int
    dtype: str
    dim: int
    kernel: str
    variant: str
    launches: int
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: str
    instructions: int
    instructions_a_token: float
    occupancy: float
    roofline: float | None
    triton: str


def kernel_rows(steps: Iterable[LayerStep], capability: int) -> Iterator[KernelRow]:
    """A row for each launch of the steps that compiles to something of its own.

    Raises:
        RuntimeError: Triton is in interpreter mode.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter compiles nothing. Unset it.")
    for step in steps:
        launches = replace(step, capability=capability).launches()
        rows = Counter(kernel_row(launch, capability, step) for launch in launches)
        yield from (replace(row, launches=count) for row, count in rows.items())


def kernel_row(launch: Launch, capability: int, step: LayerStep) -> KernelRow:
    """Compiles a launch of the step and reads the binary."""
    import triton

    gpu, kernel = GPUS[capability], launch.kernel.__name__
    binary = read_binary(launch, capability)
    dtype = next(name for name, dtype in DTYPES.items() if dtype == step.dtype)
    resident = gpu.resident_blocks(binary.warps, binary.registers, binary.shared_bytes)
    work = kernel_work(kernel, launch.options, step.dim, step.dtype.itemsize)
    tokens = step.batch * step.tokens
    return KernelRow(
        capability=capability,
        dtype=dtype,
        dim=step.dim,
        kernel=kernel,
        variant=launch.variant,
        launches=1,
        warps=binary.warps,
        registers=binary.registers,
        stack_bytes=binary.stack_bytes,
        shared_bytes=binary.shared_bytes,
        matrix_instructions=binary.matrix_instructions,
        instructions=sum(binary.instructions),
        instructions_a_token=_digits(warp_instructions(launch, binary.instructions) / tokens),
        occupancy=_digits(resident * binary.warps / gpu.warps),
        roofline=roofline_share(work, gpu.flops[dtype], gpu, resident) if work else None,
        triton=triton.__version__,
    )


def _digits(value: float) -> float:
    """To five digits, so that a file's number is the row's own."""
    return float(f"{value:.5g}")
