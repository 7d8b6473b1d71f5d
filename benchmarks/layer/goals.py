"""The layer's goals, and a table of them beside what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from reference_models.markdown import markdown_table

from .rows import OUR_BACKENDS, LayerRow, timed_rows
from .step import EVAL, PASSES, TRAINING

# All goals of CPUs are set for fp32 and so many threads.
THREADS = 2
# By instruction set and shape, times faster than the boolean-mask loop: forward and
# forward+backward. On other instruction sets nobody has measured what can be had.
_CPU_SPEED = {
    "AVX2": {
        "stage-0-cut": (2.2, 2.0),
        "wide-48": (1.8, 1.5),
        "wide-192": (1.5, 1.25),
        "2d-cut": (1.2, 1.1),
        "sweep-2048": (1.1, 1.1),
        "small-196": (1.1, 1.1),
    },
    "AVX512": {
        "stage-0-cut": (2.8, 2.4),
        "wide-48": (2.7, 2.2),
        "wide-192": (2.2, 1.8),
        "2d-cut": (2.0, 1.6),
        "sweep-2048": (1.1, 1.1),
        "small-196": (1.1, 1.1),
    },
}
# Shape: share of the boolean-mask loop's peak memory in forward+backward.
_CPU_MEMORY = {"stage-0-cut": 0.35}
# Shape and pass: time beside the dense MLP of equal active FLOPs.
_CPU_DENSE = {
    ("sweep-2048", "forward+backward"): 2.0,
    ("small-196", EVAL): 1.35,
    ("pooled-1", EVAL): 3.0,
}
# At every shape and in every pass: time beside the fastest of these.
_CPU_RIVALS = ("mask-loop", "gemm-loop", "grouped-mm", "transformers", "st-moe")
_CPU_BEHIND = 1.05
_ROUTER_SHARE = 0.70
_NOT_PEERS = (*OUR_BACKENDS, "mask-loop", "dense", "st-moe")


class _GpuBounds(NamedTuple):
    """Goals of forward+backward: times faster than others, and memory in T·d.

    ``loop``, ``peer``, ``dense``: the boolean-mask loop, the best peer, and the dense MLP of equal
    active FLOPs. ``held``: what is stored for backward beside x. ``excess``: the peak above x, y
    and gradients.
    """

    loop: float
    peer: float
    dense: float
    held: float | None = None
    excess: float | None = None


_GPU = {
    "2d": _GpuBounds(6.0, 1.15, 0.8),
    "stage-0": _GpuBounds(10.0, 3.0, 1.0, held=1.5, excess=4.0),
    "stage-0-wide": _GpuBounds(10.0, 3.0, 1.0, held=1.5, excess=4.0),
}


@dataclass(frozen=True)
class Goal:
    """``measured`` against ``bound``; without a bound it only stands in the table."""

    shape: str
    what: str
    measured: float | None
    bound: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is nothing to compare."""
        if self.measured is None or self.bound is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def goals(rows: list[LayerRow]) -> list[Goal]:
    """The goals for the run's device at the shapes that it measured."""
    if not rows:
        return []
    found = _Measured(rows)
    return _gpu_goals(found) if rows[0].device == "cuda" else _cpu_goals(found)


def goals_table(rows: list[LayerRow], figures: str = "measured") -> str:
    """The goals in Markdown, with the conditions they are set for.

    ``figures``: what the rows hold, as the table's header says it.
    """
    found = goals(rows)
    if not found:
        return ""
    verdicts = {True: "met", False: "**missed**", None: "—"}
    lines = []
    for goal in found:
        sign = "≤" if goal.at_most else "≥"
        lines.append(
            [
                goal.shape,
                goal.what,
                f"not {figures}" if goal.measured is None else f"{goal.measured:.2f}",
                "—" if goal.bound is None else f"{sign} {goal.bound:g}",
                verdicts[goal.met],
            ]
        )
    table = markdown_table(["shape", "what", figures, "goal", ""], lines)
    row = rows[0]
    if row.device == "cpu" and (row.threads, row.dtype) != (str(THREADS), "float32"):
        table += (
            f"\n\nThe goals are set for {THREADS} threads and float32; this run had "
            f"{row.threads} and {row.dtype}."
        )
    return table


