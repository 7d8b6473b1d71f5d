"""How cost grows: one number at a time, beside the arithmetic; what is left out is said."""

import csv
import dataclasses

import pytest
import torch
from harness.benchmark_runs import FACTS, asks_for_the_page

from benchmarks.growth import command, measuring
from benchmarks.growth.axes import Axis, axes
from benchmarks.growth.measuring import measure_axis
from benchmarks.growth.plot import write_plot
from benchmarks.growth.report import growth_table, outgrown, points_table, section
from benchmarks.growth.rows import GrowthRow, curves
from benchmarks.layer.plain import GemmLoop
from benchmarks.layer.provider import Provider
from benchmarks.layer.shapes import Shape, flops
from benchmarks.output import README

TINY = Shape("tiny", 2, 32, 16, 3)


def row_of(value=1, provider="eager", which="eval", **changes):
    """A row as if it had been measured."""
    facts = dataclasses.asdict(dataclasses.replace(FACTS, capability="AVX2", road="oneDNN"))
    shared = {"axis": "experts", "batch": 2, "tokens": 8, "dim": 16, "attribute_values": 3}
    timed = {"status": "timed", "flops": 100, "median_ms": 1.0, "peak_bytes": 2**20, "rounds": 2}
    which_of = {"value": value, "provider": provider, "which": which, "experts": 8, "k": 2}
    return GrowthRow(**{**facts, **shared, **timed, **which_of, **changes})


def test_one_number_grows_at_a_time_over_the_range_that_the_page_states():
    ranges = {
        "tokens": ("total_tokens", 2**10, 2**20),
        "experts": ("experts", 2, 64),
        "k": ("k", 1, 8),
        "attribute values": ("values", 1, 1000),
        "D": ("dim", 16, 1024),
    }
    assert [axis.title for axis in axes()] == list(ranges)
    for axis in axes():
        name, first, last = ranges[axis.title]
        shapes = axis.shapes()
        assert [value for value, _ in shapes] == sorted({value for value, _ in shapes})
        assert (shapes[0][0], shapes[-1][0]) == (first, last)
        assert all(getattr(shape, name) == value for value, shape in shapes)
        own = {"name", "tokens" if name == "total_tokens" else name}
        others = [
            {f: v for f, v in dataclasses.asdict(shape).items() if f not in own}
            for _, shape in shapes
        ]
        assert all(other == others[0] for other in others)
        assert all(shape.k <= shape.experts for _, shape in shapes)
    assert all(len(axis.values) == 2 for axis in axes(quick=True))


@pytest.mark.parametrize(
    ("name", "values"),
    [("total_tokens", (32, 64)), ("experts", (2, 5)), ("k", (1, 8)), ("values", (2, 50))],
)
def test_each_provider_is_right_and_measured_at_every_point(name, values):
    rows = measure_axis(Axis(name, name, TINY, values), FACTS, rounds=1)
    assert {row.status for row in rows} == {"timed"}
    assert [(row.value, row.provider, row.which) for row in rows] == [
        (value, provider, which)
        for value in values
        for provider in ("eager", "mask-loop", "dense")
        for which in ("forward+backward", "eval")
    ]
    assert all(row.rounds == 1 and row.median_ms > 0 and row.peak_bytes > 0 for row in rows)
    last = Axis(name, name, TINY, values).shapes()[-1][1]
    ours, dense = rows[-6], rows[-2]
    assert (ours.experts, ours.k, ours.attribute_values) == (last.experts, last.k, last.values)
    assert ours.flops == flops(last, "forward+backward")
    assert dense.flops == flops(last, "forward+backward", routes=False)


def test_a_provider_that_is_wrong_is_said_and_not_timed(monkeypatch):
    def broken(problem):
        layer = GemmLoop(problem)
        layer.w2_EDH.data[0] *= 1.01
        return layer

    monkeypatch.setattr(measuring, "PROVIDERS", [Provider("eager", broken)])
    axis = Axis("k", "k", TINY, (2,))
    (row,) = measure_axis(axis, FACTS, rounds=1)
    assert row.status.startswith("wrong (relative error")
    assert (row.median_ms, row.peak_bytes) == (None, None)
    assert "wrong (" in points_table([row])
    # Of large points the truth is not asked.
    monkeypatch.setattr(measuring, "LARGE", 0.0)
    assert {row.status for row in measure_axis(axis, FACTS, rounds=1)} == {"timed"}


def test_large_points_have_the_fewest_rounds_and_others_what_fits(monkeypatch):
    axis = Axis("k", "k", TINY, (1,))
    monkeypatch.setattr(measuring, "MOST_ROUNDS", 4)
    assert {row.rounds for row in measure_axis(axis, FACTS, rounds=None)} == {4}
    monkeypatch.setattr(measuring, "LARGE", 0.0)
    assert {row.rounds for row in measure_axis(axis, FACTS, rounds=None)} == {2}


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"MOST_SECONDS": 0.0}, "left out: a step would take"),
        ({"free_bytes": lambda: 1.0}, "left out: would take 0.0 GiB"),
    ],
)
def test_what_would_take_too_long_or_too_much_is_left_out_and_said(limit, reason, monkeypatch):
    for name, value in limit.items():
        monkeypatch.setattr(measuring, name, value)
    rows = measure_axis(Axis("total_tokens", "tokens", TINY, (32, 64)), FACTS, rounds=1)
    assert [row.status for row in rows if row.value == 32] == ["timed"] * 6
    late = [row for row in rows if row.value == 64]
    assert [row.provider for row in late] == ["eager", "mask-loop", "dense"]
    assert all(row.status.startswith(reason) and row.median_ms is None for row in late)
    assert points_table(rows).count(reason) == 3


