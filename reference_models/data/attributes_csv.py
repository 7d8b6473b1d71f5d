"""The `attributes.csv` beside an nnU-Net folder: a row a case, a column an attribute.

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


@dataclass(frozen=True)
class Row:
    """What the csv says of a case, as in `Case`, and in which line."""

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
) -> tuple[tuple[Attribute, ...], dict[str, Row]]:
    """Attributes, and the rows by case.

    Args:
        path: of the csv.
        case_ids: that the folder has.
        names: of the attributes; none: the first, None: all that have few values.
        known: those of a trained run, whose values the data's have to be among.
        faults, notes: what is wrong with single rows, and remarks, are added there.

    Raises:
        DataError: the file cannot be read, or a column is missing or not of groups.
    """
    columns, table = _table(path)
    own = [column for column in columns if column not in ("", *RESERVED)]
    if not own or "case" not in columns:
        raise DataError(
            f"{path}: must have a column case and one for each attribute, such as case,T-stage; "
            f"got {', '.join(columns)}"
        )
    if "" in columns:
        notes.append(f"{path}: a column without a name is left out")
    default = own[0]
    chosen = own if names is None else [*names] or [default]
    if missing := [name for name in chosen if name not in own]:
        raise DataError(f"{path}: has no column {', '.join(missing)}; it has {', '.join(own)}")
    rows = _by_case(path, table, case_ids, faults)
    values = {attribute.name: attribute.values for attribute in known}
    for name in dict.fromkeys((*chosen, default)):
        if name not in values:
            values[name] = _values(path, name, rows, faults)
        if len(values[name]) > MOST_VALUES or (name in chosen and not values[name]):
            if name in chosen and (names is not None or name == default):
                raise DataError(
                    f"{path}: {name} has {len(values[name]) or 'no'} values, and each gets a "
                    f"router of its own; make groups of them, 1 to {MOST_VALUES}, or name another "
                    f"attribute (of {', '.join(own)})"
                )
            if name in chosen:
                notes.append(f"{name}: {len(values[name])} values, which is no group; left out")
                chosen.remove(name)
            values[name] = ()
    read: dict[str, Row] = {}
    for case_id, (line, cells) in rows.items():
        try:
            read[case_id] = Row(
                line,
                _entry(cells.get("subject", "")) or case_id,
                _split(cells.get("split", "")),
                tuple(_index(name, values[name], cells) for name in chosen),
                _index(default, values[default], cells) if values[default] else UNKNOWN,
            )
        except ValueError as error:
            faults.append(DataError(f"{path}:{line}: {case_id}: {error}"))
    return tuple(Attribute(name, values[name]) for name in chosen), read


def _table(path: Path) -> tuple[list[str], list[tuple[int, _Cells]]]:
    """The columns, and line and cells of each row that is not blank."""
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


def _by_case(
    path: Path,
    table: Sequence[tuple[int, _Cells]],
    case_ids: Collection[str],
    faults: list[DataError],
) -> dict[str, tuple[int, _Cells]]:
    rows: dict[str, tuple[int, _Cells]] = {}
    for line, cells in table:
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


def _values(
    path: Path, name: str, rows: dict[str, tuple[int, _Cells]], faults: list[DataError]
) -> tuple[str, ...]:
    """The distinct entries in natural order: T1, T2, T10."""
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
    """Numbers by size and before all else, also those within a text."""
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


def _index(name: str, values: tuple[str, ...], cells: _Cells) -> int:
    entry = _entry(cells[name])
    if entry is None:
        return UNKNOWN
    if entry not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, or nothing; got {entry!r}")
    return values.index(entry)


def _split(cell: str) -> str | None:
    split = {"": None, "val": "validation"}.get(cell.lower(), cell.lower())
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be {', '.join(SPLITS)} or nothing, got {cell!r}")
    return split
