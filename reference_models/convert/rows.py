"""Makes the rows of `attributes.csv` from a csv whose columns may have any names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..data.attributes_csv import RESERVED
from ..data.endings import split_ending
from ..data.table import Row, Table, nfc, read_table
from ..errors import DataError, report_faults, shown
from .pairing import Pair

_PEOPLE = re.compile(r"patient|subject|person|lesion|\bpid\b|study.?id", re.IGNORECASE)


@dataclass(frozen=True)
class Rows:
    """The content of `attributes.csv`, and remarks on it.

    Args:
        columns: the names of the columns; `case` is first.
        cells: the cells of each case, in the order of the columns.
        remarks: sentences on how the rows were found.
    """

    columns: tuple[str, ...]
    cells: Mapping[str, tuple[str, ...]]
    remarks: tuple[str, ...]

    @property
    def attribute(self) -> str:
        """The first column that can be an attribute; one that seems to name patients comes last."""
        columns = [column for column in self.columns if column.lower() not in RESERVED]
        return min(columns, key=lambda column: bool(_PEOPLE.search(column)))


def read_rows(path: Path, pairs: Mapping[str, Pair], case: str | None, subject: str | None) -> Rows:
    """Finds the row of each case; a case without a row gets empty cells, which count as unknown.

    Args:
        path: the csv.
        pairs: the cases, by id.
        case: the column whose cells name images; None: the column that names most of them.
        subject: the column whose cells name patients; None: the column subject, if there is one.

    Raises:
        DataError: the csv cannot be read, no column names images, or a case has two rows.
    """
    faults: list[DataError] = []
    notes: list[str] = []
    table = read_table(path, faults, notes)
    report_faults(faults, None)
    lower = {column.lower(): column for column in table.columns}
    for flag, column in (("--case", case), ("--subject", subject)):
        if column is not None and column not in table.columns:
            raise DataError(
                f"{path}: there is no column {column} ({flag}); the csv has "
                f"{', '.join(table.columns)}"
            )
    known = {name: case_id for case_id, pair in pairs.items() for name in _called(pair)}
    case = case or _case_column(table, known)
    subject = subject or lower.get("subject")
    renamed = {case: "case"} | ({subject: "subject"} if subject else {})
    others = [column for column in table.columns if column and column not in renamed]
    if taken := [column for column in others if column.lower() in ("case", "subject")]:
        raise DataError(
            f"{path}: the column {case} names the images, but there is also a column {taken[0]}, a "
            "name that has a meaning of its own in attributes.csv; rename that column, or name it "
            f"by --{taken[0].lower()}"
        )
    if not [column for column in others if column.lower() not in RESERVED]:
        raise DataError(
            f"{path}: expected a column for each attribute; there is only {' and '.join(renamed)}"
        )
    rows = _rows_by_case(table, case, known)
    if not rows:
        raise DataError(
            f"{path}: no cell of the column {case} names an image; the images are {_few(pairs)}"
        )
    kept = [*renamed, *others]
    cells = {
        case_id: (
            case_id,
            *(rows[case_id].cells[column] if case_id in rows else "" for column in kept[1:]),
        )
        for case_id in pairs
    }
    remarks = [*notes]
    if case != "case":
        remarks.append(f"The column {case} of {path} names the images.")
    if strangers := [row.cells[case] for row in table.rows if not _case(row.cells[case], known)]:
        remarks.append(
            f"{len(strangers)} of {len(table.rows)} rows of {path} name no case and are left out: "
            f"{shown(strangers, 10)}."
        )
    if without := [case_id for case_id in pairs if case_id not in rows]:
        remarks.append(
            f"{len(without)} of {len(pairs)} cases have no row in {path}, so that their attributes "
            f"are unknown: {shown(without, 10)}."
        )
    if subject is None:
        people = [column for column in others if _PEOPLE.search(column)]
        like = f", as in --subject '{people[0]}'" if people else ""
        remarks.append(
            "Each case counts as a different patient. If a patient has several cases, name the "
            f"column of the patients by --subject{like}, so that no patient is both trained and "
            "tested on."
        )
    columns = ("case", *(["subject"] if subject else []), *others)
    return Rows(columns, cells, tuple(remarks))


def _few(case_ids: Collection[str]) -> str:
    return shown(sorted(case_ids), 3)


def _called(pair: Pair) -> list[str]:
    """Gives the names by which a cell may name a case: its id, and its files without endings."""
    files = [*pair.masks, *pair.channels.values()]
    return [pair.case_id, *(file.stem for file in files)]


def _case(cell: str, known: Mapping[str, str]) -> str | None:
    """Finds the case that a cell names, by its id or by a file of it in any folder."""
    name = nfc(PureWindowsPath(cell).name)
    return known.get(cell) or known.get(name) or known.get(split_ending(name)[0])


def _case_column(table: Table, known: Mapping[str, str]) -> str:
    """Finds the column whose cells name most cases; among several, the column case or the first.

    Raises:
        DataError: no column names a case; or another column names at least half as many cases, and
            a different case in some row, such as running numbers if images are named 1.png and so
            on.
    """
    named = {
        column: [_case(row.cells[column], known) for row in table.rows]
        for column in sorted(table.columns, key=lambda column: column.lower() != "case")
        if column
    }
    counts = {column: len({*case_ids} - {None}) for column, case_ids in named.items()}
    best = max(counts, key=lambda column: counts[column])
    for column, case_ids in named.items():
        differing = [
            row.line
            for row, one, other in zip(table.rows, named[best], case_ids, strict=True)
            if one and other and one != other
        ]
        if differing and 2 * counts[column] >= counts[best] and best.lower() != "case":
            raise DataError(
                f"{table.path}:{differing[0]}: the columns {best} and {column} both name images, "
                "and in this row two different ones; choose the column by --case"
            )
    if not counts[best]:
        cells = [f"{column} ({table.rows[0].cells[column]!r})" for column in table.columns]
        raise DataError(
            f"{table.path}: no column names the images, which are {_few({*known.values()})}; the "
            f"columns and their first cells are {shown(cells, 10)}"
        )
    return best


def _rows_by_case(table: Table, case: str, known: Mapping[str, str]) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for row in table.rows:
        case_id = _case(row.cells[case], known)
        if case_id is None:
            continue
        first = rows.setdefault(case_id, row)
        if {**first.cells, case: ""} != {**row.cells, case: ""}:
            raise DataError(
                f"{table.path}:{row.line}: {case_id} has another row already, in line "
                f"{first.line}; remove one of them"
            )
    return rows
