"""Reads the `attributes.csv` of a folder: it has a row for each case, a column for each attribute.

    case,T-stage,subject,split
    patient1,T3,,train

The columns `subject` (default: the case) and `split` (train, validation, test or empty) may be left
out. Every other column is an attribute, and the first of them is the default attribute. The values
of an attribute are the distinct entries of its column. Cells are separated by commas, semicolons or
tabs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..errors import DataError, shown
from .cases import SPLITS, UNKNOWN, Attribute
from .endings import split_ending
from .table import UNKNOWN_TEXTS, Cells, Row, Table, alike, doubtful_identifiers, nfc, read_table

RESERVED = ("case", "subject", "split")
MOST_VALUES = 20  # each value has a router of its own, which learns from its share of the cases

_Entries = dict[str, dict[str, str | None]]  # by attribute and case: the value, None if unknown


@dataclass(frozen=True)
class CaseRecord:
    """What the csv says about one case: the number of its line, and fields of its `Case`."""

    line: int
    subject: str
    split: str | None
    attributes: tuple[int, ...]
    stratum: int = UNKNOWN


def read_attributes(
    path: Path,
    case_ids: Collection[str],
    names: tuple[str, ...] | None,
    known: Sequence[Attribute],
    faults: list[DataError],
    notes: list[str],
    *,
    optional: Collection[str] = (),
    left_out: Collection[str] = (),
    others: bool = False,
    unknown_texts: Collection[str] = UNKNOWN_TEXTS,
) -> tuple[tuple[Attribute, ...], dict[str, CaseRecord]]:
    """Reads the chosen attributes, and the row of each case.

    Args:
        path: the csv.
        case_ids: the folder's cases, including broken ones, so that their rows are recognised.
        names: the attributes to read. Empty: the first column. None: all columns with few values.
        known: the attributes of a trained run. The csv must have no other values.
        faults: a list to which faults of single rows are added; such rows are left out.
        notes: a list to which remarks are added.
        optional: the cases that need no row. Without a row their attributes are unknown.
        left_out: names of incomplete cases, which are reported elsewhere; their rows are ignored.
        others: whether the csv may have rows of other cases, which are then ignored.
        unknown_texts: texts that mean that a value is unknown.

    Returns:
        The attributes, and the records by case id; both are empty if no row can be used.

    Raises:
        DataError: the file cannot be read, or a column is missing or has too many values.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such file; write one that has a row for each case, such as\n"
            "  case,T-stage\n  patient1,T3"
        )
    misfits: list[DataError] = []
    table = read_table(path, misfits, notes, _column_name)
    own = _attribute_columns(table, notes)
    default = own[0]
    chosen = own if names is None else [nfc(name) for name in names] or [default]
    if missing := [name for name in chosen if name not in own]:
        raise DataError(
            f"{path}: expected a column {', '.join(missing)}; the attributes in it are "
            f"{', '.join(own)}"
        )
    faults += misfits  # not earlier: misread columns would cause misfits
    cells = Cells(unknown_texts)
    rows = _rows_by_case(table, case_ids, optional, left_out, others, faults)
    if not rows:  # a fault is in the list already
        return (), {}
    entries: _Entries = {
        name: {case_id: cells.value(name, row.cells[name]) for case_id, row in rows.items()}
        for name in dict.fromkeys((*chosen, default))
    }
    values = {attribute.name: attribute.values for attribute in known}
    for name in entries:
        if name not in values:
            # A default attribute that nobody asked for only stratifies the splits, so that
            # differences in its spelling are no fault.
            found = faults if name in chosen else []
            values[name] = _distinct_values(path, name, entries[name], rows, found)
        count = len(values[name])
        if name in chosen and not 1 <= count <= MOST_VALUES:
            if names is not None or name == default:
                raise DataError(_no_groups(path, name, count, own))
            notes.append(
                f"{name}: this column has {count} values, too many for groups, and is left out. If "
                "it names patients, call it subject, so that no patient is in two splits"
            )
            chosen.remove(name)
    # A default attribute that nobody asked for may have many values, too many to stratify by.
    strata = values[default] if len(values[default]) <= MOST_VALUES else ()
    records: dict[str, CaseRecord] = {}
    for case_id, row in rows.items():
        try:
            records[case_id] = CaseRecord(
                row.line,
                cells.subject("subject", row.cells["subject"], case_id)
                if "subject" in table.columns
                else case_id,
                _split(row.cells.get("split", "")),
                tuple(_value_index(name, values[name], entries[name][case_id]) for name in chosen),
                _value_index(default, strata, entries[default][case_id]) if strata else UNKNOWN,
            )
        except ValueError as error:
            faults.append(DataError(f"{path}:{row.line}: {case_id}: {error}"))
    notes += cells.notes(path)
    notes += doubtful_identifiers("subject", {record.subject for record in records.values()})
    if without := [case_id for case_id in optional if case_id not in rows]:
        notes.append(
            f"{path}: {len(without)} cases without a mask have no row, so that their attributes "
            f"are unknown: {shown(without, 10)}"
        )
        nothing = (UNKNOWN,) * len(chosen)
        records |= {case_id: CaseRecord(0, case_id, None, nothing) for case_id in without}
    return tuple(Attribute(name, values[name]) for name in chosen), records


def _column_name(name: str) -> str:
    return name.lower() if name.lower() in RESERVED else name


def _attribute_columns(table: Table, notes: list[str]) -> list[str]:
    """Lists the columns that are attributes; raises without one, or without a column of cases."""
    own = [column for column in table.columns if column not in ("", *RESERVED)]
    if not own or "case" not in table.columns:
        raise DataError(
            f"{table.path}: expected a column case and a column for each attribute, such as "
            f"case,T-stage; got the columns {', '.join(table.columns)}{table.doubt}"
        )
    if "" in table.columns:
        notes.append(f"{table.path}: a column without a name is ignored")
    return own


