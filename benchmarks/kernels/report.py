"""The report: a row for each kernel as the layer launches it, by width, dtype and GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..paper import N_EXPERTS, K
from .binary import read_binary
from .gpus import GPUS
from .launches import Launch, layer_launches
from .work import kernel_work, roofline_share

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = (24, 48, 768)  # of the layer benchmark's goals
# What makes a variant of a kernel.
_FLAGS = ("GATHER", "SPLIT", "NOISY")


@dataclass(frozen=True)
class KernelRow:
    """A line of the CSV; what a row does not have is None, and empty in the file.

    Registers are a thread's. ``stack_bytes`` are what spills. ``occupancy``: resident warps over
    the multiprocessor's 64, as registers and shared memory allow. ``roofline``: the share of it
    that the launch allows, by the model of ``work``; none of the small reductions.
    """

    capability: int
    dtype: str
    dim: int
    kernel: str
    variant: str
    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: str
    occupancy: float
    roofline: float | None
    triton: str


def kernel_rows(
    widths: Sequence[int],
    dtypes: Sequence[str],
    activation: str = "relu",
    n_experts: int = N_EXPERTS,
    k: int = K,
) -> Iterator[KernelRow]:
    """A row for each launch that compiles to something of its own."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter compiles nothing. Unset it.")
    for capability in GPUS:
        for dim in widths:
            for dtype in dtypes:
                launches = layer_launches(dim, DTYPES[dtype], activation, n_experts, k, capability)
                rows = [kernel_row(launch, capability, dtype, dim) for launch in launches]
                yield from dict.fromkeys(rows)


def kernel_row(launch: Launch, capability: int, dtype: str, dim: int) -> KernelRow:
    """Compiles a launch and reads the binary."""
    import triton

    gpu, kernel = GPUS[capability], launch.kernel.__name__
    binary = read_binary(launch, capability)
    resident = gpu.resident_blocks(binary.warps, binary.registers, binary.shared_bytes)
    work = kernel_work(kernel, launch.options, dim, DTYPES[dtype].itemsize)
    return KernelRow(
        capability=capability,
        dtype=dtype,
        dim=dim,
        kernel=kernel,
        variant=" ".join(flag.lower() for flag in _FLAGS if launch.options.get(flag)),
        **binary._asdict(),
        occupancy=resident * binary.warps / gpu.warps,
        roofline=roofline_share(work, gpu.flops[dtype], gpu, resident) if work else None,
        triton=triton.__version__,
    )
