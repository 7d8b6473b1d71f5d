"""Reads the `attributes.csv` beside an nnU-Net folder: a row a case, a column an attribute.

    case,T-stage,subject,split
    patient1,T3,,train

`subject` (default: the case) and `split` (train, validation, test or nothing) may be left out;
every other column is an attribute, the first of them the default one. The values of an attribute
are its column's distinct entries. Commas, semicolons or tabs separate, as spreadsheets write them.
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
MOST_VALUES = 20  # each gets a router of its own, to be learned from its share of the cases

_Entries = dict[str, dict[str, str | None]]  # by attribute and case: the value, None if unknown


@dataclass(frozen=True)
class CaseRecord:
    """What the csv says of one case: its line, and the fields of a `Case` that stand there."""

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
    """Reads the chosen attributes, and what each case's row says.

    Args:
        path: of the csv.
        case_ids: the folder's cases, those that are broken too, so that their rows are known.
        names: the attributes to read. Empty: the first column. None: all columns of few values.
        known: attributes of a trained run, whose values the csv's have to be among.
        faults: what is wrong with single rows is added there, and such rows are left out.
        notes: remarks are added there.
        optional: those of the cases that need no row; without one, all of theirs is unknown.
        left_out: names of what is no whole case, a fault that is told; such rows are passed over.
        others: whether the csv may tell of other cases too, whose rows are then passed over.
        unknown_texts: what says that a value is not known.

    Returns:
        The attributes, and the records by case id; none of either where no row is of use.

    Raises:
        DataError: the file cannot be read, or a column is missing or not of groups.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; write one with a row a case, such as\n"
            "  case,T-stage\n  patient1,T3"
        )
    misfits: list[DataError] = []
    table = read_table(path, misfits, notes, _column_name)
    own = _attribute_columns(table, notes)
    default = own[0]
    chosen = own if names is None else [nfc(name) for name in names] or [default]
    if missing := [name for name in chosen if name not in own]:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(own)}")
    faults += misfits  # which would follow from columns that are misread
    cells = Cells(unknown_texts)
    rows = _rows_by_case(table, case_ids, optional, left_out, others, faults)
    if not rows:  # which is a fault, and what they would have said is not known
        return (), {}
    entries: _Entries = {
        name: {case_id: cells.value(name, row.cells[name]) for case_id, row in rows.items()}
        for name in dict.fromkeys((*chosen, default))
    }
    values = {attribute.name: attribute.values for attribute in known}
    for name in entries:
        if name not in values:
            # A default that nobody asks for orders the splits, and its spelling refuses nothing.
            found = faults if name in chosen else []
            values[name] = _distinct_values(path, name, entries[name], rows, found)
        count = len(values[name])
        if name in chosen and not 1 <= count <= MOST_VALUES:
            if names is not None or name == default:
                raise DataError(_no_groups(path, name, count, own))
            notes.append(
                f"{name}: {count} values, which is no group; left out. A column that names "
                "patients is to be called subject, so that none of them lies in two splits"
            )
            chosen.remove(name)
    # A default that is not asked for may have any number of values; many make no strata.
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
            f"{path}: no row for {len(without)} cases without a mask, whose attributes are "
            f"unknown: {shown(without, 10)}"
        )
        nothing = (UNKNOWN,) * len(chosen)
        records |= {case_id: CaseRecord(0, case_id, None, nothing) for case_id in without}
    return tuple(Attribute(name, values[name]) for name in chosen), records


def _column_name(name: str) -> str:
    return name.lower() if name.lower() in RESERVED else name


def _attribute_columns(table: Table, notes: list[str]) -> list[str]:
    """Names the columns that are attributes; there has to be one, and a column of cases."""
    own = [column for column in table.columns if column not in ("", *RESERVED)]
    if not own or "case" not in table.columns:
        raise DataError(
            f"{table.path}: must have a column case and one for each attribute, such as "
            f"case,T-stage; got {', '.join(table.columns)}{table.doubt}"
        )
    if "" in table.columns:
        notes.append(f"{table.path}: a column without a name is left out")
    return own