def _no_groups(path: Path, name: str, count: int, own: Sequence[str]) -> str:
    """Says why a column cannot be an attribute."""
    what = f"{count} values" if count else "no values, since all of its cells are unknown"
    return (
        f"{path}: the attribute {name} has {what}, and each value needs a router of its own; "
        f"divide them into 1 to {MOST_VALUES} groups, or choose another attribute (of "
        f"{', '.join(own)})"
    )


def _rows_by_case(
    table: Table,
    case_ids: Collection[str],
    optional: Collection[str],
    left_out: Collection[str],
    others: bool,
    faults: list[DataError],
) -> dict[str, Row]:
    """Finds the case of each row; a row without a case, a second row for a case, and a case without
    a row are faults."""
    path, known = table.path, {*case_ids}
    rows: dict[str, Row] = {}
    strangers: list[Row] = []
    # Exact names come first: pat_0001 may be a channel of pat, whose own row must win.
    for row in sorted(table.rows, key=lambda row: row.cells["case"] not in known):
        case_id = _case_of(row.cells["case"], known, channels=not others)
        if case_id is None:
            incomplete = _case_of(row.cells["case"], left_out, channels=True)
            strangers += [] if others or incomplete else [row]
        elif case_id in rows:
            line = rows[case_id].line
            faults.append(
                DataError(
                    f"{path}:{row.line}: the case {case_id} has a row already, in line {line}; "
                    "remove one of them"
                )
            )
        else:
            rows[case_id] = row
    # A case may lack a row because its row is misread: then only that row is reported.
    lacking = [] if table.misfits else sorted(known - rows.keys() - {*optional})
    folder = f"the folder, which has {shown(sorted(known), 3)}"
    if strangers[1:] and not rows:
        names = shown([repr(row.cells["case"]) for row in strangers], 3)
        faults.append(
            DataError(
                f"{path}: none of its {len(strangers)} rows names a case of {folder}; the rows "
                f"name {names}; write the name of the case's files without _0000 and without the "
                "ending"
            )
        )
        return rows
    for row in strangers:
        name = row.cells["case"]
        meant = [case_id for case_id in lacking if alike(case_id) == alike(name)]
        if len(meant) == 1:
            lacking.remove(meant[0])
            advice = (
                f"write {meant[0]} if you mean that case; format the column as text, so that a "
                "spreadsheet does not change it"
            )
        else:
            advice = "correct the name, or remove the row"
        faults.append(DataError(f"{path}:{row.line}: {name!r} is not a case of {folder}; {advice}"))
    if lacking:
        whom = (
            f"case {lacking[0]}" if not lacking[1:] else f"{len(lacking)} cases: {shown(lacking)}"
        )
        faults.append(
            DataError(
                f"{path}: there is no row for {whom}; add one, and leave its cells empty if "
                "nothing is known"
            )
        )
    return rows


def _case_of(text: str, case_ids: Collection[str], *, channels: bool) -> str | None:
    """Finds the case that a text names, by its id or by the name of one of its files.

    Args:
        text: a cell of the csv.
        case_ids: the ids to choose from.
        channels: whether the text may name an image with its channel number. It may not if the csv
            has rows of other cases, since pat_0001 may then be a case, and not an image of pat.
    """
    name = PureWindowsPath(text).name
    stem, _ = split_ending(name)
    names = (text, name, stem, *([re.sub(r"_\d{4}$", "", stem)] if channels else []))
    return next((name for name in names if name in case_ids), None)


def _distinct_values(
    path: Path,
    name: str,
    entries: dict[str, str | None],
    rows: dict[str, Row],
    faults: list[DataError],
) -> tuple[str, ...]:
    """Lists a column's distinct entries in natural order: T1, T2, T10."""
    spellings: dict[str, dict[str, int]] = {}
    for case_id, value in entries.items():
        if value is not None:
            spellings.setdefault(value.casefold(), {}).setdefault(value, rows[case_id].line)
    faults += [
        DataError(
            f"{path}: {name}: "
            + " and ".join(f"{text!r} (line {line})" for text, line in texts.items())
            + " differ only in upper and lower case; use one spelling in all rows"
        )
        for texts in spellings.values()
        if len(texts) > 1
    ]
    values = [value for texts in spellings.values() for value in texts]
    return tuple(sorted(values, key=_natural))


def _natural(text: str) -> tuple[tuple[bool, float, str], ...]:
    """Gives a sort key: numbers, also within a text, are sorted by size and before other texts."""
    if _NUMBER.fullmatch(text):
        return ((False, float(text), text),)
    return tuple(
        (not part.isdecimal(), float(part) if part.isdecimal() else 0.0, part)
        for part in re.split(r"(\d+)", text)
    )


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def _value_index(name: str, values: tuple[str, ...], value: str | None) -> int:
    """Finds the index of a value among an attribute's values; None gives `UNKNOWN`.

    Raises:
        ValueError: the value is not among them.
    """
    if value is None:
        return UNKNOWN
    if value not in values:
        raise ValueError(
            f"{name} is {value!r}, expected one of {', '.join(values)}, or an empty cell"
        )
    return values.index(value)


def _split(text: str) -> str | None:
    """Reads the split that a cell names; an empty cell gives None.

    Raises:
        ValueError: no split has that name.
    """
    split = {"": None, "val": "validation"}.get(text.lower(), text.lower())
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {text!r}, expected {', '.join(SPLITS)}, or an empty cell")
    return split
