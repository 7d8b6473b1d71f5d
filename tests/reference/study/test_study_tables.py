"""The study's tables are written from typed rows and read as such, to the byte."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from reference_models.errors import DataError
from reference_models.study import tables
from reference_models.study.csv_table import Table
from reference_models.study.tables import RATES, TABLES, CaseDice, TrialScores, TriedRate

COMMITTED = Path(__file__).parents[3] / "reference_models" / "study" / "results"
HEADER = "scene,method,learning_rate,validation,chosen,edge"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_what_is_read_from_the_committed_tables_is_written_as_the_same_bytes(table, tmp_path):
    path = COMMITTED / table.name
    header = path.read_text(encoding="utf-8").partition("\n")[0].split(",")
    table.write(tmp_path, table.read(COMMITTED), header[len(table.columns) :])
    assert (tmp_path / table.name).read_bytes() == path.read_bytes()


def test_cells_are_read_as_what_they_are():
    # Of two attributes, so that there are two values; some scores are of that scene alone.
    (first, *_) = (row for row in tables.CASES.read(COMMITTED) if row.scene == "two")
    assert isinstance(first, CaseDice)
    assert [*map(type, (first.case, first.group, first.seen))] == [str, int, bool]
    assert len(first.attributes) == 2
    assert all(type(value) is int for value in first.attributes)
    assert all(type(value) is float for value in first.dice.values())
    trials = tables.TRIALS.read(COMMITTED)
    assert all(isinstance(row, TrialScores) for row in trials)
    assert {row.scene for row in trials if row.unseen is not None} == {"two"}
    assert {row.learning_rate for row in trials} <= {0.003, 0.01, 0.03}
    # Real MRI has one protocol less than the phantom has sites.
    assert {len(row.dice) for row in trials if row.scene == "mri"} == {3}
    assert {len(row.dice) for row in trials if row.scene == "rule"} == {4}


def test_a_cell_of_few_words_is_one_of_them(tmp_path):
    @dataclass(frozen=True)
    class Row:
        part: Literal["own", "all"]

    table = Table("rows.csv", Row)
    table.write(tmp_path, [Row("all")])
    assert table.read(tmp_path) == [Row("all")]
    (tmp_path / "rows.csv").write_text("part\nother\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2 .*'other', expected one of own, all"):
        table.read(tmp_path)


def test_a_rate_that_diverged_and_an_odd_one_are_read_as_they_were(tmp_path):
    rows = [
        TriedRate("rule", "dense", 1e-05, float("-inf"), chosen=False, edge=False),
        TriedRate("rule", 'a "b", c', 0.03, 0.25, chosen=True, edge=True),
    ]
    RATES.write(tmp_path, rows)
    assert RATES.read(tmp_path) == rows
    text = (tmp_path / "rates.csv").read_text(encoding="utf-8")
    assert text.splitlines()[:2] == [HEADER, "rule,dense,1e-05,-inf,no,no"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "got the columns none, expected scene, method"),
        ("scene,method\n", "got the columns scene, method, expected scene, method, learning_rate"),
        (f"{HEADER},more\n", "got the columns .*, edge, more, expected"),
        (f"{HEADER}\nrule,dense,0.01,0.5,no\n", "line 2 is no row"),
        (f"{HEADER}\nrule,dense,0.01,0.5,no,no\nrule,dense,0.01,half,no,no\n", "line 3 .*half"),
        (f"{HEADER}\nrule,dense,,0.5,no,no\n", "line 2 is no row"),
        (f"{HEADER}\nrule,dense,0.01,0.5,maybe,no\n", "line 2 .*'maybe', expected yes or no"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_by_line(text, words, tmp_path):
    (tmp_path / "rates.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"rates\.csv: {words}"):
        RATES.read(tmp_path)
