"""Reads csv files, and turns the text of their cells into identifiers or attribute values.

Identifiers (of a case or a subject) are compared as text. Attribute values are compared as text
too, except whole numbers, which spreadsheets write in several ways: 3, 3.0 and 03 are one value,
but 1.1 and 1.10 are two. `check` reports which texts count as unknown, and which count as one
value.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import DataError, reading, shown

# Texts that mean that a value is unknown, in upper or lower case, unless --unknown-texts gives
# others.
UNKNOWN_TEXTS = ("-1", "nan", "na", "n/a", "#n/a", "none", "null")
# These always mean it: an empty cell, and the word that all tables and pages here use.
ALWAYS_UNKNOWN = ("", "unknown")

_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_ROUNDED = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE)
# Excel writes and reads such a line; other programs may add their own separators at its end.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[,;\t]*\s*', re.IGNORECASE)
# The first bytes of files that are not text in UTF-8.
_NO_TEXT = {
    b"PK\x03\x04": "an Excel workbook or another zip file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "packed by gzip",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}

# The result of `_split`: each row with its line number, and the comments.
_Split = tuple[list[tuple[int, list[str]]], list[str]]


@dataclass(frozen=True)
class Row:
    """A row of a table: its line number in the file, and its cells by column."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A csv file.

    Args:
        path: the file.
        columns: the names of the columns, in their order.
        rows: the rows that have a cell for each column.
        misfits: the other rows, which have too few or too many cells; missing cells are left out.
        comment: the first line that begins with #; empty if there is none.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    misfits: tuple[Row, ...]
    comment: str

    @property
    def doubt(self) -> str:
        """What to add to an error about missing columns: a comment may hold their names."""
        return f"; {self.comment!r} is ignored, since it begins with #" if self.comment else ""


@dataclass
class Cells:
    """Turns cells into identifiers and values, and remembers which texts became which value.

    Args:
        unknown_texts: texts that mean that a value is unknown, besides `ALWAYS_UNKNOWN`.

    Example:
        >>> cells = Cells()
        >>> [cells.value("T-stage", text) for text in ("3.0", "03", "1.10", "None")]
        ['3', '3', '1.10', None]
        >>> [cells.identifier(text) for text in ("007", "1.10", "nan")]
        ['007', '1.10', None]
        >>> cells.notes("x.csv")[0]
        "x.csv: T-stage: '03' and '3.0' count as one value, 3"
    """

    unknown_texts: Collection[str] = UNKNOWN_TEXTS
    _unknown: dict[str, Counter[str]] = field(default_factory=dict, init=False)
    _spellings: dict[tuple[str, str], set[str]] = field(default_factory=dict, init=False)
    _alone: set[str] = field(default_factory=set, init=False)  # columns of `subject`

    def __post_init__(self) -> None:
        self._saying_unknown = {alike(text) for text in (*ALWAYS_UNKNOWN, *self.unknown_texts)}

    def identifier(self, text: str) -> str | None:
        """Gives the text unchanged, or None if it means unknown."""
        return None if self._says_unknown(text) else text

    def subject(self, column: str, text: str, case_id: str) -> str:
        """Gives the subject; an unknown subject counts as one of its own, named by the case."""
        if self._says_unknown(text):
            self.count_unknown(column, text)
            self._alone.add(column)
            return case_id
        return text

    def value(self, column: str, text: str) -> str | None:
        """Gives the value of an attribute, or None if the text means unknown."""
        if self._says_unknown(text):
            self.count_unknown(column, text)
            return None
        value = _plain(text)
        self._spellings.setdefault((column, value), set()).add(text)
        return value

    def count_unknown(self, column: str, text: str) -> None:
        """Remembers a text that counts as unknown."""
        self._unknown.setdefault(column, Counter())[text] += 1

    def notes(self, source: Path | str) -> list[str]:
        """Says which texts count as one value, and how many cells count as unknown."""
        said = [
            f"{source}: {column}: {' and '.join(map(repr, sorted(texts)))} count as one value, "
            f"{value}"
            for (column, value), texts in self._spellings.items()
            if len(texts) > 1
        ]
        for column, counts in self._unknown.items():
            cells = ", ".join(
                f"{f'{text!r} in ' if text else ''}{count} {'' if text else 'empty '}"
                f"cell{'s' * (count > 1)}"
                for text, count in sorted(counts.items())
            )
            # Other texts, such as rare sites, are unknown whatever the flag says.
            own = [
                repr(text)
                for text in sorted(counts)
                if self._says_unknown(text) and text.casefold() not in ALWAYS_UNKNOWN
            ]
            alone = "; each such case counts as a subject of its own" * (column in self._alone)
            hint = (
                f"; if {' or '.join(own)} is a value in your data, give the other texts by "
                "--unknown-texts"
            )
            said.append(
                f"{source}: {column}: these count as unknown: {cells}{alone}{hint if own else ''}"
            )
        return said

    def _says_unknown(self, text: str) -> bool:
        return alike(text) in self._saying_unknown


def nfc(text: str) -> str:
    """Joins accents with their letters (NFC); macOS separates them in file names."""
    return unicodedata.normalize("NFC", text)


def alike(text: str) -> str:
    """Gives the same text for texts that a person may not distinguish: 1 and 001, P1 and p1."""
    return _plain(text).casefold()


