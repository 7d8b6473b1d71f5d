"""Shapes are the paper's, and a row's figures are the stated formulas."""

import pytest
from harness.benchmark_runs import RUN

from benchmarks.layer.plain import GemmLoop
from benchmarks.layer.provider import Provider
from benchmarks.layer.rows import timed_row
from benchmarks.layer.shapes import (
    CPU_SHAPES,
    GPU_SHAPES,
    Shape,
    flops,
    min_bytes,
    parse_shapes,
)
from benchmarks.layer.step import StepMemory
from benchmarks.measure import Spread


def test_flops_and_bytes_are_the_stated_formulas():
    shape = Shape("", 2, 5, 3, 4)  # T=10, D=3, H=12, A=4; E=8, k=2
    experts, router = 2 * (2 * 2 * 10 * 3 * 12), 2 * 2 * 8 * 3 * 10
    assert flops(shape, "forward") == experts + router == 3840
    assert flops(shape, "forward+backward") == 3 * 3840
    assert flops(shape, "forward", routes=False) == 2880
    parameters = 4 * 2 * 8 * 4 + 8 * (2 * 3 * 12 + 12 + 3)
    assert min_bytes(shape, "forward", 2) == 2 * (60 + parameters)
    assert min_bytes(shape, "forward+backward", 2) == 2 * (150 + 3 * parameters)
    # In eval mode half of the router, that which makes the noise, is neither computed nor read.
    assert flops(shape, "eval") == experts + router // 2
    assert flops(shape, "eval", routes=False) == 2880
    assert min_bytes(shape, "eval", 2) == 2 * (60 + parameters - 4 * 8 * 4)
    assert min_bytes(shape, "router", 2) == 2 * (30 + 256) + 10 * (16 + 8 + 32)
    # The dense MLP: its FLOPs are k experts', so are its weights (its second bias is one expert's).
    assert min_bytes(shape, "forward", 4, routes=False) == 4 * (60 + 2 * (2 * 3 * 12 + 12 + 3))


def test_formulas_know_the_number_of_experts_and_how_many_a_token_takes():
    shape = Shape("", 2, 5, 3, 4, experts=16, k=3)
    assert flops(shape, "forward") == 2 * (2 * 3 * 10 * 3 * 12) + 2 * 2 * 16 * 3 * 10
    parameters = 4 * 2 * 16 * 4 + 16 * (2 * 3 * 12 + 12 + 3)
    assert min_bytes(shape, "forward", 2) == 2 * (60 + parameters)
    assert min_bytes(shape, "router", 2) == 2 * (30 + 512) + 10 * (24 + 12 + 64)
    assert min_bytes(shape, "forward", 4, routes=False) == 4 * (60 + 3 * (2 * 3 * 12 + 12 + 3))


def test_one_token_reads_the_experts_that_it_takes():
    shape = Shape("", 1, 1, 3, 1)
    assert min_bytes(shape, "forward", 4) == 4 * (6 + 2 * 8 * 4 + 2 * (2 * 3 * 12 + 12 + 3))


def test_stage_0_has_the_tokens_of_a_halved_volume():
    stages = {shape.name: shape for shape in GPU_SHAPES["goals"] + GPU_SHAPES["stages"]}
    sides = [(192, 192, 64), (96, 96, 32), (48, 48, 16), (24, 24, 8), (12, 12, 4)]
    for i, (a, b, c) in enumerate(sides):
        assert stages[f"stage-{i}"].tokens == a * b * c
    assert [stages[f"stage-{i}"].dim for i in range(5)] == [24, 24, 48, 96, 192]
    assert (stages["2d"].batch, stages["2d"].tokens, stages["2d"].dim) == (42, 196, 768)


def test_figures_divide_the_formulas_by_the_median():
    shape = Shape("", 1, 1000, 10, 1)
    found = timed_row(
        RUN,
        shape,
        Provider("theirs", GemmLoop),
        "forward+backward",
        Spread(0.5, 0.4, 0.7, 5),
        loop=Spread(1.0, 1.0, 1.0, 5),
        memory=StepMemory(forward_peak=1, peak=80_000, held=40_000, excess=20_000, eval_peak=2),
        error=1e-6,
    )
    work, moved = (
        3 * (2 * 2 * 2 * 1000 * 10 * 40 + 320_000),
        min_bytes(shape, "forward+backward", 4),
    )
    assert found.median_ms == 500
    assert (found.low_ms, found.high_ms, found.rounds) == (400, 700, 5)
    assert found.ratio_to_loop == 2
    assert found.tflops == pytest.approx(work / 0.5 / 1e12)
    assert found.gbytes_per_s == pytest.approx(moved / 0.5 / 1e9)
    assert found.roofline_share == pytest.approx(max(work / 1e11, moved / 1e10) / 0.5)
    assert (found.peak_bytes, found.held_td, found.excess_td) == (80_000, 1.0, 0.5)


def test_small_shapes_are_single_images_and_single_tokens():
    sizes = [(s.batch, s.tokens, s.dim) for s in CPU_SHAPES["small"]]
    assert sizes == [(1, 196, 768), (1, 49, 384), (1, 1024, 96), (64, 1, 768), (1, 1, 768)]
    assert all(3 <= shape.values <= 4 for shape in CPU_SHAPES["small"])
    assert {*parse_shapes("small", "cpu")} <= {*parse_shapes("all", "cpu")}


def test_shapes_are_named_grouped_or_spelled_out():
    names = [shape.name for shape in parse_shapes("goals,stage-4,wide-48,2x8x16x3", "cpu")]
    assert names == [*(s.name for s in CPU_SHAPES["goals"]), "stage-4", "2x8x16x3"]
    assert {s.name for s in parse_shapes("all", "cuda")} == {
        s.name for group in GPU_SHAPES.values() for s in group
    }
