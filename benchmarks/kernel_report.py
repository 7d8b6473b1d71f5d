"""Compiles every Triton kernel for real GPUs, on a machine that needs none, and reads the result.

    python -m benchmarks.kernel_report

The layer's own launches are recorded at the widths of the benchmark's goals, and each is compiled
by Triton for compute capability 8.0 and 9.0. Registers, stack and shared memory come from the
binary's resource table, matrix instructions from its disassembly; a stack is what spills.

Columns of the CSV:
    occupancy: resident warps over the multiprocessor's 64, as registers and shared memory allow.
    roofline: the share of the roofline that the launch allows, by a model and not measured: the
        time of the useful operations or of the least traffic, whichever is longer, over the time
        of the operations issued (blocks are padded to powers of two) or of the traffic at the
        bandwidth that the resident programs can keep busy (Little's law: a program has one tile's
        loads under way, and LATENCY passes until they arrive).
"""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = (24, 48, 768)
LATENCY = 700e-9
N_EXPERTS, K = 8, 2


class GPU(NamedTuple):
    """Limits from the vendor's data sheets; per multiprocessor where nothing else is said."""

    shared: int
    shared_of_block: int
    multiprocessors: int
    bandwidth: float
    flops: dict[str, float]

    registers: int = 65536
    warps: int = 64
    blocks: int = 32


# fp32 runs as three tf32 products.
A100 = {"fp32": 156e12 / 3, "fp16": 312e12, "bf16": 312e12}
H100 = {"fp32": 495e12 / 3, "fp16": 989e12, "bf16": 989e12}
GPUS = {
    80: GPU(164 << 10, 163 << 10, 108, 2.0e12, A100),
    90: GPU(228 << 10, 227 << 10, 132, 3.35e12, H100),
}