def doubtful_identifiers(column: str, identifiers: Collection[str]) -> list[str]:
    """Warns of different identifiers that may mean the same, or that may have lost digits."""
    groups: dict[str, list[str]] = {}
    for identifier in sorted({*identifiers}):
        groups.setdefault(alike(identifier), []).append(identifier)
    pairs = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    rounded = [name for name in sorted({*identifiers}) if _ROUNDED.fullmatch(name)]
    warnings = []
    if pairs:
        warnings.append(
            f"warning: {column}: these count as different, since their texts differ: "
            f"{shown(pairs, 5)}"
        )
    if rounded:
        warnings.append(
            f"warning: {column}: {shown(rounded, 5)}: a spreadsheet may have rounded long numbers, "
            "so that several became one; export the csv again with this column as text"
        )
    return warnings


def read_table(
    path: Path,
    faults: list[DataError],
    notes: list[str],
    column_name: Callable[[str], str] = str,
) -> Table:
    """Reads a csv in UTF-8 whose cells are separated by commas, semicolons or tabs.

    Blanks around cells, blank lines, lines that begin with #, and Excel's first line "sep=;" are
    ignored.

    Args:
        path: the file.
        faults, notes: lists to which misfitting rows, and remarks, are added.
        column_name: turns the names in the file into the names of the table's columns.

    Raises:
        DataError: the file is not a csv, has no row, or has two columns of the same name.
    """
    with reading(path, "not a readable csv", "save it as CSV in UTF-8"):
        content = path.read_bytes()
        if kind := next(
            (kind for magic, kind in _NO_TEXT.items() if content.startswith(magic)), ""
        ):
            raise ValueError(f"{kind}, expected text in UTF-8")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes, as text in UTF-16 does")
        lines, comments = _split(text)
    if comments:
        s = "s" * (len(comments) > 1)
        notes.append(
            f"{path}: {len(comments)} line{s} that begin{'s' * (not s)} with # "
            f"{'are' if s else 'is'} ignored"
        )
    if len(lines) < 2:
        raise DataError(
            f"{path}: this csv has no row; expected a line with the names of the columns, and rows"
        )
    (_, header), *lines = lines
    columns = tuple(column_name(name) for name in header)
    if repeated := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise DataError(
            f"{path}: two columns have the name {', '.join(repeated)}; rename one of them"
        )
    rows, misfits = [], []
    for line, cells in lines:
        row = Row(line, dict(zip(columns, cells, strict=False)))
        if len(cells) < len(columns) or any(cells[len(columns) :]):
            why = (
                "the row is cut short"
                if len(cells) < len(columns)
                else "put cells that contain a separator between quotes"
            )
            misfits.append(row)
            faults.append(
                DataError(
                    f"{path}:{line}: this row has {len(cells)} cells, expected {len(columns)} "
                    f"({', '.join(columns)}); {why}"
                )
            )
        else:
            rows.append(row)
    comment = comments[0].strip() if comments else ""
    return Table(path, columns, tuple(rows), tuple(misfits), comment)


def _split(text: str) -> _Split:
    """Splits a csv into rows that are not blank, with their line numbers, and comments."""
    physical = list(io.StringIO(text, newline=""))
    said = _SEPARATOR_LINE.fullmatch(physical[0]) if physical else None
    if said:
        physical[0] = "\n"
    header = next((line for line in physical if line.strip() and line[0] != "#"), "")
    header = re.sub('"[^"]*"', "", header)
    if said and said[1] in header:
        return _parsed(physical, said[1])
    # A name may contain another separator, as in "T-stage (clinical, path)". The separator that
    # fits most rows is used; if several fit as many, the one that comes first.
    possible = sorted({*",;\t"} & {*header}, key=header.index) or [","]
    return _parsed(physical, max(possible, key=partial(_n_fitting, physical)))


def _n_fitting(physical: Sequence[str], separator: str) -> int:
    """Counts the rows that have a cell for each column; -1 if the quotes are not balanced."""
    try:
        rows = [cells for _, cells in _parsed(physical, separator)[0]]
    except csv.Error:
        return -1
    return sum(len(row) >= len(rows[0]) and not any(row[len(rows[0]) :]) for row in rows[1:])


def _parsed(physical: Sequence[str], separator: str) -> _Split:
    """Does what `_split` does, with this separator."""
    comments: list[str] = []
    at_row = True  # not within a quoted cell of several lines

    def without_comments() -> Iterator[str]:
        nonlocal at_row
        for line in physical:
            comment = at_row and line.startswith("#")
            comments.extend([line] * comment)
            at_row = False
            yield "\n" if comment else line  # blank, so that lines keep their numbers

    reader = csv.reader(without_comments(), delimiter=separator, strict=True)
    rows = []
    for row in reader:
        at_row = True
        cells = [nfc(cell.strip()) for cell in row]
        if any(cells):
            rows.append((reader.line_num, cells))
    return rows, comments


def _plain(text: str) -> str:
    """Writes a whole number in one way, and does not change other texts."""
    if (whole := _WHOLE.fullmatch(text)) is None:
        return text
    sign, digits = whole.groups()
    return digits if sign != "-" or digits == "0" else f"-{digits}"
