"""Reads the `attributes.csv` beside an nnU-Net folder: a row a case, a column an attribute.

    case,T-stage,subject,split
    patient1,T3,,train

`subject` (default: the case) and `split` (train, validation, test or nothing) may be left out;
every other column is an attribute, the first of them the default one. The values of an attribute
are its column's distinct entries. Commas, semicolons or tabs separate, as spreadsheets write them.
"""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from ..errors import DataError, shown
from .cases import SPLITS, UNKNOWN, Attribute

MISSING = ("", "-1", "nan", "na", "n/a", "#n/a", "none", "null", "unknown")
RESERVED = ("case", "subject", "split")
MOST_VALUES = 20  # each gets a router of its own, to be learned from its share of the cases

_Cells = dict[str, str]  # of a row, by column
_NumberedRow = tuple[int, _Cells]  # with its line in the file


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
) -> tuple[tuple[Attribute, ...], dict[str, CaseRecord]]:
    """Reads the chosen attributes, and what each case's row says.

    Args:
        path: of the csv.
        case_ids: the folder's cases.
        names: the attributes to read. Empty: the first column. None: all columns of few values.
        known: attributes of a trained run, whose values the csv's have to be among.
        faults: what is wrong with single rows is added there, and such rows are left out.
        notes: remarks are added there.

    Returns:
        The attributes, and the records by case id.

    Raises:
        DataError: the file cannot be read, or a column is missing or not of groups.
    """
    columns, numbered_rows = _columns_and_rows(path)
    own = _attribute_columns(path, columns)
    if "" in columns:
        notes.append(f"{path}: a column without a name is left out")
    default = own[0]
    chosen = own if names is None else [*names] or [default]
    if missing := [name for name in chosen if name not in own]:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(own)}")
    rows = _rows_by_case(path, numbered_rows, case_ids, faults)
    values = {attribute.name: attribute.values for attribute in known}
    for name in dict.fromkeys((*chosen, default)):
        if name not in values:
            values[name] = _distinct_values(path, name, rows, faults)
        count = len(values[name])
        if name in chosen and not 1 <= count <= MOST_VALUES:
            if names is not None or name == default:
                raise DataError(
                    f"{path}: {name} has {count or 'no'} values, and each gets a router of its "
                    f"own; make groups of them, 1 to {MOST_VALUES}, or name another attribute (of "
                    f"{', '.join(own)})"
                )
            notes.append(f"{name}: {count} values, which is no group; left out")
            chosen.remove(name)
    # A default that is not asked for may have any number of values; many make no strata.
    strata = values[default] if len(values[default]) <= MOST_VALUES else ()
    records: dict[str, CaseRecord] = {}
    for case_id, (line, cells) in rows.items():
        try:
            records[case_id] = CaseRecord(
                line,
                _entry(cells.get("subject", "")) or case_id,
                _split(cells.get("split", "")),
                tuple(_value_index(name, values[name], cells) for name in chosen),
                _value_index(default, strata, cells) if strata else UNKNOWN,
            )
        except ValueError as error:
            faults.append(DataError(f"{path}:{line}: {case_id}: {error}"))
    return tuple(Attribute(name, values[name]) for name in chosen), records


def _attribute_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """Names the columns that are attributes; there has to be one, and a column of cases."""
    own = [column for column in columns if column not in ("", *RESERVED)]
    if not own or "case" not in columns:
        raise DataError(
            f"{path}: must have a column case and one for each attribute, such as case,T-stage; "
            f"got {', '.join(columns)}"
        )
    return own


