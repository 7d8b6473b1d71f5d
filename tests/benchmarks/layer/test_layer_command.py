"""``python -m benchmarks``: words are checked first; then tables, a CSV and a plot."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.benchmark_runs import asks_for_the_page, row_of

from benchmarks import output
from benchmarks.layer import command
from benchmarks.layer.roofline import Roofline

ROOT = Path(__file__).parents[3]


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
    monkeypatch.setattr(command, "measure_roofline", lambda *_: pytest.fail("it ran"))
    assert command.main([*words, "--out", str(tmp_path / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(command, "measure_roofline", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert command.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "out: got" in error
    assert "expected a folder that can be written to" in error


def test_a_readme_without_marks_is_a_sentence_and_the_figures_are_kept(
    capsys, monkeypatch, tmp_path
):
    readme = tmp_path / "README.md"
    readme.write_text("no marks", encoding="utf-8")
    monkeypatch.setattr(output, "README", readme)
    monkeypatch.setattr(output, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(command, "all_shapes", lambda device: [])
    monkeypatch.setattr(command, "PROVIDERS", {"mask-loop": command.PROVIDERS["mask-loop"]})
    words = ["--device", "cpu", "--shapes", "1x32x16x1", "--rounds", "1"]
    assert command.main(words) == 2
    assert "README.md: expected the marks <!-- cpu-avx2: begin -->" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "no marks"
    assert (tmp_path / "cpu-avx2-float32.csv").exists()


# A run of all that the page shows, as it shows it, may write there.
@pytest.mark.parametrize(
    ("words", "capability", "whole"),
    [
        ([], "AVX2", True),
        ([], "AVX512", True),
        (["--threads", "2"], "AVX2", True),
        (["--threads", "1"], "AVX2", False),
        (["--threads", "4"], "AVX2", False),
        (["--quick"], "AVX2", False),
        (["--dtype", "bfloat16"], "AVX2", False),
        (["--shapes", "goals"], "AVX2", False),
        ([], "DEFAULT", False),  # of which the page has no section
    ],
)
def test_the_page_is_for_whole_runs_as_it_shows_them(words, capability, whole, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert asks_for_the_page(command, ["--device", "cpu", *words], monkeypatch) == whole


@pytest.mark.parametrize(
    ("words", "shapes", "rounds"),
    [
        (["--quick"], ["quick-24", "quick-48"], 2),
        (["--quick", "--shapes", "stage-4"], ["stage-4"], 2),
        (["--quick", "--shapes", "stage-4", "--rounds", "3"], ["stage-4"], 3),
        (["--shapes", "stage-4"], ["stage-4"], None),  # by the runner's rule
    ],
)
def test_quick_shapes_and_rounds_combine(words, shapes, rounds, monkeypatch, tmp_path):
    measured = []

    def measure(shape, providers, run):
        measured.append((shape.name, run.rounds))
        return [row_of(shape=shape.name, provider="eager", which="eval")]

    monkeypatch.setattr(command, "measure_shape", measure)
    monkeypatch.setattr(command, "measure_roofline", lambda *_: Roofline(1e9, 1e9))
    assert command.main(["--device", "cpu", "--out", str(tmp_path), *words]) == 0
    assert measured == [(shape, rounds) for shape in shapes]


def test_the_command_needs_nothing_of_the_reference_extra():
    # A finder that comes first sees every import that is tried, of what is not installed too.
    code = (
        "import sys, torch, einops\n"
        "class Watch:\n"
        "    def find_spec(name, *_): seen.append(name.split('.')[0])\n"
        "seen = []; sys.meta_path.insert(0, Watch); import benchmarks.layer.command\n"
        "extra = {'filelock', 'jinja2', 'lightning_fabric', 'lightning', 'monai', 'nibabel',\n"
        "         'nilearn', 'PIL', 'rich', 'safetensors', 'scipy', 'tensorboard', 'tyro'}\n"
        "assert 'dmoe_layer' in seen and not extra & {*seen}, extra & {*seen}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_small_run_goes_from_the_command_to_table_csv_and_plot(tmp_path):
    words = [sys.executable, "-m", "benchmarks", "--device", "cpu", "--out", tmp_path]
    words += ["--shapes", "2x64x48x3,2x128x48x3,1x96x24x1", "--rounds", "1"]
    # Its × and — are printed to pipes that have none, too.
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="ascii", env=ascii_only)
    assert done.returncode == 0, done.stderr
    for words in (
        "CPU only",
        "Measured limits",
        "| mask-loop | forward+backward |",
        "| mask-loop | eval |",
        "unavailable",
    ):
        assert words in done.stdout
    assert "wrong" not in done.stdout
    assert "failed" not in done.stdout
    kind = f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"
    names = [f"{kind}-float32.csv", f"{kind}-float32.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / names[1]).read_bytes().startswith(b"\x89PNG")
    with (tmp_path / names[0]).open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert {r["shape"] for r in read} == {"2x64x48x3", "2x128x48x3", "1x96x24x1"}
    assert {r["provider"] for r in read} == set(command.PROVIDERS)
