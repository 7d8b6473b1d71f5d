"""The pass in eval mode: without noise, dropout and gradients; the layer trains again behind it."""

import pytest
import torch
from harness.benchmark_runs import CPU, RUN, SMALL, rows_of
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layer.ours import OURS, Ours
from benchmarks.layer.plain import PLAIN, Dense, PaperLayer
from benchmarks.layer.problem import Problem
from benchmarks.layer.provider import Layer, Provider
from benchmarks.layer.rows import timed_row
from benchmarks.layer.runner import step_spreads, step_tasks
from benchmarks.layer.shapes import flops
from benchmarks.layer.step import PASSES, StepMemory, eval_laps, step_memory
from benchmarks.measure import Spread, Stopwatch, rounds_that_fit


def small():
    return Problem.random(SMALL, "cpu", torch.float32)


class Watched(Layer):
    """Notes of each call whether it trains and whether gradients are recorded."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x_BTD, attributes_B):
        self.calls.append((self.training, torch.is_grad_enabled(), x_BTD.requires_grad))
        return x_BTD * self.w


def test_eval_is_neither_trained_nor_recorded_and_training_goes_on_behind_it():
    layer = Watched().train()
    eval_laps(Stopwatch(CPU), layer, small())
    assert layer.calls == [(False, False, False)]
    assert layer.training


def test_a_layer_trains_again_where_its_eval_failed():
    class Broken(Watched):
        def forward(self, x_BTD, attributes_B):
            raise RuntimeError

    layer = Broken().train()
    with pytest.raises(RuntimeError):
        eval_laps(Stopwatch(CPU), layer, small())
    assert layer.training
    assert torch.is_grad_enabled()


def test_steps_and_calls_in_eval_mode_take_turns_and_each_is_what_it_says():
    layer = Watched().train()
    spreads = step_spreads(step_tasks({"it": layer}, small(), Stopwatch(CPU)), rounds=8)
    assert tuple(sorted(spreads["it"], key=PASSES.index)) == PASSES
    assert {spread.rounds for spread in spreads["it"].values()} == {8}
    assert sorted(layer.calls) == [(False, False, False)] * 8 + [(True, True, True)] * 8
    assert layer.calls[0::2] != layer.calls[1::2] != [(False, False, False)] * 8


def test_memory_of_eval_is_what_is_live_in_it():
    class Doubled(Watched):
        def forward(self, x_BTD, attributes_B):
            super().forward(x_BTD, attributes_B)
            return (x_BTD * self.w).exp()

    layer, problem = Doubled(), small()
    unit = problem.x_BTD.numel() * 4
    assert step_memory(layer, problem).eval_peak == 2 * unit  # x·w and y
    assert layer.calls == [(True, True, True), (False, False, False)]
    assert layer.training


def test_every_provider_has_a_row_of_each_pass_with_figures_of_its_own():
    rows = rows_of(*(p for p in (*OURS, *PLAIN) if p.name in ("eager", "mask-loop", "dense")))
    assert [(row.provider, row.which) for row in rows if row.which in PASSES] == [
        (name, which) for name in ("eager", "mask-loop", "dense") for which in PASSES
    ]
    loop = {row.which: row for row in rows if row.provider == "mask-loop"}
    for row in rows:
        if row.which in PASSES:
            assert row.ratio_to_loop == loop[row.which].median_ms / row.median_ms
            assert row.peak_bytes > 0
            assert (row.held_td is None) == (row.which != "forward+backward")
    by_pass = {row.which: row for row in rows if row.provider == "eager"}
    assert by_pass["eval"].peak_bytes <= by_pass["forward"].peak_bytes
    work = flops(SMALL, "eval")
    assert by_pass["eval"].tflops == pytest.approx(work / by_pass["eval"].median_ms / 1e9)


def test_the_peak_of_a_row_is_that_of_its_pass():
    memory = StepMemory(forward_peak=1, peak=2, held=3, excess=4, eval_peak=5)
    rows = [
        timed_row(
            RUN, SMALL, Provider("x", Dense), which, Spread.of([1.0]),
            loop=None, memory=memory, error=None,
        )
        for which in PASSES
    ]  # fmt: skip
    assert [row.peak_bytes for row in rows] == [1, 2, 5]


@torch.no_grad()
def test_what_eval_computes_is_the_stated_formula():
    problem = small()
    for layer in (Ours(problem, "eager"), PaperLayer(problem)):
        with FlopCounterMode(display=False) as counter:
            layer.eval()(problem.x_BTD.detach(), problem.attributes_B)
        assert counter.get_total_flops() == flops(SMALL, "eval")


def test_short_steps_have_many_rounds_and_long_steps_few():
    calls = []

    def tasks(*seconds):
        def task(lap):
            calls.append(lap)
            return [lap / 2, lap]

        return {str(lap): lambda lap=lap: task(lap) for lap in seconds}

    assert rounds_that_fit(tasks(0.25, 0.75), 20.0, 5, 50) == 20
    assert sorted(calls) == [0.25, 0.75]  # one round
    assert rounds_that_fit(tasks(0.001, 0.002), 20.0, 5, 50) == 50
    assert rounds_that_fit(tasks(7.0), 20.0, 5, 50) == 5
    assert rounds_that_fit({}, 20.0, 5, 50) == 50