class Launch(NamedTuple):
    """A recorded launch: the kernel, what it was given, and how it is to be compiled."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Row(NamedTuple):
    """What became of a launch."""

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
    roofline: float | str
    triton: str


def record(
    dim: int, dtype: torch.dtype, activation: str = "relu", n_experts: int = N_EXPERTS, k: int = K
) -> list[Launch]:
    """The launches of one training step of the layer at this width, without running them."""
    from dmoe_layer import fused, fused_mlp, fused_router, launch

    launches: list[Launch] = []

    def note(kernel: Any, grid: Any, on: Any, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    tokens, seed = 512, torch.tensor(2**61)
    router = (zeros(3, 2, n_experts, dim), zeros(3, 2, n_experts), torch.zeros(2, 1).long(), None)
    weights = (zeros(n_experts, 4 * dim, dim), zeros(n_experts, 4 * dim),
               zeros(n_experts, dim, 4 * dim), zeros(n_experts, dim))  # fmt: skip
    x, options = zeros(2, tokens // 2, dim), (activation, 0.1, seed, dtype)
    modules: tuple[Any, ...] = (fused_mlp, fused_router, launch)
    originals = [module.launch for module in modules]
    try:
        for module in modules:
            module.launch = note
        logits, indices, gates, order, offsets = fused_router.fused_route(x, *router, k, seed)
        experts = (x.flatten(0, 1), order, offsets, gates, *weights)
        y, hidden = fused._fused_experts(*experts, *options, dim >= 128)
        fused.fused_experts_backward(y, hidden, *experts, *options, True, True)
        fused_router.fused_route_backward(logits, gates, indices, gates, x, *router, seed)
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.launch = original
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
    options = {**launch.options, "enable_fp_fusion": True}
    # As Triton's own launcher specializes its arguments.
    for i, parameter in enumerate(launch.kernel.params):
        name, is_given = parameter.name, i < len(launch.arguments)
        value = launch.arguments[i] if is_given else options.pop(name)
        is_integer = isinstance(value, int) and not parameter.is_constexpr
        specialized = is_integer and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + types[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif is_integer:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def read(launch: Launch, capability: int, dtype: str, dim: int) -> Row:
    """Compiles a launch and reads the binary."""
    import triton

    compiled, gpu = compile_for(launch, capability), GPUS[capability]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run(
                [tool, flag, cubin], check=True, capture_output=True, encoding="utf-8"
            ).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    # A warp's registers come in units of 256, and a block's shared memory has 1 KiB on top.
    resident = min(
        gpu.registers // (math.ceil(numbers["REG"] * 32 / 256) * 256 * warps),
        gpu.shared // (shared + 1024),
        gpu.warps // warps,
        gpu.blocks,
    )
    flags = ("OF_ROWS", "OF_WEIGHTS", "GATHER", "SPLIT", "NOISY", "DROP")
    return Row(
        capability=capability,
        dtype=dtype,
        dim=dim,
        kernel=launch.kernel.__name__,
        variant=" ".join(f.lower() for f in flags if launch.options.get(f)),
        warps=warps,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=shared,
        matrix_instructions=" ".join(sorted(set(re.findall(r"\bH?G?MMA\.[\w.]*", code)))),
        occupancy=resident * warps / gpu.warps,
        roofline=_roofline(launch.kernel.__name__, launch.options, dtype, dim, gpu, resident),
        triton=triton.__version__,
    )


def _roofline(
    kernel: str, options: dict[str, Any], dtype: str, d: int, gpu: GPU, resident: int
) -> float | str:
    """The share that the launch allows; empty for the small reductions.

    Work is for one row (token and slot) or, in the router, one token: operations, how much of the
    padded operations they are, bytes read, bytes written, and rows in a tile.
    """
    h, s, o = 4 * d, DTYPES[dtype].itemsize, options
    gemms = 3 * o.get("OF_ROWS", 0) + (4 if o.get("OF_WEIGHTS") else 0)
    gemms -= 2 * bool(o.get("OF_ROWS") and o.get("OF_WEIGHTS"))

    def fill(size: int, block: str) -> float:
        return size / (math.ceil(size / o[block]) * o[block])

    work: dict[str, Callable[[], tuple[float, float, float, float, int]]] = {
        "route_kernel": lambda: (
            4 * N_EXPERTS * d, fill(d, "DIM"), d * s, 4 * N_EXPERTS + 12 * K, o["TOKENS"]),
        "route_backward_kernel": lambda: (
            12 * N_EXPERTS * d, fill(d, "DIM"), d * s + 4 * N_EXPERTS + 16 * K, d * s, o["TOKENS"]),
        "sort_kernel": lambda: (0, 1, 8 * K, 4 * K, o["TOKENS"]),
        "sum_slots_kernel": lambda: (0, 1, K * d * s, d * s, o["ROWS"]),
        "mlp_kernel": lambda: (
            4 * d * h, fill(d, "DIM") * fill(h, "HIDDEN"), d * s + 8, d * s, o["ROWS"]),
        "mlp_backward_kernel": lambda: (
            2 * gemms * d * h, fill(d, "DIM") * fill(h, "HIDDEN"), 2 * d * s + 8,
            (d * s + 4) * o["OF_ROWS"], o["ROWS"]),
        "hidden_kernel": lambda: (2 * d * h, fill(h, "COLUMNS"), d * s, h * s, o["ROWS"]),
        "output_kernel": lambda: (2 * d * h, fill(d, "COLUMNS"), h * s, d * s, o["ROWS"]),
        "gather_gradient_kernel": lambda: (0, 1, d * s, 2 * d * s, o["ROWS"]),
        "hidden_backward_kernel": lambda: (
            2 * d * h, fill(h, "COLUMNS"), (d + h) * s, h * s, o["ROWS"]),
        "weight_backward_kernel": lambda: (
            2 * d * h, fill(d, "COLUMNS"), (d + h) * s, 0, o["ROWS"]),
    }  # fmt: skip
    if kernel not in work:
        return ""
    operations, useful, loaded, stored, rows = work[kernel]()
    peak = gpu.flops[dtype]
    on_its_way = resident * rows * loaded * gpu.multiprocessors
    bandwidth = min(gpu.bandwidth, on_its_way / LATENCY)
    traffic = loaded + stored
    possible = max(operations / useful / peak, traffic / bandwidth)
    return round(max(operations / peak, traffic / gpu.bandwidth) / possible, 3)


def rows(
    widths: tuple[int, ...],
    dtypes: tuple[str, ...],
    activation: str,
    n_experts: int = N_EXPERTS,
    k: int = K,
) -> Iterator[Row]:
    """The report, a row for each launch that compiles to something of its own."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter compiles nothing. Unset it.")
    for capability in GPUS:
        for dim in widths:
            for dtype in dtypes:
                found = (
                    read(launch, capability, dtype, dim)
                    for launch in record(dim, DTYPES[dtype], activation, n_experts, k)
                )
                yield from dict.fromkeys(found)


def write(path: Path, report: list[Row]) -> None:
    """The report as CSV, whole or not at all."""
    new = path.with_suffix(".tmp")
    with new.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(Row._fields)
        table.writerows(report)
    new.replace(path)


if __name__ == "__main__":
    report = []
    for row in rows(WIDTHS, tuple(DTYPES), "relu"):
        report.append(row)
        print(*row, sep="  ", flush=True)
    write(Path(__file__).parent / "results" / "kernels.csv", report)
