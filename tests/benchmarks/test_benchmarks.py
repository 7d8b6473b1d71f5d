"""The benchmarks measure what they say: right providers, stated formulas, all memory."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import goals, machine, plot, providers, readme, table
from benchmarks.measure import Roofline, Spread, interleaved
from benchmarks.peers import PEERS
from benchmarks.problem import TOLERANCE, Problem, true_answer
from benchmarks.profiled import Meter, StepMemory, step_memory
from benchmarks.providers import OWN, GemmLoop, MaskLoop, Ours, Provider, Unavailable
from benchmarks.runner import measure_shape
from benchmarks.shapes import CPU_SHAPES, GPU_SHAPES, Shape, flops, min_bytes, parse_shapes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = Shape("small", 3, 37, 16, 3)
EXACT = [provider for provider in (*OWN, *PEERS) if provider.exact]
FACTS = machine.facts(CPU)
LIMITS = Roofline(flops=1e11, bytes=1e10)


def rows_of(*chosen, shape=SMALL, rounds=2):
    return measure_shape(
        shape,
        list(chosen),
        device=CPU,
        dtype=torch.float32,
        rounds=rounds,
        roofline=LIMITS,
        facts=FACTS,
    )


def row(**changes):
    shared = {"batch": 2, "tokens": 100, "dim": 48, "attribute_values": 4, "device": "cpu"}
    texts = {f.name: "" for f in dataclasses.fields(table.Row) if f.type == "str"}
    timed = {"dtype": "float32", "threads": "2", "status": "timed", "median_ms": 1.0}
    return table.Row(**{**texts, **shared, **timed, **changes})


# --- what is right ---------------------------------------------------------------------------


def test_the_truth_equals_the_naive_loop():
    problem = Problem.random(SMALL, "cpu", torch.float64)
    params = {n: p.clone().requires_grad_() for n, p in problem.weights.items()}
    x_BTD = problem.x_BTD.detach().clone().requires_grad_()
    values = [[value] for value in problem.attributes_B.tolist()]
    y_BTD, *_ = naive.dmoe(
        x_BTD, values, params, sizes=(3,), unknown="error", k=2, activation="relu"
    )
    y_BTD.backward(problem.dy_BTD)
    got = true_answer(
        problem.x_BTD.detach().flatten(0, 1),
        problem.attributes_B.repeat_interleave(SMALL.tokens),
        problem.dy_BTD.flatten(0, 1),
        problem.weights,
    )
    for mine, true in (
        (got.y_TD, y_BTD.flatten(0, 1)),
        (got.dx_TD, x_BTD.grad.flatten(0, 1)),
        (got.dw1_EHD, params["w1_EHD"].grad),
    ):
        torch.testing.assert_close(mine, true.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("provider", EXACT, ids=lambda p: p.name)
def test_every_available_provider_is_right(provider, dtype):
    problem = Problem.random(SMALL, "cpu", dtype)
    try:
        layer = provider.build(problem)
    except (Unavailable, ImportError) as reason:
        pytest.skip(str(reason))
    assert problem.error_of(layer, bias=provider.bias) <= TOLERANCE[dtype]
    assert len(problem.checked_tokens()) > 50


def test_those_that_need_nothing_more_are_available():
    here = {r.provider for r in rows_of(*OWN, PEERS[0]) if r.status == "timed"}
    assert here == {"eager", "mask-loop", "gemm-loop", "grouped-mm", "dense", "transformers"}


def one_percent_in_one_expert(layer):
    layer.w2_EDH.data[3] *= 1.01  # one expert of eight, one percent off


def nan_in_one_expert(layer):
    layer.b1_EH.data[5, 0] = float("nan")


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
    class Detached(MaskLoop):
        def forward(self, x_BTD, attributes_B):
            y_BTD = super().forward(x_BTD, attributes_B)
            return y_BTD + 0.1 * (x_BTD - x_BTD.detach())

    (got,) = rows_of(Provider("broken", lambda p: Detached(p.weights)))
    assert got.status.startswith("wrong")


def test_a_provider_that_raises_says_why_and_the_others_go_on():
    def build(problem):
        raise RuntimeError("no such kernel\nand a long trace")

    broken, loop, _ = rows_of(
        Provider("broken", build), Provider("mask-loop", lambda p: MaskLoop(p.weights))
    )
    assert broken.status == "failed: RuntimeError: no such kernel"
    assert loop.status == "timed"
    (missing,) = rows_of(next(p for p in PEERS if p.name == "scattermoe"))
    assert missing.status.startswith("unavailable: ")


def test_the_kernels_are_not_timed_on_a_cpu():
    (got,) = rows_of(next(p for p in OWN if p.name == "triton"))
    assert got.status.startswith("unavailable: the kernels run on a GPU")


def test_biases_count_unless_a_provider_has_none():
    problem = Problem.random(SMALL, "cpu", torch.float32)
    layer = GemmLoop(problem)
    layer.b1_EH.data.zero_()
    layer.b2_ED.data.zero_()
    assert problem.error_of(layer, bias=False) <= TOLERANCE[torch.float32]
    assert problem.error_of(layer, bias=True) > 1e-2


HERE = [provider for provider in (*OWN, PEERS[0]) if provider.name != "triton"]


@torch.no_grad()
@pytest.mark.parametrize("provider", HERE, ids=lambda p: p.name)
def test_a_tenth_of_the_outputs_is_dropped_in_training_and_none_in_eval(provider):
    problem = Problem.random(SMALL, "cpu", torch.float32)
    problem.weights["w2_EDH"].zero_()
    problem.weights["b2_ED"].fill_(1.0)  # every expert says 1, whatever its input
    layer = provider.build(problem)
    x_BTD, attributes_B = problem.x_BTD, problem.attributes_B
    torch.testing.assert_close(layer.eval()(x_BTD, attributes_B), torch.ones_like(x_BTD))
    y_BTD = torch.stack([layer.train()(x_BTD, attributes_B) for _ in range(4)])
    assert float(y_BTD.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(y_BTD.max()) == pytest.approx(1 / 0.9, rel=1e-3)
    # Of one expert's outputs a tenth is zero, of two experts' sum a hundredth.
    one = provider.name in ("dense", "transformers")
    share = float((y_BTD == 0).float().mean())
    assert share == pytest.approx(0.1 if one else 0.01, rel=0.4)


@pytest.mark.parametrize("provider", [p for p in HERE if p.routes], ids=lambda p: p.name)
def test_the_router_is_noisy_in_training_and_not_in_eval(provider, monkeypatch):
    monkeypatch.setattr(providers, "DROPOUT", 0.0)
    problem = Problem.random(SMALL, "cpu", torch.float32)
    layer = provider.build(problem)
    once, again = (layer.eval()(problem.x_BTD, problem.attributes_B) for _ in range(2))
    assert torch.equal(once, again)
    once, again = (layer.train()(problem.x_BTD, problem.attributes_B) for _ in range(2))
    assert (once != again).float().mean() > 0.9


# --- formulas and figures --------------------------------------------------------------------


def test_flops_and_bytes_are_the_stated_formulas():
    shape = Shape("", 2, 5, 3, 4)  # T=10, D=3, H=12, A=4; E=8, k=2
    experts, router = 2 * (2 * 2 * 10 * 3 * 12), 2 * 2 * 8 * 3 * 10
    assert flops(shape, "forward") == experts + router == 3840
    assert flops(shape, "forward+backward") == 3 * 3840
    assert flops(shape, "forward", routes=False) == 2880
    parameters = 4 * 2 * 8 * 4 + 8 * (2 * 3 * 12 + 12 + 3)
    assert min_bytes(shape, "forward", 2) == 2 * (60 + parameters)
    assert min_bytes(shape, "forward+backward", 2) == 2 * (150 + 3 * parameters)
    assert min_bytes(shape, "router", 2) == 2 * (30 + 256) + 10 * (16 + 8 + 32)
    # The dense MLP: its FLOPs are k experts', so are its weights (its second bias is one expert's).
    assert min_bytes(shape, "forward", 4, routes=False) == 4 * (60 + 2 * (2 * 3 * 12 + 12 + 3))


def test_stage_0_has_the_tokens_of_a_halved_volume():
    stages = {shape.name: shape for shape in GPU_SHAPES["goals"] + GPU_SHAPES["stages"]}
    sides = [(192, 192, 64), (96, 96, 32), (48, 48, 16), (24, 24, 8), (12, 12, 4)]
    for i, (a, b, c) in enumerate(sides):
        assert stages[f"stage-{i}"].tokens == a * b * c
    assert [stages[f"stage-{i}"].dim for i in range(5)] == [24, 24, 48, 96, 192]
    assert (stages["2d"].batch, stages["2d"].tokens, stages["2d"].dim) == (42, 196, 768)


def test_figures_divide_the_formulas_by_the_median():
    shape = Shape("", 1, 1000, 10, 1)
    found = table.figures(
        shape,
        "forward+backward",
        Spread(0.5, 0.4, 0.7, 5),
        Spread(1.0, 1.0, 1.0, 5),
        StepMemory(forward_peak=1, peak=80_000, held=40_000, excess=20_000),
        LIMITS,
        torch.float32,
        routes=True,
        counts_flops=True,
    )
    work, moved = (
        3 * (2 * 2 * 2 * 1000 * 10 * 40 + 320_000),
        min_bytes(shape, "forward+backward", 4),
    )
    assert found["median_ms"] == 500
    assert (found["low_ms"], found["high_ms"], found["rounds"]) == (400, 700, 5)
    assert found["ratio_to_loop"] == 2
    assert found["tflops"] == pytest.approx(work / 0.5 / 1e12)
    assert found["gbytes_per_s"] == pytest.approx(moved / 0.5 / 1e9)
    assert found["roofline_share"] == pytest.approx(max(work / 1e11, moved / 1e10) / 0.5)
    assert (found["peak_bytes"], found["held_td"], found["excess_td"]) == (80_000, 1.0, 0.5)


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
        step_memory(layer, problem) for layer in (Ours(problem, "eager"), MaskLoop(problem.weights))
    )
    unit = problem.x_BTD.numel() * 4
    assert ours.held <= unit < 8 * unit < loop.held
    assert ours.peak < loop.peak


# --- what is written -------------------------------------------------------------------------


def test_the_csv_holds_every_column_and_comes_back(tmp_path):
    rows = rows_of(*(p for p in OWN if p.name in ("eager", "triton", "mask-loop")))
    path = tmp_path / "run.csv"
    path.write_text("older", encoding="utf-8")
    table.write_csv(rows, path)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in dataclasses.fields(table.Row)]
    assert [(r["provider"], r["which"]) for r in read] == [
        ("eager", "forward"), ("eager", "forward+backward"), ("eager", "router"), ("triton", ""),
        ("mask-loop", "forward"), ("mask-loop", "forward+backward"),
    ]  # fmt: skip
    for written, got in zip(rows, read, strict=True):
        for name in read[0]:
            value = getattr(written, name)
            if isinstance(value, float):
                assert float(got[name]) == pytest.approx(value, rel=1e-5)
            else:
                assert got[name] == ("" if value is None else str(value))
        assert got["torch"] == torch.__version__
        assert all(got[name] for name in ("date", "commit", "machine", "threads", "python"))
    assert [file.name for file in tmp_path.iterdir()] == ["run.csv"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.csv"
    path.write_text("older", encoding="utf-8")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(table.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        table.write_whole(path, b"new")
    assert path.read_text(encoding="utf-8") == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["run.csv"]


def test_the_commit_is_unknown_outside_git(tmp_path):
    assert machine.commit(tmp_path) == "unknown"


def test_goals_compare_ours_with_the_loop():
    def pair(which, ours_ms, loop_ms, **memory):
        names = {"shape": "stage-0-cut", "which": which}
        return [
            row(provider="eager", median_ms=ours_ms, peak_bytes=memory.get("ours"), **names),
            row(provider="mask-loop", median_ms=loop_ms, peak_bytes=memory.get("loop"), **names),
        ]

    rows = pair("forward", 10.0, 19.0) + pair("forward+backward", 10.0, 16.0, ours=30, loop=100)
    forward, both, memory = goals.goals(rows)
    assert (forward.measured, forward.bound, forward.met) == (1.9, 1.8, True)
    assert (both.measured, both.bound, both.met) == (1.6, 1.7, False)
    assert (memory.measured, memory.bound, memory.met) == (pytest.approx(0.3), 0.35, True)
    assert "**missed**" in goals.goals_table(rows)
    assert "The goals are set for" not in goals.goals_table(rows)
    other = [dataclasses.replace(r, threads="8") for r in rows]
    assert "The goals are set for 2 threads" in goals.goals_table(other)


def test_gpu_goals_take_the_best_peer_of_the_same_maths():
    def gpu(provider, ms, which="forward+backward", **more):
        names = {"device": "cuda", "shape": "2d", "which": which}
        return row(provider=provider, median_ms=ms, **names, **more)

    rows = [
        gpu("triton", 2.0, held_td=1.1, excess_td=3.0),
        gpu("triton", 1.0, "router kernel", roofline_share=0.65),
        *(gpu(name, ms) for name, ms in (("eager", 9.0), ("mask-loop", 8.0), ("dense", 1.0))),
        *(gpu(name, ms) for name, ms in (("scattermoe", 5.0), ("gemm-loop", 6.0), ("st-moe", 0.1))),
    ]
    found = {goal.what: goal for goal in goals.goals(rows)}
    by_words = {what.split("faster than ")[-1]: goal.measured for what, goal in found.items()}
    assert by_words["mask-loop"] == 4.0
    assert by_words["the best other, scattermoe"] == 2.5
    assert by_words["dense MLP of equal active FLOPs"] == 0.5
    router = found["router kernel, share of the measured copy bandwidth"]
    assert (router.measured, router.bound, router.met) == (0.65, 0.7, False)


def test_the_readme_says_where_we_lose():
    rows = [
        row(shape="s", provider=name, which="forward", median_ms=ms)
        for name, ms in (("eager", 4.0), ("mask-loop", 5.0), ("dense", 2.0))
    ]
    assert readme.losses(rows).endswith("- s, forward: dense 2.00×")
    assert "nowhere" in readme.losses(rows[:2])


def test_the_readme_is_renewed_between_the_marks_of_its_device(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- cpu: begin -->\nold\n<!-- cpu: end -->\nz\n", encoding="utf-8")
    rows = [
        row(shape="s", provider="eager", which=which, peak_bytes=2**20, commit="abc")
        for which in ("forward", "forward+backward")
    ]
    readme.write_results(rows, path, "cpu-float32")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- cpu: begin -->\n**CPU only")
    assert text.endswith("<!-- cpu: end -->\nz\n")
    assert "old" not in text
    assert "| s: 2×100×48 | 1 / 1 ms, 1 MiB |" in text
    with pytest.raises(ValueError, match="cuda: begin"):
        readme.write_results([dataclasses.replace(rows[0], device="cuda")], path, "cuda-bfloat16")
    assert path.read_text(encoding="utf-8") == text


def test_the_committed_readme_has_both_marks():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for device in ("cpu", "cuda"):
        assert text.count(f"<!-- {device}: begin -->") == text.count(f"<!-- {device}: end -->") == 1


def test_curves_rise_with_the_tokens_of_the_sweep():
    rows = [
        row(provider="eager", which=which, tokens=tokens, median_ms=ms, peak_bytes=2**20, dim=dim)
        for which, tokens, ms, dim in (
            ("forward+backward", 400, 4.0, 48),
            ("forward+backward", 100, 1.0, 48),
            ("forward", 100, 0.5, 48),
            ("forward+backward", 100, 9.0, 24),
        )
    ]
    assert plot.curves(rows) == {"eager": [(200, 1.0, 1.0), (800, 4.0, 1.0)]}


# --- the command -----------------------------------------------------------------------------


def test_shapes_are_named_grouped_or_spelled_out():
    names = [shape.name for shape in parse_shapes("goals,stage-4,wide-48,2x8x16x3", "cpu")]
    assert names == [*(s.name for s in CPU_SHAPES["goals"]), "stage-4", "2x8x16x3"]
    assert {s.name for s in parse_shapes("all", "cuda")} == {
        s.name for group in GPU_SHAPES.values() for s in group
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "stage-9"], "shapes: got 'stage-9', expected one of all, quick, goals"),
        (["--shapes", "2x8x0x3"], "shapes: got '2x8x0x3'"),
        (["--providers", "eager,vllm"], "providers: got 'vllm', expected all or some of eager"),
        (["--rounds", "0"], "rounds: got 0, expected 1 or more"),
        (["--threads", "0"], "threads: got 0, expected 1 or more"),
        (["--device", "cuda"], "device: got cuda, but PyTorch finds no GPU"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(words, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cli, "measure_roofline", lambda *_: pytest.fail("it ran"))
    assert cli.main([*words, "--out", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(cli, "measure_roofline", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert cli.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "out: got" in error
    assert "expected a folder that can be written to" in error


def test_a_small_run_goes_from_the_command_to_table_csv_and_plot(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--out", tmp_path]
    command += ["--shapes", "2x64x48x3,2x128x48x3,1x96x24x1", "--rounds", "1"]
    # Its × and — are printed to pipes that have none, too.
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="ascii", env=ascii_only)
    assert done.returncode == 0, done.stderr
    for words in (
        "CPU only",
        "Measured limits",
        "| mask-loop | forward+backward |",
        "unavailable",
    ):
        assert words in done.stdout
    assert "wrong" not in done.stdout
    assert "failed" not in done.stdout
    names = ["cpu-float32.csv", "cpu-float32.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / names[1]).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / names[0]).open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert {r["shape"] for r in read} == {"2x64x48x3", "2x128x48x3", "1x96x24x1"}
    assert {r["provider"] for r in read} == set(cli.PROVIDERS)
