"""The two errors that a user sees without a traceback, and how their texts are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class DataError(Exception):
    """Says what is wrong with the user's data, with which file, and what to do."""


class RunError(Exception):
    """Says what is wrong with a recipe or a run, and what to do."""


@contextmanager
def reading(path: Path | str, problem: str, advice: str) -> Iterator[None]:
    """Makes a `DataError` that names the file of whatever a foreign reader raises in the block.

    Which exception Pillow, nibabel, numpy, json or csv raise depends on where the damage lies, and
    none of them is promised.

    Args:
        path: the file that is read.
        problem: what the user is told of it, such as "not a readable csv".
        advice: what to do.

    Raises:
        DataError: the block raised something. An error that is a `DataError` passes as it is.

    Example:
        >>> try:
        ...     with reading("a.json", "not readable json", "write it again"):
        ...         {}["labels"]
        ... except DataError as error:
        ...     print(error)
        a.json: not readable json (KeyError: 'labels'); write it again
    """
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path}: {problem} (it needs more memory than there is: {one_line(error)}); if its "
            f"size is right, use a machine with more memory, else {advice}"
        ) from error
    except Exception as error:
        # The words of these two stand by themselves.
        kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
        raise DataError(f"{path}: {problem} ({kind}{one_line(error)}); {advice}") from error


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks."""
    return " ".join(str(error).split())


def shown(names: Sequence[str], most: int = 100) -> str:
    """Writes out the first `most` of the names, and how many more there are.

    Example:
        >>> shown(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def report_faults(faults: Sequence[DataError], damaged: list[DataError] | None) -> None:
    """Adds the faults to the list `damaged`; without a list, raises them as one error.

    Raises:
        DataError: there are faults and `damaged` is None. It quotes the first ten.
    """
    if damaged is not None:
        damaged.extend(faults)
    elif faults:
        lines = [str(fault) for fault in faults[:10]]
        if len(faults) > len(lines):
            lines.append(f"and {len(faults) - len(lines)} more; `check` names them all")
        raise DataError("\n".join(lines))
