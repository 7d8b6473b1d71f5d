"""Makes the rows of `attributes.csv` of a csv whose columns may be called anything."""

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
    """What is to stand in `attributes.csv`, and what there is to say of it.

    Args:
        columns: `case` first.
        cells: by case, in the order of the columns.
        remarks: in sentences.
    """

    columns: tuple[str, ...]
    cells: Mapping[str, tuple[str, ...]]
    remarks: tuple[str, ...]


def read_rows(path: Path, pairs: Mapping[str, Pair], case: str | None, subject: str | None) -> Rows:
    """Finds each case's row; a case without one gets empty cells, which count as unknown.

    Args:
        path: of the csv.
        pairs: the cases, by id.
        case: the column whose cells name images; None: the one that names most.
        subject: the column whose cells name patients, if there is one that is not called subject.

    Raises:
        DataError: the csv cannot be read, no column names images, or two rows are of one case.
    """
    faults: list[DataError] = []
    notes: list[str] = []
    table = read_table(path, faults, notes)
    report_faults(faults, None)
    lower = {column.lower(): column for column in table.columns}
    for flag, column in (("--case", case), ("--subject", subject)):
        if column is not None and column not in table.columns:
            raise DataError(
                f"{path}: has no column {column} ({flag}); it has {', '.join(table.columns)}"
            )
    known = {name: case_id for case_id, pair in pairs.items() for name in _called(pair)}
    case = case or _case_column(table, known)
    subject = subject or lower.get("subject")
    renamed = {case: "case"} | ({subject: "subject"} if subject else {})
    others = [column for column in table.columns if column and column not in renamed]
    if taken := [column for column in others if column.lower() in ("case", "subject")]:
        raise DataError(
            f"{path}: {case} names the images, but there is a column {taken[0]} too, which is what "
            "the word is for in attributes.csv; rename that column, or name it by "
            f"--{taken[0].lower()}"
        )
    if not [column for column in others if column.lower() not in RESERVED]:
        raise DataError(f"{path}: has no column besides {' and '.join(renamed)} to be an attribute")
    rows = _rows_by_case(table, case, known)
    if not rows:
        raise DataError(f"{path}: no cell of {case} names an image, which are {_few(pairs)}")
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
            f"{len(without)} of {len(pairs)} cases have no row in {path}; their cells are empty, "
            f"which counts as unknown: {shown(without, 10)}."
        )
    if subject is None:
        people = [column for column in others if _PEOPLE.search(column)]
        like = f", as in --subject '{people[0]}'" if people else ""
        remarks.append(
            "Each case counts as a patient of its own. If patients have several, name the column "
            f"that says whose they are by --subject{like}, so that none is both trained and tested "
            "on."
        )
    columns = ("case", *(["subject"] if subject else []), *others)
    return Rows(columns, cells, tuple(remarks))


def _few(case_ids: Collection[str]) -> str:
    return shown(sorted(case_ids), 3)


def _called(pair: Pair) -> list[str]:
    """What cells may call a case: its id, and its files with and without their ending."""
    files = [*pair.masks, *pair.channels.values()]
    return [pair.case_id, *(file.stem for file in files)]


def _case(cell: str, known: Mapping[str, str]) -> str | None:
    """The case that a cell names, by its id or a file of it, in whatever folder."""
    name = nfc(PureWindowsPath(cell).name)
    return known.get(cell) or known.get(name) or known.get(split_ending(name)[0])


def _case_column(table: Table, known: Mapping[str, str]) -> str:
    """The column whose cells name most cases; of those, one called case, or else the first.

    Raises:
        DataError: none names a case; or another names at least half as many, and in some row
            another one than this, as running numbers do beside images called 1.png and so on.
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
                "and here two different ones; say by --case which column is meant"
            )
    if not counts[best]:
        cells = [f"{column} ({table.rows[0].cells[column]!r})" for column in table.columns]
        raise DataError(
            f"{table.path}: no column names the images, which are {_few({*known.values()})}; its "
            f"columns are, with their first cells, {shown(cells, 10)}"
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
                f"{table.path}:{row.line}: {case_id} has another row already, line {first.line}; "
                "keep one of them"
            )
    return rows
