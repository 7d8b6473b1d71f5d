"""The worst of all kernels at each width, dtype and GPU: what spills, and what does not fit."""

from __future__ import annotations

import ast
import csv
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

import torch

from ..machine import ROOT
from .binary import read_resources
from .launches import Launch, LayerStep, fused_activations
from .report import DTYPES

# The layer's own dtypes, and parameters and x in fp32 under autocast in bf16.
PRECISIONS = (*DTYPES, "autocast")
WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_KERNELS = ROOT / "src" / "dmoe_layer" / "fused" / "kernels"


@dataclass(frozen=True)
class MatrixRow:
    """A line of the CSV: the worst of the binaries of a width, all activations together.

    ``sources`` tells its kernels' code and blocks apart. ``stack_bytes`` are what spills;
    ``stack_in`` and ``shared_in`` are the kernels that have most of it, empty where none has any.
    """

    triton: str
    capability: int
    dtype: str
    dim: int
    sources: str
    binaries: int
    registers: int
    stack_bytes: int
    stack_in: str
    shared_bytes: int
    shared_in: str

    @property
    def what(self) -> tuple[str, int, str, int]:
        """The key of a row; a later row with the same key replaces it."""
        return self.triton, self.capability, self.dtype, self.dim


def matrix_rows(
    capabilities: Sequence[int], dtypes: Sequence[str], widths: Sequence[int], old: list[MatrixRow]
) -> Iterator[MatrixRow]:
    """A row of each that ``old`` has not by this Triton, with the same code and blocks."""
    import triton

    done = {(row.what, row.sources) for row in old}
    for capability, dtype, dim in product(capabilities, dtypes, widths):
        launches = recorded_launches(capability, dtype, dim)
        sources = kernel_sources(launches)
        if ((triton.__version__, capability, dtype, dim), sources) in done:
            continue
        found = [
            (
                f"{launch.kernel.__name__} {launch.variant} {activation}".replace("  ", " "),
                read_resources(launch, capability),
            )
            for launch, activation in launches.values()
        ]
        spilling = max(found, key=lambda one: one[1].stack_bytes)
        largest = max(found, key=lambda one: one[1].shared_bytes)
        yield MatrixRow(
            triton=triton.__version__,
            capability=capability,
            dtype=dtype,
            dim=dim,
            sources=sources,
            binaries=len(found),
            registers=max(binary.registers for _, binary in found),
            stack_bytes=spilling[1].stack_bytes,
            stack_in=spilling[0] if spilling[1].stack_bytes else "",
            shared_bytes=largest[1].shared_bytes,
            shared_in=largest[0],
        )


def recorded_launches(
    capability: int, dtype: str, dim: int
) -> dict[tuple[Any, ...], tuple[Launch, str]]:
    """Each launch of a width by its key, with the activation that it is first compiled for."""
    found: dict[tuple[Any, ...], tuple[Launch, str]] = {}
    for activation in fused_activations():
        step = LayerStep(
            dim, DTYPES.get(dtype, torch.float32), activation, capability=capability,
            autocast=dtype not in DTYPES,
        )  # fmt: skip
        for launch in step.launches():
            found.setdefault(launch.key, (launch, activation))
    return found


def merged(old: list[MatrixRow], new: list[MatrixRow]) -> list[MatrixRow]:
    """All rows in order, the newer one where both are of the same."""
    rows = {row.what: row for row in (*old, *new)}
    return [rows[what] for what in sorted(rows)]


def read_matrix(path: Path) -> list[MatrixRow]:
    """The rows of a file; none if there is none."""
    if not path.exists():
        return []
    kinds = get_type_hints(MatrixRow)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [MatrixRow(**{name: kinds[name](cell) for name, cell in row.items()}) for row in rows]


def kernel_sources(launches: Iterable[tuple[Any, ...]]) -> str:
    """Eight digits of launches' keys, and of their kernels' code with all that it uses."""
    code, found = _code(_KERNELS), set()
    keys = sorted(launches, key=repr)
    names = [str(key[0]) for key in keys]
    while names:
        name = names.pop()
        if name in code and name not in found:
            found.add(name)
            names += code[name]
    used = [code[name] for name in sorted(found)]
    return hashlib.sha256(repr((keys, used)).encode()).hexdigest()[:8]


@functools.cache
def _code(folder: Path) -> dict[str, list[str]]:
    """The tokens of each function and constant, without comments and docstrings."""
    code = {}
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(word.lineno for word in node.decorator_list)])
                code[node.name] = _tokens("".join(lines[first - 1 : node.end_lineno]))
            elif isinstance(node, ast.Assign):
                constant = "".join(lines[node.lineno - 1 : node.end_lineno])
                code.update(dict.fromkeys(map(ast.unparse, node.targets), _tokens(constant)))
    return code


def _tokens(text: str) -> list[str]:
    found, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and before in _STARTS
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            before = token.type
            if not is_docstring and token.string.strip():
                found.append(token.string)
    return found


# What stands before a docstring.
_STARTS = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
