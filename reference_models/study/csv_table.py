"""Tables in csv files: a dataclass says what a row holds, and rows are written and read as such."""

from __future__ import annotations

import csv
import io
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ..errors import DataError

Record = TypeVar("Record")


class Table(Generic[Record]):
    """A csv file with a row for each record and a column for each of its fields, in their order.

    A text or a whole number is written as it is, and a bool as "yes" or "no". Other numbers have
    four decimals, or the format that the field's type names: ``Annotated[float, "g"]``. The cells
    of a tuple stand in one cell with ";" between them, and None is an empty cell. If the last field
    maps names to numbers, every name has a column, which is empty where a record lacks the name.

    Args:
        name: of the file.
        kind: the dataclass of the records.
    """

    def __init__(self, name: str, kind: Callable[..., Record]) -> None:
        self.name, self._kind = name, kind
        self._fields: dict[str, Any] = get_type_hints(kind, include_extras=True)
        last = [*self._fields][-1]
        self._mapping = last if get_origin(self._fields[last]) is Mapping else None
        if self._mapping is not None:
            self._of_names = get_args(self._fields.pop(self._mapping))[1]
        self.columns = tuple(self._fields)  # but for those of the mapping

    def write(self, folder: Path, records: Iterable[Record], names: Sequence[str] = ()) -> None:
        """Writes the file.

        Args:
            folder: where; it is there.
            records, names: as of `text`.
        """
        (folder / self.name).write_bytes(self.text(records, names).encode())

    def text(self, records: Iterable[Record], names: Sequence[str] = ()) -> str:
        """What the file holds.

        Args:
            records: the rows.
            names: the columns of the field that is a mapping, in order.
        """
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*self.columns, *names])
        for record in records:
            cells = [_cell(kind, getattr(record, f)) for f, kind in self._fields.items()]
            if self._mapping is not None:
                by_name = getattr(record, self._mapping)
                cells += [_cell(self._of_names, by_name.get(name)) for name in names]
            writer.writerow(cells)
        return file.getvalue()

    def read(self, folder: Path) -> list[Record]:
        """The records of a file that `write` wrote; numbers as the file shows them.

        Raises:
            DataError: it cannot be read, or holds something else.
        """
        path = folder / self.name
        header, *lines = list(csv.reader(read_result(path).splitlines())) or [[]]
        fixed, names = header[: len(self.columns)], header[len(self.columns) :]
        if fixed != [*self.columns] or (names and self._mapping is None):
            raise DataError(
                f"{path}: got the columns {', '.join(header) or 'none'}, expected "
                f"{', '.join(self.columns)}. Another version of the study wrote this file; run the "
                "study again, or name another folder."
            )
        records = []
        for number, line in enumerate(lines, start=2):
            try:
                cells = dict(zip(header, line, strict=True))
                values = {name: _value(kind, cells[name]) for name, kind in self._fields.items()}
                if self._mapping is not None:
                    values[self._mapping] = {
                        name: _value(self._of_names, cells[name]) for name in names if cells[name]
                    }
            except ValueError as error:
                raise DataError(
                    f"{path}: line {number} is no row of this table ({error}). The file was "
                    "changed by hand or cut off; run the study again, or name another folder."
                ) from error
            records.append(self._kind(**values))
        return records


def read_result(path: Path) -> str:
    """The text of a file of the results.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected a file that the study writes "
            "into its folder of results. Run the study, or name another folder."
        ) from error


def _cell(kind: Any, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ";".join(_cell(None, item) for item in value)
    if isinstance(value, float):
        if get_origin(kind) is Annotated:
            return format(value, kind.__metadata__[0])
        return f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no minus before a zero
    return str(value)


def _value(kind: Any, cell: str) -> Any:
    """The inverse of `_cell`, for a field's type.

    Raises:
        ValueError: the cell is none of that type.
    """
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (choice for choice in get_args(kind) if choice is not type(None))
        if not cell:
            return None
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) is Literal:
        if cell not in get_args(kind):
            raise ValueError(f"got {cell!r}, expected one of {', '.join(get_args(kind))}")
        return cell
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], part) for part in cell.split(";"))
    if kind is bool:
        if cell not in ("yes", "no"):
            raise ValueError(f"got {cell!r}, expected yes or no")
        return cell == "yes"
    return kind(cell)