def _columns_and_rows(path: Path) -> tuple[list[str], list[_NumberedRow]]:
    """Reads the file: its columns, and each row that is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; write one with a row a case, such as\n"
            "  case,T-stage\n  patient1,T3"
        ) from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a readable csv ({error}); save it as UTF-8") from error
    lines = [(line, cells) for line, cells in lines if any(cells)]
    if len(lines) < 2:
        raise DataError(f"{path}: has no row; expected a line of columns, and one for each case")
    (_, header), *lines = lines
    columns = [name.lower() if name.lower() in RESERVED else name for name in header]
    if repeated := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise DataError(f"{path}: two columns are called {', '.join(repeated)}; rename one")
    for line, cells in lines:
        if len(cells) < len(columns) or any(cells[len(columns) :]):
            raise DataError(
                f"{path}:{line}: {len(cells)} cells, expected {len(columns)} "
                f"({', '.join(columns)}); put what has a separator in it between quotes"
            )
    return columns, [(line, dict(zip(columns, cells, strict=False))) for line, cells in lines]


def _rows_by_case(
    path: Path,
    numbered_rows: Sequence[_NumberedRow],
    case_ids: Collection[str],
    faults: list[DataError],
) -> dict[str, _NumberedRow]:
    """Finds each row's case; rows of no case, second rows and cases without one are faults."""
    rows: dict[str, _NumberedRow] = {}
    for line, cells in numbered_rows:
        cells["case"] = unicodedata.normalize("NFC", cells["case"])  # as file names are
        # The case as it is called, or by the name of one of its files.
        name = PureWindowsPath(cells["case"]).name
        stem = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
        names = (cells["case"], name, stem, re.sub(r"_\d{4}$", "", stem))
        case_id = next((name for name in names if name in case_ids), None)
        if case_id is None:
            faults.append(
                DataError(
                    f"{path}:{line}: {cells['case']!r} is no case of the folder, whose are "
                    f"{shown([*case_ids], 3)}; correct the name, or take the row away"
                )
            )
        elif case_id in rows:
            faults.append(
                DataError(f"{path}:{line}: {case_id} has a row already, line {rows[case_id][0]}")
            )
        else:
            rows[case_id] = (line, cells)
    faults += [
        DataError(f"{path}: no row for case {case_id}; add one, empty where nothing is known")
        for case_id in case_ids
        if case_id not in rows
    ]
    return rows


def _distinct_values(
    path: Path, name: str, rows: dict[str, _NumberedRow], faults: list[DataError]
) -> tuple[str, ...]:
    """Lists a column's distinct entries in natural order: T1, T2, T10."""
    alike: dict[str, dict[str, int]] = {}
    for line, cells in rows.values():
        if (text := _entry(cells[name])) is not None:
            alike.setdefault(text.casefold(), {}).setdefault(text, line)
    faults += [
        DataError(
            f"{path}: {name}: "
            + " and ".join(f"{text!r} (line {line})" for text, line in texts.items())
            + " differ in upper and lower case alone; write one of them throughout"
        )
        for texts in alike.values()
        if len(texts) > 1
    ]
    entries = [text for texts in alike.values() for text in texts]
    return tuple(sorted(entries, key=_natural))


def _natural(text: str) -> tuple[tuple[bool, float, str], ...]:
    """A key to sort by: numbers go by size and before all else, also those within a text."""
    if _NUMBER.fullmatch(text):
        return ((False, float(text), ""),)
    return tuple(
        (not part.isdecimal(), float(part) if part.isdecimal() else 0.0, part)
        for part in re.split(r"(\d+)", text)
    )


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def _entry(cell: str) -> str | None:
    """What stands in a cell, one way of writing for each number (3.0 is 3); None if unknown."""
    if cell.lower() in MISSING:
        return None
    if _NUMBER.fullmatch(cell):
        number = float(cell)
        return str(int(number)) if number.is_integer() else str(number)
    return cell


def _value_index(name: str, values: tuple[str, ...], cells: _Cells) -> int:
    """Finds which of its values an attribute has in a row; `UNKNOWN` where the cell says nothing.

    Raises:
        ValueError: the cell says something else.
    """
    entry = _entry(cells[name])
    if entry is None:
        return UNKNOWN
    if entry not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, or nothing; got {entry!r}")
    return values.index(entry)


def _split(cell: str) -> str | None:
    """Reads the split that a cell names, None where it is empty.

    Raises:
        ValueError: there is no such split.
    """
    split = {"": None, "val": "validation"}.get(cell.lower(), cell.lower())
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be {', '.join(SPLITS)} or nothing, got {cell!r}")
    return split
