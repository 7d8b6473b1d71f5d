"""Compiles every Triton kernel for real GPUs, on a machine that needs none, and reads the result.

    python -m benchmarks.kernel_report

The layer's own launches are recorded at the shapes below, and each is compiled by Triton's ptxas
for compute capability 8.0 and 9.0. Registers, stack and shared memory come from the binary's
resource table, matrix instructions from its disassembly. A stack above 0 would be a spill.

Occupancy is resident warps over the multiprocessor's 64, as registers and shared memory allow.
The roofline share allowed is a model, not a measurement: it is what a kernel can reach where
nothing but its arithmetic and the traffic that its launch needs counts.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

CAPABILITIES = (80, 90)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = (24, 48, 768)
ACTIVATION = "relu"
# Of a multiprocessor, by compute capability: bytes of shared memory, all blocks and one block.
SHARED = {80: (164 * 1024, 163 * 1024), 90: (228 * 1024, 227 * 1024)}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
RESULTS = Path(__file__).parent / "results" / "kernels.csv"


class Launch(NamedTuple):
    """A recorded launch: the kernel, what it was given, and how it was to be compiled."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Compiled(NamedTuple):
    """What became of a launch: a row of the report."""

    capability: int
    dtype: str
    dim: int
    kernel: str
    variant: str
    warps: int
    registers: int
    stack: int
    shared: int
    matrix: str
    occupancy: float

    @property
    def fits(self) -> bool:
        return self.shared <= SHARED[self.capability][1]


def record(dim: int, dtype: torch.dtype, *, activation: str = ACTIVATION) -> list[Launch]:
    """The launches of one training step of the layer at this width, without running them."""
    from dmoe_layer import fused, fused_router

    launches: list[Launch] = []

    def note(kernel: Any, grid: Any, on: Any, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    tokens, n_experts, k, seed = 512, 8, 2, torch.tensor(2**61)
    x = torch.zeros(2, tokens // 2, dim, dtype=dtype)
    w, b = torch.zeros(3, 2, n_experts, dim, dtype=dtype), torch.zeros(3, 2, n_experts, dtype=dtype)
    rows = torch.zeros(2, 1, dtype=torch.int64)
    w1, b1 = (torch.zeros(n_experts, 4 * dim, *s, dtype=dtype) for s in ((dim,), ()))
    w2, b2 = torch.zeros(n_experts, dim, 4 * dim, dtype=dtype), torch.zeros(n_experts, dim, dtype=dtype)
    old = fused.launch, fused_router.launch
    fused.launch = fused_router.launch = note
    try:
        _, indices, gates, order, offsets = fused_router.fused_route(x, w, b, rows, None, k, seed)
        dgates, dlogits = torch.zeros(tokens, k), torch.zeros(tokens, n_experts)
        options = (activation, 0.1, seed, dtype)
        experts = (x[0].new_zeros(tokens, dim), order, offsets, gates, w1, b1, w2, b2)
        y, hidden = fused.fused_experts(*experts, *options, True)
        fused.fused_experts_backward(y, *experts, hidden, *options)
        fused_router.fused_route_backward(dlogits, dgates, indices, gates, x, w, b, rows, None, seed)
    finally:
        fused.launch, fused_router.launch = old
    return launches


def compile_for(launch: Launch, capability: int) -> Any:
    """The launch's kernel as Triton compiles it for a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
             torch.int32: "i32", torch.int64: "i64"}  # fmt: skip
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    compiling = dict(launch.options)
    for i, parameter in enumerate(launch.kernel.params):
        given = i < len(launch.arguments)
        value = launch.arguments[i] if given else compiling.pop(parameter.name)
        specialized = not parameter.do_not_specialize
        one = isinstance(value, int) and value == 1 and specialized
        if parameter.is_constexpr or value is None or one:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + types[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**compiling, "enable_fp_fusion": True}
    )


def read(launch: Launch, capability: int, dtype: str, dim: int) -> Compiled:
    """Compiles a launch and reads the binary."""
    compiled = compile_for(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([_cuobjdump(), flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    registers, stack = int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    used = sorted(set(re.findall(r"\b((?:HGMMA|HMMA|QGMMA|FFMA)\.[\w.]*)", code)))
    matrix = " ".join(name for name in used if "MMA" in name)
    # Registers are handed out to a warp in units of 256.
    per_warp = -(-registers * 32 // 256) * 256
    blocks = min(
        REGISTERS // (per_warp * warps),
        SHARED[capability][0] // (shared + 1024),
        WARPS // warps,
        BLOCKS,
    )
    variant = " ".join(f"{k}={launch.options[k]}" for k in ("OF_ROWS", "OF_WEIGHTS", "GATHER", "SPLIT", "NOISY", "DROP") if k in launch.options)
    return Compiled(
        capability, dtype, dim, launch.kernel.__name__, variant, warps, registers, stack, shared,
        matrix, blocks * warps / WARPS,
    )  # fmt: skip


def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


if __name__ == "__main__":
    for cap in CAPABILITIES:
        for dim in [int(a) for a in sys.argv[1:]] or WIDTHS:
            for name, dtype in DTYPES.items():
                seen=set()
                for l in record(dim, dtype):
                    r = read(l, cap, name, dim)
                    key=(r.kernel,r.variant,str({k:v for k,v in l.options.items() if k in('SAMPLES','GROUPS')}))
                    print(*r, sep=" | ", flush=True)
