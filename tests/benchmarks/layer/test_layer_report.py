"""What a page says of a run: goals, losses, sections and curves."""

import dataclasses

import pytest
from harness.benchmark_runs import row_of

from benchmarks.layer.goals import goals, goals_table
from benchmarks.layer.plot import curves
from benchmarks.layer.report import losses, section
from benchmarks.output import README, SECTIONS
from reference_models.errors import DataError
from reference_models.markdown import replace_section


def test_goals_compare_ours_with_the_loop():
    def pair(which, ours_ms, loop_ms, **memory):
        names = {"shape": "stage-0-cut", "which": which, "capability": "AVX512"}
        return [
            row_of(provider="eager", median_ms=ours_ms, peak_bytes=memory.get("ours"), **names),
            row_of(provider="mask-loop", median_ms=loop_ms, peak_bytes=memory.get("loop"), **names),
        ]

    rows = pair("forward", 10.0, 29.0) + pair("forward+backward", 10.0, 23.0, ours=30, loop=100)
    forward, both, memory, others = goals(rows)
    assert (forward.measured, forward.bound, forward.met) == (2.9, 2.8, True)
    assert (both.measured, both.bound, both.met) == (2.3, 2.4, False)
    assert (memory.measured, memory.bound, memory.met) == (pytest.approx(0.3), 0.35, True)
    assert (others.measured, others.bound, others.met) == (pytest.approx(10 / 23), 1.05, True)
    assert others.what.endswith("worst case: forward+backward beside mask-loop")
    assert "**missed**" in goals_table(rows)
    assert "The goals are set for" not in goals_table(rows)
    other = [dataclasses.replace(r, threads="8") for r in rows]
    assert "The goals are set for 2 threads" in goals_table(other)


@pytest.mark.parametrize(
    ("capability", "floors"),
    [
        ("AVX2", [2.2, 2.0, 1.8, 1.5, 1.5, 1.25, 1.2, 1.1, 1.1, 1.1, 1.1, 1.1]),
        ("AVX512", [2.8, 2.4, 2.7, 2.2, 2.2, 1.8, 2.0, 1.6, 1.1, 1.1, 1.1, 1.1]),
        ("DEFAULT", []),
        ("NO AVX", []),
        ("", []),
    ],
)
def test_floors_are_those_of_the_instruction_set(capability, floors):
    names = ("stage-0-cut", "wide-48", "wide-192", "2d-cut", "sweep-2048", "small-196")
    rows = [
        row_of(shape=shape, provider=provider, which=which, capability=capability)
        for shape in names
        for provider in ("eager", "mask-loop")
        for which in ("forward", "forward+backward", "eval")
    ]
    found = goals(rows)
    of_loop = [(g.shape, g.bound) for g in found if "times faster than mask-loop" in g.what]
    assert of_loop == list(zip([name for name in names for _ in (0, 1)], floors, strict=False))
    # What is relative holds on each of them.
    assert sum("the fastest other" in goal.what for goal in found) == len(names)


def test_no_other_may_be_faster_at_any_shape_and_in_any_pass():
    times = {
        "eager": (10.0, 10.0, 10.0),
        "mask-loop": (20.0, 9.8, 30.0),
        "st-moe": (30.0, 30.0, 9.0),
        "gemm-loop": (30.0, 30.0, 9.3),
        "dense": (1.0, 1.0, 1.0),  # is no rival: it has no experts
    }
    passes = ("forward", "forward+backward", "eval")
    rows = [
        row_of(shape=shape, provider=name, which=which, median_ms=ms)
        for shape in ("small-49", "spelled out")
        for name, of in times.items()
        for which, ms in zip(passes, of, strict=True)
    ]
    for shape, goal in zip(("small-49", "spelled out"), goals(rows), strict=True):
        assert (goal.shape, goal.measured, goal.met) == (shape, pytest.approx(10 / 9), False)
        assert goal.what.endswith("worst case: eval beside st-moe")
    only_ours = [row for row in rows if row.provider in ("eager", "dense")]
    assert goals(only_ours) == []


def test_goals_beside_the_dense_mlp():
    bounds = {
        ("small-196", "eval"): 1.35,
        ("pooled-1", "eval"): 3.0,
        ("sweep-2048", "forward+backward"): 2.0,
    }
    for (shape, which), bound in bounds.items():
        rows = [
            row_of(shape=shape, which=which, provider="eager", median_ms=bound - 0.1),
            row_of(shape=shape, which=which, provider="dense", median_ms=1.0),
        ]
        (goal,) = goals(rows)
        assert (goal.bound, goal.at_most, goal.met) == (bound, True, True)
        assert goal.measured == pytest.approx(bound - 0.1)
        (missed,) = goals([dataclasses.replace(rows[0], median_ms=bound + 0.1), rows[1]])
        assert missed.met is False


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
    assert by_words["the fastest other, scattermoe"] == 2.5
    assert by_words["a dense MLP of equal active FLOPs"] == 0.5
    router = found["router kernel, as a share of the copy bandwidth"]
    assert (router.measured, router.bound, router.met) == (0.65, 0.7, False)


def test_the_readme_says_where_we_lose():
    rows = [
        row_of(shape="s", provider=name, which=which, median_ms=ms)
        for which in ("forward", "eval")
        for name, ms in (("eager", 4.0), ("mask-loop", 5.0), ("dense", 2.0))
    ]
    assert losses(rows).endswith("- s, forward: dense 2.00×\n- s, eval: dense 2.00×")
    assert "nowhere" in losses(rows[:2])


def test_the_readme_is_renewed_between_the_marks_of_its_instruction_set(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(
        "a\n<!-- cpu-avx2: begin -->\nold\n<!-- cpu-avx2: end -->\nz\n", encoding="utf-8"
    )
    facts = {"commit": "abc", "machine": "CPU, 2 cores", "vendor": "AuthenticAMD family 25"}
    facts |= {"capability": "AVX2", "road": "oneDNN", "rounds": 7}
    rows = [
        row_of(shape="s", provider="eager", which=which, peak_bytes=2**20, median_ms=ms, **facts)
        for which, ms in (("forward", 1.0), ("forward+backward", 3.0), ("eval", 0.5))
    ]
    replace_section(path, "cpu-avx2", section(rows, "cpu-avx2-float32"))
    text = path.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- cpu-avx2: begin -->\n**CPU only")
    assert text.endswith("<!-- cpu-avx2: end -->\nz\n")
    assert "old" not in text
    assert "CPU, 2 cores (AuthenticAMD family 25; AVX2); matrix products of this" in text
    assert "layer by oneDNN; float32" in text
    assert "7 rounds" in text
    assert "| s: 2×100×48 | 1 / 3 / 0.5 ms, 1 MiB |" in text
    with pytest.raises(DataError, match="cuda: begin"):
        replace_section(path, "cuda", section(rows, "cuda-bfloat16"))
    assert path.read_text(encoding="utf-8") == text


def test_rounds_are_those_of_the_shape_with_the_fewest_and_of_that_with_the_most():
    rows = [
        row_of(shape=name, provider="eager", which="eval", rounds=rounds)
        for name, rounds in (("a", 20), ("b", 5), ("c", 50))
    ]
    assert ", 5 to 50 rounds, " in section(rows, "cpu-avx2-float32")


def test_the_committed_readme_has_the_marks_of_every_section():
    text = README.read_text(encoding="utf-8")
    for mark in SECTIONS:
        assert text.count(f"<!-- {mark}: begin -->") == text.count(f"<!-- {mark}: end -->") == 1


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
