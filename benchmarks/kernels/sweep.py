"""Times the launches of a training step with other blocks than the layer's own, on a GPU.

Every candidate is held against the layer's own blocks first: the same seed must give the same
output and gradients, but for rounding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from reference_models.markdown import markdown_table

from ..layer.ours import Ours
from ..layer.problem import Problem
from ..layer.shapes import Shape
from ..machine import RunFacts, run_facts
from ..measure import Stopwatch
from ..profiled import named_kernel_seconds
from .launches import other_blocks

# Of the goals' shapes, for the launches that a model foretells to be the longest.
CANDIDATES = {
    "stage-0": (
        "rows:warps=8",
        "rows:rows=128,warps=8",
        "rows:stages=2",
        "weights:stages=2",
        "weights:stages=3",
        "weights:rows=128",
        "forward:rows=64",
    ),
    "stage-0-wide": (
        "rows:warps=8",
        "rows:rows=128,warps=8",
        "rows:stages=2",
        "weights:stages=2",
        "weights:rows=64,warps=4",
        "weights:hidden=32",
        "forward:hidden=64,stages=2",
    ),
    "2d": (
        "gemm:stages=3",
        "gemm:depth=32,stages=4",
        "gemm:columns=128,depth=64,stages=3",
        "gemm:columns=64,depth=64,warps=4",
    ),
}
# Of the norm, in bf16: other blocks sum in another order, and nothing else.
TOLERANCE = 1e-2
# The step as a whole: its kernels together, and what the CPU needs to launch them.
KERNELS, HOST = "all kernels", "host"


@dataclass(frozen=True)
class SweepRow(RunFacts):
    """A line of the CSV: a launch of a step with some blocks; empty ones are the layer's own.

    ``launch`` is a kernel's name, with a number if the step launches it several times, or one of
    ``KERNELS`` and ``HOST``. ``status`` is "timed", or says why there is no time.
    ``relative_error`` is beside the layer's own blocks, the largest of output and gradients.
    """

    shape: str
    blocks: str
    launch: str
    status: str
    relative_error: float | None = None
    microseconds: float | None = None


def measure_sweep(shape: Shape, device: torch.device, rounds: int) -> Iterator[SweepRow]:
    """The rows of one shape in bf16, the layer's own blocks first."""
    problem = Problem.random(shape, device.type, torch.bfloat16)
    layer, watch = Ours(problem, "triton").train(), Stopwatch(device)
    facts = asdict(run_facts(device, torch.bfloat16))
    own: list[Tensor] = []
    for blocks in ("", *CANDIDATES[shape.name]):
        row = SweepRow(**facts, shape=shape.name, blocks=blocks, launch=KERNELS, status="timed")
        try:
            with other_blocks(blocks):
                found = _outcome(layer, problem)
                own = own or found
                error = _error(found, own)
                row = replace(row, relative_error=error)
                if not error <= TOLERANCE:
                    yield replace(row, status="wrong, not timed")
                    continue
                times = _microseconds(lambda: _step(layer, problem), watch, rounds)
        except Exception as problem_met:
            first_line = (str(problem_met).splitlines() or [""])[0]
            yield replace(row, status=f"failed: {type(problem_met).__name__}: {first_line}")
            continue
        for launch, microseconds in times.items():
            yield replace(row, launch=launch, microseconds=microseconds)


def sweep_table(rows: Sequence[SweepRow]) -> str:
    """Blocks in the order of their steps' time, the five longest launches of each beside it."""
    lines = []
    by_blocks: dict[str, dict[str, SweepRow]] = {}
    for row in rows:
        by_blocks.setdefault(row.blocks, {})[row.launch] = row
    for blocks, launches in by_blocks.items():
        whole, host = launches.pop(KERNELS), launches.pop(HOST, None)
        longest = sorted(launches.values(), key=lambda row: -(row.microseconds or 0))[:5]
        cells = [
            f"{row.microseconds:.0f}" if row and row.microseconds else "—" for row in (whole, host)
        ]
        details = ", ".join(f"{row.launch} {row.microseconds:.0f}" for row in longest)
        error = "—" if whole.relative_error is None else f"{whole.relative_error:.1e}"
        said = details if whole.status == "timed" else whole.status
        lines.append((whole.microseconds or float("inf"), [blocks or "own", *cells, error, said]))
    header = ["blocks", "kernels, µs", "host, µs", "error", "longest launches, µs"]
    return markdown_table(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def _step(layer: Ours, problem: Problem) -> Tensor:
    layer.zero_grad(set_to_none=True)
    problem.x_BTD.grad = None
    y_BTD: Tensor = layer(problem.x_BTD, problem.attributes_B)
    y_BTD.backward(problem.dy_BTD)
    return y_BTD


def _outcome(layer: Ours, problem: Problem) -> list[Tensor]:
    """Output and all gradients, by one seed."""
    torch.manual_seed(1)
    y_BTD = _step(layer, problem).detach()
    return [y_BTD, *(p.grad for p in (problem.x_BTD, *layer.parameters()) if p.grad is not None)]


def _error(found: list[Tensor], own: list[Tensor]) -> float:
    """The largest relative one, in norm; infinite where a number is none."""
    pairs = [(f.double(), o.double()) for f, o in zip(found, own, strict=True)]
    errors = torch.stack([(f - o).norm() / o.norm() for f, o in pairs])
    return float(errors.max().nan_to_num(nan=float("inf")))


def _microseconds(step: Callable[[], object], watch: Stopwatch, rounds: int) -> dict[str, float]:
    """The medians of a step: of all its kernels, of the CPU, of each launch."""
    host = []
    for _ in range(rounds):
        watch.flush()
        start = time.perf_counter()
        step()
        host.append(time.perf_counter() - start)
    kernels = named_kernel_seconds(step, watch, rounds)
    names = [name for name, _ in kernels[0]]
    if not names or any([name for name, _ in one] != names for one in kernels):
        raise RuntimeError("the profiler did not see the same kernels in every round")
    spans = [[seconds for _, seconds in one] for one in kernels]
    times = {KERNELS: statistics.median(map(sum, spans)), HOST: statistics.median(host)}
    for i, name in enumerate(names):
        number = f" {names[: i + 1].count(name)}" if names.count(name) > 1 else ""
        times[name[:40] + number] = statistics.median(one[i] for one in spans)
    return {name: 1e6 * seconds for name, seconds in times.items()}
