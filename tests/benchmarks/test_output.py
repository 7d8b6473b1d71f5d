"""What a run writes is whole, and says what it was made with."""

import csv
import dataclasses

import pytest
import torch
from harness.benchmark_runs import row_of, rows_of

from benchmarks import output
from benchmarks.growth.rows import GrowthRow
from benchmarks.kernels.matrix import MatrixRow
from benchmarks.kernels.report import KernelRow
from benchmarks.layer.command import PROVIDERS
from benchmarks.layer.rows import LayerRow
from benchmarks.machine import commit
from reference_models.study.csv_table import Table

ExportRow = pytest.importorskip("benchmarks.export.rows").ExportRow
VolumeRow = pytest.importorskip("benchmarks.volumes.rows").VolumeRow

ROW_OF = {
    "export": ExportRow,
    "growth": GrowthRow,
    "kernels": KernelRow,
    "kernels-matrix": MatrixRow,
    "volumes": VolumeRow,
}  # by a file's name or first word; others hold layers


def test_the_csv_holds_every_column_and_comes_back(tmp_path):
    rows = rows_of(*(PROVIDERS[name] for name in ("eager", "triton", "mask-loop")))
    path = tmp_path / "run.csv"
    path.write_text("older", encoding="utf-8")
    output.write_csv(rows, path)
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == [field.name for field in dataclasses.fields(LayerRow)]
    assert [(r["provider"], r["which"]) for r in read] == [
        ("eager", "forward"), ("eager", "forward+backward"), ("eager", "eval"), ("eager", "router"),
        ("triton", ""),
        ("mask-loop", "forward"), ("mask-loop", "forward+backward"), ("mask-loop", "eval"),
    ]  # fmt: skip
    for written, got in zip(rows, read, strict=True):
        for name in read[0]:
            value = getattr(written, name)
            if isinstance(value, float):
                assert float(got[name]) == pytest.approx(value, rel=1e-5)
            else:
                assert got[name] == ("" if value is None else str(value))
        assert got["torch"] == torch.__version__
        assert all(got[name] for name in ("date", "commit", "machine", "capability", "road"))
        assert all(got[name] for name in ("threads", "python"))
    assert [file.name for file in tmp_path.iterdir()] == ["run.csv"]


@pytest.mark.parametrize("path", sorted(output.RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_a_committed_file_is_what_the_writer_makes_of_its_rows(path, tmp_path):
    kind = ROW_OF.get(path.stem) or ROW_OF.get(path.stem.split("-")[0], LayerRow)
    output.write_csv(Table(path.name, kind).read(path.parent), tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.csv"
    path.write_text("older", encoding="utf-8")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr("reference_models.files.os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        output.write_csv([row_of()], path)
    assert path.read_text(encoding="utf-8") == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["run.csv"]


def test_the_commit_is_unknown_outside_git(tmp_path):
    assert commit(tmp_path) == "unknown"