def _no_groups(path: Path, name: str, count: int, own: Sequence[str]) -> str:
    """Says why a column is no attribute."""
    what = f"{count} values" if count else "no values, since none of its cells is known"
    return (
        f"{path}: {name} has {what}, and each gets a router of its own; make groups of them, 1 to "
        f"{MOST_VALUES}, or name another attribute (of {', '.join(own)})"
    )


def _rows_by_case(
    table: Table,
    case_ids: Collection[str],
    optional: Collection[str],
    left_out: Collection[str],
    others: bool,
    faults: list[DataError],
) -> dict[str, Row]:
    """Finds each row's case; rows of no case, second rows and cases without one are faults."""
    path, known = table.path, {*case_ids}
    rows: dict[str, Row] = {}
    strangers: list[Row] = []
    # Exact names first: pat_0001 may be a channel of pat, and must not take the row that pat has.
    for row in sorted(table.rows, key=lambda row: row.cells["case"] not in known):
        case_id = _case_of(row.cells["case"], known, channels=not others)
        if case_id is None:
            told = _case_of(row.cells["case"], left_out, channels=True)
            strangers += [] if others or told else [row]
        elif case_id in rows:
            line = rows[case_id].line
            faults.append(DataError(f"{path}:{row.line}: {case_id} has a row already, line {line}"))
        else:
            rows[case_id] = row
    # Those of a row that does not fit may be among these: that row is the fault, and is named.
    lacking = [] if table.misfits else sorted(known - rows.keys() - {*optional})
    folder = f"the folder, whose are {shown(sorted(known), 3)}"
    if strangers[1:] and not rows:
        names = shown([repr(row.cells["case"]) for row in strangers], 3)
        faults.append(
            DataError(
                f"{path}: none of its {len(strangers)} rows is a case of {folder}; its own are "
                f"{names}; write each as its files are called, without _0000 and ending"
            )
        )
        return rows
    for row in strangers:
        name = row.cells["case"]
        meant = [case_id for case_id in lacking if alike(case_id) == alike(name)]
        if len(meant) == 1:
            lacking.remove(meant[0])
            advice = f"write {meant[0]} if that is meant; a spreadsheet keeps it if it is text"
        else:
            advice = "correct the name, or take the row away"
        faults.append(DataError(f"{path}:{row.line}: {name!r} is no case of {folder}; {advice}"))
    if lacking:
        whom = (
            f"case {lacking[0]}" if not lacking[1:] else f"{len(lacking)} cases: {shown(lacking)}"
        )
        faults.append(
            DataError(f"{path}: no row for {whom}; add one, empty where nothing is known")
        )
    return rows


def _case_of(text: str, case_ids: Collection[str], *, channels: bool) -> str | None:
    """Finds the case that is called so, or that one of whose files is; `channels`: its images too.

    Where a csv tells of other cases too, pat_0001 may be one of them, and not an image of pat.
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
            + " differ in upper and lower case alone; write one of them throughout"
        )
        for texts in spellings.values()
        if len(texts) > 1
    ]
    values = [value for texts in spellings.values() for value in texts]
    return tuple(sorted(values, key=_natural))


def _natural(text: str) -> tuple[tuple[bool, float, str], ...]:
    """A key to sort by: numbers go by size and before all else, also those within a text."""
    if _NUMBER.fullmatch(text):
        return ((False, float(text), text),)
    return tuple(
        (not part.isdecimal(), float(part) if part.isdecimal() else 0.0, part)
        for part in re.split(r"(\d+)", text)
    )


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def _value_index(name: str, values: tuple[str, ...], value: str | None) -> int:
    """Finds which of its values an attribute has in a row; `UNKNOWN` where the cell says nothing.

    Raises:
        ValueError: the cell says something else.
    """
    if value is None:
        return UNKNOWN
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, or nothing; got {value!r}")
    return values.index(value)


def _split(text: str) -> str | None:
    """Reads the split that a cell names, None where it is empty.

    Raises:
        ValueError: there is no such split.
    """
    split = {"": None, "val": "validation"}.get(text.lower(), text.lower())
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be {', '.join(SPLITS)} or nothing, got {text!r}")
    return split