def test_what_is_too_much_is_foretold_by_the_arithmetic(monkeypatch):
    small, large = Shape("", 2, 32, 16, 3), Shape("", 2, 96, 16, 3)
    known = measuring._Known({"eager": (flops(small, "forward+backward"), 2.0, 100)})
    monkeypatch.setattr(measuring, "free_bytes", lambda: 1e9)
    monkeypatch.setattr(measuring, "MOST_SECONDS", 6.1)
    assert known.too_much("eager", large) == ""
    assert known.too_much("dense", large) == ""  # of which nothing is known
    monkeypatch.setattr(measuring, "MOST_SECONDS", 5.9)
    assert known.too_much("eager", large) == "left out: a step would take 6 s, and may 6"
    assert known.too_much("eager", small) == ""
    monkeypatch.setattr(measuring, "MOST_SECONDS", 100.0)
    monkeypatch.setattr(measuring, "free_bytes", lambda: 374.0)  # of which four fifths are 299.2
    assert known.too_much("eager", large).startswith("left out: would take")


def test_growth_is_the_last_point_over_the_first_beside_the_arithmetic():
    rows = [
        row_of(2, median_ms=10.0, flops=100, peak_bytes=100),
        row_of(8, median_ms=15.0, flops=110, peak_bytes=400),
        row_of(64, median_ms=30.0, flops=120, peak_bytes=200),
        row_of(2, "mask-loop", median_ms=1.0, peak_bytes=100),
        row_of(8, "mask-loop", median_ms=5.0, peak_bytes=300),
        row_of(64, "mask-loop", "", median_ms=None, status="left out: too long"),
    ]
    line = "| experts 2 → 64 | eval | × 32 | × 1.2 | × 3, × 2 | × 5, × 3 to 8 |"
    assert line in growth_table(rows).splitlines()
    assert "- experts 2 → 64, eval: time × 3, arithmetic × 1.2 (mask-loop × 5)" in outgrown(rows)
    assert "left out: too long" in points_table(rows)
    nearly = [row_of(2, median_ms=1.0, flops=100), row_of(64, median_ms=2.4, flops=200)]
    assert outgrown(nearly).endswith("nowhere.")  # within a quarter


def test_the_section_says_what_it_was_measured_with():
    rows = [row_of(value, which=w) for value in (2, 4) for w in ("forward+backward", "eval")]
    text = section(rows, "growth-cpu-avx2")
    assert text.startswith("**CPU only")
    assert "AVX2); matrix products of this layer by oneDNN; float32" in text
    assert "(results/growth-cpu-avx2.csv)" in text
    assert "(results/growth-cpu-avx2.png)" in text
    assert "| experts 2 | 1 / 1 ms, 1 / 1 MiB |" in text
    assert list(curves(rows)) == [
        ("experts", "eager", "forward+backward"), ("experts", "eager", "eval")
    ]  # fmt: skip


def test_the_page_has_a_section_for_each_instruction_set():
    text = README.read_text(encoding="utf-8")
    for mark in ("growth-cpu-avx2", "growth-cpu-avx512"):
        assert text.count(f"<!-- {mark}: begin -->") == text.count(f"<!-- {mark}: end -->") == 1


def test_a_picture_needs_two_points(tmp_path):
    path = tmp_path / "growth.png"
    assert not write_plot([row_of(2)], path)
    assert not path.exists()
    assert write_plot([row_of(2), row_of(4, which="forward+backward"), row_of(8)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    small = [Axis("k", "k", TINY, (1, 2)), Axis("dim", "D", TINY, (16, 32))]
    monkeypatch.setattr(command, "axes", lambda quick: small)
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "growth-cpu-avx2.csv", "growth-cpu-avx2.png"
    }  # fmt: skip
    with (tmp_path / "growth-cpu-avx2.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in dataclasses.fields(GrowthRow)]
    assert len(read) == 2 * 2 * 3 * 2
    assert {row["rounds"] for row in read} == {"2"}
    said = capsys.readouterr().out
    assert "### D" in said
    assert "| k 1 → 2 | eval | × 2 |" in said


@pytest.mark.parametrize(
    ("words", "capability", "whole"),
    [
        ([], "AVX2", True),
        (["--threads", "2"], "AVX512", True),
        (["--threads", "1"], "AVX2", False),
        (["--quick"], "AVX2", False),
        ([], "DEFAULT", False),
    ],
)
def test_the_page_is_for_whole_runs_on_what_it_has_a_section_for(
    words, capability, whole, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert asks_for_the_page(command, words, monkeypatch) == whole


@pytest.mark.parametrize("word", ["--rounds", "--threads"])
def test_wrong_words_are_errors_before_anything_runs(word, capsys, monkeypatch):
    monkeypatch.setattr(command, "measure_axis", lambda *_: pytest.fail("it ran"))
    assert command.main([word, "0"]) == 2
    assert f"{word.strip('-')}: got 0, expected 1 or more" in capsys.readouterr().err
