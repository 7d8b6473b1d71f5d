"""What is wrong is not timed, what is missing is said, and memory is that of a step."""

import pytest
import torch
from harness.benchmark_runs import SMALL, rows_of

from benchmarks.layer.ours import OURS, Ours
from benchmarks.layer.peers import PEERS
from benchmarks.layer.plain import GemmLoop, PaperLayer
from benchmarks.layer.problem import Problem
from benchmarks.layer.provider import Provider
from benchmarks.layer.shapes import Shape
from benchmarks.layer.step import step_memory
from dmoe_layer import routing


def one_percent_in_one_expert(layer):
    layer.w2_EDH.data[3] *= 1.01  # one expert of eight, one percent off


def nan_in_one_expert(layer):
    layer.w1_bias.data[5, 0] = float("nan")


@pytest.mark.parametrize("damage", [one_percent_in_one_expert, nan_in_one_expert])
def test_a_wrong_provider_is_reported_and_not_timed(damage):
    def build(problem):
        layer = GemmLoop(problem)
        damage(layer)
        return layer

    (got,) = rows_of(Provider("broken", build))
    assert got.status.startswith("wrong (relative error")
    assert (got.median_ms, got.peak_bytes, got.rounds) == (None, None, None)


def test_a_wrong_gradient_alone_is_seen():
    class Detached(PaperLayer):
        def forward(self, x_BTD, attributes_B):
            y_BTD = super().forward(x_BTD, attributes_B)
            return y_BTD + 0.1 * (x_BTD - x_BTD.detach())

    (got,) = rows_of(Provider("broken", Detached))
    assert got.status.startswith("wrong")


def test_a_provider_that_raises_says_why_and_the_others_go_on():
    def build(problem):
        raise RuntimeError("no such kernel\nand a long trace")

    broken, loop, *_ = rows_of(Provider("broken", build), Provider("mask-loop", PaperLayer))
    assert broken.status == "failed: RuntimeError: no such kernel"
    assert loop.status == "timed"
    (missing,) = rows_of(next(p for p in PEERS if p.name == "scattermoe"))
    assert missing.status.startswith("unavailable: ")


def test_the_kernels_are_not_timed_on_a_cpu():
    (got,) = rows_of(next(p for p in OURS if p.name == "triton"))
    assert got.status.startswith("unavailable: the kernels run on a GPU")


def test_the_router_alone_is_a_call_of_the_layer_that_ends_behind_it():
    problem = Problem.random(SMALL, "cpu", torch.float32)
    ours = Ours(problem, "eager").eval()
    calls = []
    ours.layer.router.register_forward_hook(lambda *_: calls.append("router"))
    for backend in ("eager", "auto"):
        ours.layer.backend = backend  # "auto" is here as the kernels: chosen by the layer
        with routing(problem.attributes_B) as recorded:
            ours.route(problem.x_BTD, problem.attributes_B)
        assert not recorded.routings
    assert calls == ["router", "router"]
    y_BTD = ours(problem.x_BTD, problem.attributes_B)  # and the next call is whole again
    assert y_BTD.shape == problem.x_BTD.shape


def test_step_memory_is_that_of_a_layer_worked_out_by_hand():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(16))

        def forward(self, x_BTD, attributes_B):
            return (x_BTD * self.w).exp()  # keeps y for backward, and x

    problem = Problem.random(SMALL, "cpu", torch.float32)
    memory = step_memory(Square(), problem)
    unit = problem.x_BTD.numel() * 4
    assert memory.forward_peak == 2 * unit
    assert memory.held == 0  # x·w is gone, and y does not count
    # y, exp's gradient, the gradients of x and, before its sum, of w.
    assert memory.peak == pytest.approx(4 * unit, rel=0.05)
    assert memory.excess == pytest.approx(2 * unit, rel=0.1)


def test_ours_keeps_less_for_backward_than_the_loop():
    problem = Problem.random(Shape("", 2, 2048, 24, 3), "cpu", torch.float32)
    ours, loop = (
        step_memory(layer, problem) for layer in (Ours(problem, "eager"), PaperLayer(problem))
    )
    unit = problem.x_BTD.numel() * 4
    assert ours.held <= unit < 8 * unit < loop.held
    assert ours.peak < loop.peak
