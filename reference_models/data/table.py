"""Reads csv files; the one place where the text of cells becomes identifiers or attribute values.

An identifier (a case, a subject) is compared as text. A value of an attribute is text too, but for
whole numbers, which spreadsheets write in several ways: 3, 3.0 and 03 are one value. 1.1 and 1.10
are two. What is taken for unknown, and what for one value, is remembered and told by `check`.
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

# What says that a value is not known, in upper or lower case, unless --unknown-texts says others.
UNKNOWN_TEXTS = ("-1", "nan", "na", "n/a", "#n/a", "none", "null")
# These always do: an empty cell, and the word by which every table and page here calls them.
ALWAYS_UNKNOWN = ("", "unknown")

_WHOLE = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
_ROUNDED = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE)
# Excel writes and obeys it; a program that does not know it puts separators of its own behind.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?[,;\t]*\s*', re.IGNORECASE)
# What a file begins with that is no text.
_NO_TEXT = {
    b"PK\x03\x04": "an Excel workbook or another zip file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "packed by gzip",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}

# What `_split` gives: each row with its line, and the comments.
_Split = tuple[list[tuple[int, list[str]]], list[str]]


@dataclass(frozen=True)
class Row:
    """A row of a table: its line in the file, and its cells by column."""

    line: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A csv file.

    Args:
        path: of the file.
        columns: names in their order.
        rows: those with a cell for each column.
        misfits: rows with too few or too many cells, as far as they go; not among the rows.
        comment: the first line that begins with #, empty if there is none.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    misfits: tuple[Row, ...]
    comment: str

    @property
    def doubt(self) -> str:
        """What to add where columns are missing: a comment may have been meant as the columns."""
        return f"; {self.comment!r} is left out, as it begins with #" if self.comment else ""


@dataclass
class Cells:
    """Makes identifiers and values of cells, and remembers what it made of which text.

    Args:
        unknown_texts: what says that a value is not known, besides `ALWAYS_UNKNOWN`.

    Example:
        >>> cells = Cells()
        >>> [cells.value("T-stage", text) for text in ("3.0", "03", "1.10", "None")]
        ['3', '3', '1.10', None]
        >>> [cells.identifier(text) for text in ("007", "1.10", "nan")]
        ['007', '1.10', None]
        >>> cells.notes("x.csv")[0]
        "x.csv: T-stage: '03' and '3.0' are taken for one value, 3"
    """

    unknown_texts: Collection[str] = UNKNOWN_TEXTS
    _unknown: dict[str, Counter[str]] = field(default_factory=dict, init=False)
    _spellings: dict[tuple[str, str], set[str]] = field(default_factory=dict, init=False)
    _alone: set[str] = field(default_factory=set, init=False)  # columns of `subject`

    def __post_init__(self) -> None:
        self._saying_unknown = {alike(text) for text in (*ALWAYS_UNKNOWN, *self.unknown_texts)}

    def identifier(self, text: str) -> str | None:
        """Gives the text as it is, None where it says that it is not known."""
        return None if self._says_unknown(text) else text

    def subject(self, column: str, text: str, case_id: str) -> str:
        """Gives the subject; one who is not known is nobody else's, and is called by the case."""
        if self._says_unknown(text):
            self.count_unknown(column, text)
            self._alone.add(column)
            return case_id
        return text

    def value(self, column: str, text: str) -> str | None:
        """Gives the value of an attribute, None where the text says that it is not known."""
        if self._says_unknown(text):
            self.count_unknown(column, text)
            return None
        value = _plain(text)
        self._spellings.setdefault((column, value), set()).add(text)
        return value

    def count_unknown(self, column: str, text: str) -> None:
        """Remembers a text that was taken for unknown."""
        self._unknown.setdefault(column, Counter())[text] += 1

    def notes(self, source: Path | str) -> list[str]:
        """Says which texts were taken for one value, and how many cells for unknown."""
        said = [
            f"{source}: {column}: {' and '.join(map(repr, sorted(texts)))} are taken for one "
            f"value, {value}"
            for (column, value), texts in self._spellings.items()
            if len(texts) > 1
        ]
        for column, counts in self._unknown.items():
            cells = ", ".join(
                f"{f'{text!r} in' if text else 'nothing in'} {count} cell{'s' * (count > 1)}"
                for text, count in sorted(counts.items())
            )
            # Others, such as rare sites, are unknown whatever the flag says.
            own = [
                repr(text)
                for text in sorted(counts)
                if self._says_unknown(text) and text.casefold() not in ALWAYS_UNKNOWN
            ]
            alone = "; each such case counts as a subject of its own" * (column in self._alone)
            hint = (
                f"; if {' or '.join(own)} is a value of yours, name the other texts by "
                "--unknown-texts"
            )
            said.append(
                f"{source}: {column}: taken for unknown: {cells}{alone}{hint if own else ''}"
            )
        return said

    def _says_unknown(self, text: str) -> bool:
        return alike(text) in self._saying_unknown


