"""Measures one patch: the memory and the time of every network's training step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ..machine import RunFacts, free_bytes
from ..measure import Spread, Stopwatch, interleaved
from .rows import VolumeRow, unmeasured_row, with_ratios, with_time
from .steps import COMPARED_WITH, Patch, Step

# A step of a larger patch takes a CPU a minute: its memory is measured, its time is not.
_TIMED_ON_CPU = 192 * 192 * 96
_AT_MOST = 0.9  # of the memory that a CPU has to give


def measure_patch(
    patch: Patch,
    networks: list[str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    facts: RunFacts,
    smaller: list[VolumeRow],
) -> list[VolumeRow]:
    """The rows of one patch, in the order of ``networks``.

    Args:
        rounds: timed ones; 0 for memory alone.
        smaller: rows of smaller patches, from which a CPU's memory is foretold: a network that
            would not fit is left out, since a CPU that runs out of memory ends more than the run.
    """
    rows: dict[str, VolumeRow] = {}
    steps: dict[str, Callable[[], list[float]]] = {}
    watch = Stopwatch(device)
    timed = rounds > 0 and (device.type != "cpu" or patch.voxels <= _TIMED_ON_CPU)
    for name in networks:
        row = unmeasured_row(facts, patch, name, "measured")
        if device.type == "cpu" and (reason := _too_large(name, patch, smaller)):
            rows[name] = replace(row, status=reason)
            continue
        try:
            step = Step(name, patch, device, dtype)
            if device.type != "cpu" or timed:
                step()  # compiles and tunes what has to be
            peak, held = step.memory()
        except torch.OutOfMemoryError:
            rows[name] = replace(row, status="out of memory")
            continue
        finally:
            gc.collect()  # what an error held
            if device.type == "cuda":
                torch.cuda.empty_cache()
        rows[name] = replace(row, peak_bytes=peak, held_bytes=held)
        steps[name] = partial(watch.laps, step)
    if timed:
        for name, laps in interleaved(steps, rounds).items():
            rows[name] = with_time(rows[name], Spread.of([seconds for (seconds,) in laps]))
    if dense := rows.get(COMPARED_WITH):
        return [with_ratios(row, dense) for row in rows.values()]
    return list(rows.values())


def _too_large(name: str, patch: Patch, smaller: list[VolumeRow]) -> str:
    """Why not to try; empty if nothing is known to stand against it."""
    known = {
        row.voxels: row.peak_bytes for row in smaller if row.network == name and row.peak_bytes
    }
    if not known:
        return ""
    largest = max(known)
    needed, free = known[largest] * patch.voxels / largest, free_bytes()
    if needed <= _AT_MOST * free:
        return ""
    return f"left out: would take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