class _Measured:
    """Finds the figures of two providers that are compared."""

    def __init__(self, rows: list[LayerRow]) -> None:
        self.timed = timed_rows(rows)
        self.shapes = list(dict.fromkeys(row.shape for row in rows))
        self.capability = rows[0].capability

    def ours(self, shape: str, which: str) -> LayerRow | None:
        """The kernels where they were timed, else plain PyTorch."""
        rows = (self.timed.get((shape, name, which)) for name in OUR_BACKENDS)
        return next((row for row in rows if row), None)

    def best_peer(self, shape: str, which: str) -> str | None:
        """The fastest provider of the same maths that is not ours."""
        peers = {provider for _, provider, _ in self.timed if provider not in _NOT_PEERS}
        return self.fastest(shape, which, peers)

    def fastest(self, shape: str, which: str, providers: Iterable[str]) -> str | None:
        """The fastest of these that were timed."""
        rows = {name: self.timed.get((shape, name, which)) for name in providers}
        times = {name: row.median_ms for name, row in rows.items() if row and row.median_ms}
        return min(times, key=lambda name: times[name], default=None)

    def behind(self, shape: str) -> tuple[float, str] | None:
        """The worst of our passes beside the fastest rival's: time over its time, and which."""
        found = []
        for which in PASSES:
            rival = self.fastest(shape, which, _CPU_RIVALS)
            ratio = self.ratio(shape, rival, which, _time) if rival else None
            if ratio:
                found.append((1 / ratio, f"{which} beside {rival}"))
        return max(found, default=None)

    def ratio(
        self, shape: str, other: str, which: str, of: Callable[[LayerRow], float | None]
    ) -> float | None:
        """``of(other) / of(ours)``."""
        ours, theirs = self.ours(shape, which), self.timed.get((shape, other, which))
        if ours is None or theirs is None:
            return None
        above, below = of(theirs), of(ours)
        return above / below if above is not None and below else None


def _cpu_goals(found: _Measured) -> list[Goal]:
    result = []
    speed = _CPU_SPEED.get(found.capability, {})
    for shape in found.shapes:
        for which, bound in zip(TRAINING, speed.get(shape, ()), strict=False):
            ratio = found.ratio(shape, "mask-loop", which, _time)
            result.append(Goal(shape, f"{which}, times faster than mask-loop", ratio, bound))
        if shape in _CPU_MEMORY:
            inverse = found.ratio(shape, "mask-loop", "forward+backward", _peak)
            share = None if inverse is None else 1 / inverse
            what = "peak memory of forward+backward, as a share of mask-loop's"
            result.append(Goal(shape, what, share, _CPU_MEMORY[shape], at_most=True))
        for (at, which), bound in _CPU_DENSE.items():
            if at == shape:
                ratio = found.ratio(shape, "dense", which, _time)
                times = None if ratio is None else 1 / ratio
                what = f"{which}, time, × that of a dense MLP of equal active FLOPs"
                result.append(Goal(shape, what, times, bound, at_most=True))
        if worst := found.behind(shape):
            times, where = worst
            what = f"time, × that of the fastest other, worst case: {where}"
            result.append(Goal(shape, what, times, _CPU_BEHIND, at_most=True))
    return result


def _gpu_goals(found: _Measured) -> list[Goal]:
    result, which = [], "forward+backward"
    for shape, bounds in _GPU.items():
        if shape not in found.shapes:
            continue
        rivals = [("mask-loop", "mask-loop", bounds.loop)]
        if best := found.best_peer(shape, which):
            rivals.append((best, f"the fastest other, {best}", bounds.peer))
        rivals.append(("dense", "a dense MLP of equal active FLOPs", bounds.dense))
        for rival, words, bound in rivals:
            ratio = found.ratio(shape, rival, which, _time)
            result.append(Goal(shape, f"{which}, times faster than {words}", ratio, bound))
        ours, router = found.ours(shape, which), found.ours(shape, "router kernel")
        held, excess = (ours.held_td, ours.excess_td) if ours else (None, None)
        what = "memory between forward and backward beside x, in T·d"
        result.append(Goal(shape, what, held, bounds.held, at_most=True))
        what = "peak memory above x, y and all gradients, in T·d"
        result.append(Goal(shape, what, excess, bounds.excess, at_most=True))
        share = router.roofline_share if router else None
        what = "router kernel, as a share of the copy bandwidth"
        result.append(Goal(shape, what, share, _ROUTER_SHARE))
    return result


def _time(row: LayerRow) -> float | None:
    return row.median_ms


def _peak(row: LayerRow) -> float | None:
    return row.peak_bytes