def nfc(text: str) -> str:
    """Writes accents together with their letters; macOS takes them apart in file names."""
    return unicodedata.normalize("NFC", text)


def alike(text: str) -> str:
    """Gives the same for texts that a person may take for one: 1 and 001, P1 and p1."""
    return _plain(text).casefold()


def doubtful_identifiers(column: str, identifiers: Collection[str]) -> list[str]:
    """Warns of identifiers that are kept apart but may be meant as one, or have lost digits."""
    groups: dict[str, list[str]] = {}
    for identifier in sorted({*identifiers}):
        groups.setdefault(alike(identifier), []).append(identifier)
    pairs = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    rounded = [name for name in sorted({*identifiers}) if _ROUNDED.fullmatch(name)]
    warnings = []
    if pairs:
        warnings.append(f"warning: {column}: kept apart, as texts differ: {shown(pairs, 5)}")
    if rounded:
        warnings.append(
            f"warning: {column}: {shown(rounded, 5)}: as a spreadsheet rounds long numbers, so "
            "that several may have become one; write the csv again with these as text"
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
    passed over.

    Args:
        path: the file.
        faults, notes: rows that do not fit, and remarks, are added there.
        column_name: makes the names by which columns are found.

    Raises:
        DataError: it is no csv, has no row, or two of its columns have one name.
    """
    with reading(path, "not a readable csv", "save it as CSV in UTF-8"):
        content = path.read_bytes()
        if kind := next(
            (kind for magic, kind in _NO_TEXT.items() if content.startswith(magic)), ""
        ):
            raise ValueError(f"{kind}, expected text in UTF-8")
        text = content.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("has zero bytes, as UTF-16 does")
        lines, comments = _split(text)
    if comments:
        s = "s" * (len(comments) > 1)
        notes.append(f"{path}: {len(comments)} line{s} that begin{'s' * (not s)} with # left out")
    if len(lines) < 2:
        raise DataError(f"{path}: has no row; expected a line of columns, and rows below it")
    (_, header), *lines = lines
    columns = tuple(column_name(name) for name in header)
    if repeated := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise DataError(f"{path}: two columns are called {', '.join(repeated)}; rename one")
    rows, misfits = [], []
    for line, cells in lines:
        row = Row(line, dict(zip(columns, cells, strict=False)))
        if len(cells) < len(columns) or any(cells[len(columns) :]):
            why = (
                "the row is cut short"
                if len(cells) < len(columns)
                else "put what has a separator in it between quotes"
            )
            misfits.append(row)
            faults.append(
                DataError(
                    f"{path}:{line}: {len(cells)} cells, expected {len(columns)} "
                    f"({', '.join(columns)}); {why}"
                )
            )
        else:
            rows.append(row)
    comment = comments[0].strip() if comments else ""
    return Table(path, columns, tuple(rows), tuple(misfits), comment)


def _split(text: str) -> _Split:
    """Takes a csv apart: each row that is not blank with its line, and the comments."""
    physical = list(io.StringIO(text, newline=""))
    said = _SEPARATOR_LINE.fullmatch(physical[0]) if physical else None
    if said:
        physical[0] = "\n"
    header = next((line for line in physical if line.strip() and line[0] != "#"), "")
    header = re.sub('"[^"]*"', "", header)
    if said and said[1] in header:
        return _parsed(physical, said[1])
    # A name may have another one's separator in it, as in "T-stage (clinical, path)": the rows
    # tell which it is, and where they do not, the one that comes first.
    possible = sorted({*",;\t"} & {*header}, key=header.index) or [","]
    return _parsed(physical, max(possible, key=partial(_n_fitting, physical)))


def _n_fitting(physical: Sequence[str], separator: str) -> int:
    """Counts the rows that have a cell for each column, -1 where the quotes are not in order."""
    try:
        rows = [cells for _, cells in _parsed(physical, separator)[0]]
    except csv.Error:
        return -1
    return sum(len(row) >= len(rows[0]) and not any(row[len(rows[0]) :]) for row in rows[1:])


def _parsed(physical: Sequence[str], separator: str) -> _Split:
    """Does what `_split` does, by a separator."""
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
    """Writes a whole number in one way, and leaves other texts alone."""
    if (whole := _WHOLE.fullmatch(text)) is None:
        return text
    sign, digits = whole.groups()
    return digits if sign != "-" or digits == "0" else f"-{digits}"
