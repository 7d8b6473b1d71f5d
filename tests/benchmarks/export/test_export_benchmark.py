"""The benchmark of exported programs compares equal work, and renews its rows piece by piece."""

import csv
from dataclasses import replace
from functools import partial

import onnxruntime
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import output
from benchmarks.export import command, subjects
from benchmarks.export.rows import read_rows, section
from benchmarks.export.subjects import SUBJECTS, Subject, dense_twin
from benchmarks.export.ways import WAYS
from benchmarks.output import README, RESULTS
from dmoe_layer import DMoE, routing
from reference_models import markdown

TINY = Subject(partial(DMoE, 6, n_experts=3, hidden_dim=5, attribute_sizes=4), (2, 3, 6))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SUBJECTS, "layer-1x196x768", TINY)


def flops(model, x, attributes):
    with FlopCounterMode(display=False) as counter, routing(attributes), torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["layer-1x196x768", "resunet3d-1x64"])
def test_the_dense_twin_does_the_experts_work_and_no_routing(name, monkeypatch):
    whole = subjects.ResUNet3D
    small = Subject(lambda: whole(2, n_classes=2, attribute_sizes=4), (1, 1, 64, 32, 32))
    subject = TINY if name.startswith("layer") else small
    network, x, attributes = subject.network(), subject.x(), subject.attributes()
    routed = []
    with torch.no_grad(), routing(attributes) as scope:
        network(x)
        routed = [(r.logits.shape, r.logits.numel()) for r in scope.routings]
    dims = [m.dim for m in network.modules() if isinstance(m, DMoE)]
    router = sum(2 * numel * dim for (_, numel), dim in zip(routed, dims, strict=True))
    expected = flops(network, x, attributes) - router
    twin = dense_twin(network)
    assert not any(isinstance(module, DMoE) for module in twin.modules())
    assert flops(twin, x, attributes) == expected


def test_all_ways_compute_the_same_and_renew_their_own_rows(tiny, tmp_path, capsys):
    words = ["--subjects", "layer-1x196x768", "--files", str(tmp_path / "files"), "--seconds", "0"]
    words += ["--out", str(tmp_path)]
    ways = "eager,onnx-sparse,onnx-dense,mlp-eager,mlp-onnx"
    assert command.main([*words, "--ways", ways]) == 0
    (file,) = tmp_path.glob("export-*.csv")
    first = read_rows(file)
    assert [row.way for row in first] == [way for way in WAYS if way in ways.split(",")]
    assert all(row.ms > 0 for row in first)
    assert all(row.difference < 1e-5 for row in first)
    assert {row.onnxruntime for row in first} == {onnxruntime.__version__}
    written = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.onnx")}
    assert len(written) == 3
    assert command.main([*words, "--ways", "eager,onnx-dense"]) == 0
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.onnx")} == written
    second = {row.way: row for row in read_rows(file)}
    assert [*second] == [row.way for row in first]
    assert second["onnx-sparse"] == first[1]
    shown = section(read_rows(file))
    assert "| layer-1x196x768 | 1 | onnx-sparse |" in shown.replace(
        f"| {first[0].threads} |", "| 1 |"
    )
    assert "≤ 1.1" in shown
    assert "× eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ways", "onnx-dense"], "ways: got 'onnx-dense', expected eager among them"),
        (["--subjects", "unet"], "subjects: got 'unet', expected all or some of layer-1x196x768"),
        (["--threads", "0"], "threads: got 0, expected 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(words, message, capsys):
    assert command.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_run_into_the_results_renews_the_page_from_all_rows(
    tiny, one_thread, tmp_path, monkeypatch
):
    page, words = tmp_path / "README.md", ["--seconds", "0", "--out", str(tmp_path)]
    page.write_text(
        "".join(markdown.section(f"export-{kind}", "") for kind in output.SECTIONS),
        encoding="utf-8",
    )
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(output, "RESULTS", tmp_path)
    monkeypatch.setattr(output, "README", page)
    words += ["--subjects", "layer-1x196x768"]
    for threads in ("1", "2"):
        assert command.main([*words, "--ways", "eager,mlp-eager", "--threads", threads]) == 0
    (file,) = tmp_path.glob("export-*.csv")
    assert {row.threads for row in read_rows(file)} == {"1", "2"}
    assert markdown.section(file.stem, section(read_rows(file))) in page.read_text(encoding="utf-8")


def test_the_page_shows_the_committed_rows():
    shown = README.read_text(encoding="utf-8")
    for file in RESULTS.glob("export-*.csv"):
        assert markdown.section(file.stem, section(read_rows(file))) in shown, file


def test_where_pytorch_is_held_back_onnxruntime_is_not_judged_beside_it():
    (file,) = RESULTS.glob("export-cpu-avx512.csv")
    held = [replace(row, machine=f"{row.machine}, held to AVX2 by IT") for row in read_rows(file)]
    assert "| eager |" not in section(held).split("| goal |")[1]
    assert "ONNX Runtime chooses its instructions by the processor" in section(held)
    assert "ONNX Runtime chooses" not in section(read_rows(file))


def test_the_committed_rows_are_of_subjects_and_ways_that_there_are():
    for file in RESULTS.glob("export-*.csv"):
        with file.open(encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                assert row["subject"] in SUBJECTS
                assert row["way"] in WAYS
