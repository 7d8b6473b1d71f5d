"""Compiles a launch's kernel for a GPU that need not be there, and reads the binary.

Triton is imported when it is called: not every system has it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .launches import Launch
from .loops import instructions_by_depth

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Of compute capability 8, 9 and 10.
_MATRIX = r"\b(?:H?G?MMA\.|UTC\w*MMA\b)[\w.]*"


class Resources(NamedTuple):
    """What a program of a compiled kernel takes; registers are those of a thread."""

    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int


class Binary(NamedTuple):
    """A compiled kernel: its resources, and what its machine code says.

    Attributes:
        instructions: a warp's, outside of loops, in loops, in loops inside of loops.
        loads_ahead: whether it copies to shared memory while it computes.
    """

    warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    matrix_instructions: str
    instructions: tuple[int, ...]
    loads_ahead: bool


def read_binary(launch: Launch, capability: int) -> Binary:
    """The launch's kernel as a GPU of this compute capability would run it."""
    compiled = compile_for(launch, capability)
    code = dump("--dump-sass", compiled)
    return Binary(
        *_resources(compiled),
        matrix_instructions=" ".join(sorted(set(re.findall(_MATRIX, code)))),
        instructions=instructions_by_depth(code),
        loads_ahead=bool(re.search(r"\b(LDGSTS|UBLKCP|UTMALDG)", code)),
    )


def read_resources(launch: Launch, capability: int) -> Resources:
    """Its resources alone: to disassemble a kernel takes as long as to compile it."""
    return _resources(compile_for(launch, capability))


def _resources(compiled: Any) -> Resources:
    usage = dump("--dump-resource-usage", compiled)
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(
        warps=compiled.metadata.num_warps,
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=compiled.metadata.shared,
    )


def compile_for(launch: Launch, capability: int) -> Any:
    """The launch's kernel as Triton compiles it for a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    options = dict(launch.options)
    # As Triton's own launcher specializes its arguments.
    for i, parameter in enumerate(launch.kernel.params):
        name, is_given = parameter.name, i < len(launch.arguments)
        value = launch.arguments[i] if is_given else options.pop(name)
        is_integer = isinstance(value, int) and not parameter.is_constexpr
        specialized = is_integer and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif is_integer:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialized and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dump(flag: str, compiled: Any) -> str:
    """The output of the disassembler that Triton brings; ``flag`` is one of its options."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return subprocess.run(
            [tool, flag, cubin], check=True, capture_output=True, encoding="utf-8"
        ).stdout
