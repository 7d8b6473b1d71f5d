"""Steps take turns, and all memory is seen."""

import torch
from harness.benchmark_runs import CPU

from benchmarks.measure import interleaved
from benchmarks.profiled import Meter


def test_rounds_are_interleaved_in_changing_order():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) or [float(len(calls))] for name in "abc"}
    laps = interleaved(tasks, rounds=8)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(lap) for name, lap in laps.items()} == {"a": 8, "b": 8, "c": 8}


def test_the_meter_sees_known_allocations():
    mib = 2**20
    with Meter(CPU) as meter:
        first = torch.empty(3 * mib, dtype=torch.int8)
        second = torch.empty(8 * mib, dtype=torch.int8)
        del second
        meter.mark()
        third = torch.empty(2 * mib, dtype=torch.int8)
        del first
        fourth = torch.empty(12 * mib, dtype=torch.int8)
        del fourth
    assert meter.marks == [(3 * mib, 11 * mib), (2 * mib, 14 * mib)]
    assert third.numel() == 2 * mib
