"""The sweep times what gives the layer's own numbers, and says of the rest why it did not."""

from contextlib import contextmanager

import pytest
import torch
from harness.benchmark_runs import SMALL

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import sweep
from benchmarks.layer.ours import Ours

CPU = torch.device("cpu")
KERNELS = {"": 40e-6, "fast": 20e-6, "slow": 90e-6}


@pytest.fixture
def rows(monkeypatch):
    """Those of a sweep in which one candidate computes something else, and one cannot be run."""
    blocks_now = ["none"]

    @contextmanager
    def other_blocks(blocks):
        if blocks == "broken":
            raise RuntimeError("out of resource: shared memory\nmore")
        blocks_now[0] = blocks
        yield

    class Layer(Ours):
        def __init__(self, problem, backend):
            assert backend == "triton"
            super().__init__(problem, "eager")

        def forward(self, x_BTD, attributes_B):
            y_BTD = super().forward(x_BTD, attributes_B)
            return y_BTD * 1.1 if blocks_now[0] == "wrong" else y_BTD

    def kernels(step, watch, rounds):
        step()
        seconds = KERNELS[blocks_now[0]]
        return [[("mlp", seconds), ("sum", 5e-6), ("sum", 6e-6)] for _ in range(rounds)]

    monkeypatch.setattr(sweep, "other_blocks", other_blocks)
    monkeypatch.setattr(sweep, "Ours", Layer)
    monkeypatch.setattr(sweep, "named_kernel_seconds", kernels)
    monkeypatch.setitem(sweep.CANDIDATES, SMALL.name, ("slow", "wrong", "broken", "fast"))
    return list(sweep.measure_sweep(SMALL, CPU, rounds=3))


def test_right_candidates_are_timed_launch_by_launch(rows):
    found = {(row.blocks, row.launch): row.microseconds for row in rows if row.status == "timed"}
    for blocks, seconds in KERNELS.items():
        assert found.pop((blocks, sweep.HOST)) > 0
        assert found.pop((blocks, "mlp")) == pytest.approx(1e6 * seconds)
        assert found.pop((blocks, "sum 1")) == pytest.approx(5)
        assert found.pop((blocks, "sum 2")) == pytest.approx(6)
        assert found.pop((blocks, sweep.KERNELS)) == pytest.approx(1e6 * seconds + 11)
    assert not found
    assert all(row.relative_error == 0 for row in rows if row.status == "timed")


def test_wrong_and_broken_candidates_have_no_time_and_say_why(rows):
    others = {row.blocks: row for row in rows if row.status != "timed"}
    assert others["wrong"].status == "wrong, not timed"
    assert others["wrong"].relative_error == pytest.approx(0.1, rel=0.1)
    assert others["broken"].status == "failed: RuntimeError: out of resource: shared memory"
    assert {row.microseconds for row in others.values()} == {None}


def test_the_table_has_the_fastest_first_and_the_rest_last(rows):
    lines = sweep.sweep_table(rows).splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") for line in lines] == [
        "fast", "own", "slow", "wrong", "broken",
    ]  # fmt: skip
    assert "mlp 20, sum 2 6, sum 1 5" in lines[0]
    assert "out of resource" in lines[-1]


@pytest.mark.parametrize("words", [["sweep", "2d"], ["prewarm"]])
def test_without_a_gpu_sweep_and_prewarm_end_with_a_sentence(words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(words) == 2
    assert f"{words[0]}: needs a GPU, and PyTorch finds none." in capsys.readouterr().err
