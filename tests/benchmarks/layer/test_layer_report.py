"""What a page says of a run: goals, losses, sections and curves."""

import dataclasses

import pytest
from harness.benchmark_runs import row_of

from benchmarks.layer.goals import goals, goals_table
from benchmarks.layer.plot import curves
from benchmarks.layer.report import losses, section
from benchmarks.output import README
from reference_models.errors import DataError
from reference_models.markdown import replace_section


def test_goals_compare_ours_with_the_loop():
    def pair(which, ours_ms, loop_ms, **memory):
        names = {"shape": "stage-0-cut", "which": which}
        return [
            row_of(provider="eager", median_ms=ours_ms, peak_bytes=memory.get("ours"), **names),
            row_of(provider="mask-loop", median_ms=loop_ms, peak_bytes=memory.get("loop"), **names),
        ]

    rows = pair("forward", 10.0, 19.0) + pair("forward+backward", 10.0, 16.0, ours=30, loop=100)
    forward, both, memory = goals(rows)
    assert (forward.measured, forward.bound, forward.met) == (1.9, 1.8, True)
    assert (both.measured, both.bound, both.met) == (1.6, 1.7, False)
    assert (memory.measured, memory.bound, memory.met) == (pytest.approx(0.3), 0.35, True)
    assert "**missed**" in goals_table(rows)
    assert "The goals are set for" not in goals_table(rows)
    other = [dataclasses.replace(r, threads="8") for r in rows]
    assert "The goals are set for 2 threads" in goals_table(other)


def test_gpu_goals_take_the_best_peer_of_the_same_maths():
    def gpu(provider, ms, which="forward+backward", **more):
        names = {"device": "cuda", "shape": "2d", "which": which}
        return row_of(provider=provider, median_ms=ms, **names, **more)

    rows = [
        gpu("triton", 2.0, held_td=1.1, excess_td=3.0),
        gpu("triton", 1.0, "router kernel", roofline_share=0.65),
        *(gpu(name, ms) for name, ms in (("eager", 9.0), ("mask-loop", 8.0), ("dense", 1.0))),
        *(gpu(name, ms) for name, ms in (("scattermoe", 5.0), ("gemm-loop", 6.0), ("st-moe", 0.1))),
    ]
    found = {goal.what: goal for goal in goals(rows)}
    by_words = {what.split("faster than ")[-1]: goal.measured for what, goal in found.items()}
    assert by_words["mask-loop"] == 4.0
    assert by_words["the best other, scattermoe"] == 2.5
    assert by_words["dense MLP of equal active FLOPs"] == 0.5
    router = found["router kernel, share of the measured copy bandwidth"]
    assert (router.measured, router.bound, router.met) == (0.65, 0.7, False)


def test_the_readme_says_where_we_lose():
    rows = [
        row_of(shape="s", provider=name, which="forward", median_ms=ms)
        for name, ms in (("eager", 4.0), ("mask-loop", 5.0), ("dense", 2.0))
    ]
    assert losses(rows).endswith("- s, forward: dense 2.00×")
    assert "nowhere" in losses(rows[:2])


def test_the_readme_is_renewed_between_the_marks_of_its_device(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nz\n", encoding="utf-8")
    rows = [
        row_of(shape="s", provider="eager", which=which, peak_bytes=2**20, commit="abc")
        for which in ("forward", "forward+backward")
    ]
    replace_section(path, "cpu", section(rows, "cpu-float32"))
    text = path.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- cpu: begin -->\n**CPU only")
    assert text.endswith("<!-- cpu: end -->\nz\n")
    assert "old" not in text
    assert "| s: 2×100×48 | 1 / 1 ms, 1 MiB |" in text
    with pytest.raises(DataError, match="cuda: begin"):
        replace_section(path, "cuda", section(rows, "cuda-bfloat16"))
    assert path.read_text(encoding="utf-8") == text


def test_the_committed_readme_has_both_marks():
    text = README.read_text(encoding="utf-8")
    for device in ("cpu", "cuda"):
        assert text.count(f"<!-- {device}: begin -->") == text.count(f"<!-- {device}: end -->") == 1


def test_curves_rise_with_the_tokens_of_the_sweep():
    rows = [
        row_of(
            provider="eager", which=which, tokens=tokens, median_ms=ms, peak_bytes=2**20, dim=dim
        )
        for which, tokens, ms, dim in (
            ("forward+backward", 400, 4.0, 48),
            ("forward+backward", 100, 1.0, 48),
            ("forward", 100, 0.5, 48),
            ("forward+backward", 100, 9.0, 24),
        )
    ]
    assert curves(rows) == {"eager": [(200, 1.0, 1.0), (800, 4.0, 1.0)]}
