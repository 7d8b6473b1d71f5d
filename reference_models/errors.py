"""The two errors that the command line shows without a traceback, and helpers for their texts."""

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
    """Turns every exception in the block into a `DataError` that names the file.

    Pillow, nibabel, numpy, json and csv raise different exceptions depending on where a file is
    damaged, and document none of them.

    Args:
        path: the file that the block reads.
        problem: what is wrong with the file, such as "not a readable csv".
        advice: what the user can do.

    Raises:
        DataError: the block raised an exception. A `DataError` is passed on unchanged.

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
            f"{path}: {problem} (it needs more memory than this machine has: {one_line(error)}); "
            f"if the file should be that large, use a machine with more memory, else {advice}"
        ) from error
    except Exception as error:
        # The texts of these two are clear without the name of their class.
        kind = "" if type(error) in (ValueError, OSError) else f"{type(error).__name__}: "
        raise DataError(f"{path}: {problem} ({kind}{one_line(error)}); {advice}") from error


def one_line(error: BaseException) -> str:
    """Gives an exception's text without line breaks."""
    return " ".join(str(error).split())


def shown(names: Sequence[str], most: int = 100) -> str:
    """Writes out the first `most` of the names, and how many more there are.

    Example:
        >>> shown(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def report_faults(faults: Sequence[DataError], damaged: list[DataError] | None) -> None:
    """Adds the faults to the list `damaged` or, if that is None, raises them as one error.

    Raises:
        DataError: there are faults and `damaged` is None. The text quotes the first ten.
    """
    if damaged is not None:
        damaged.extend(faults)
    elif faults:
        lines = [str(fault) for fault in faults[:10]]
        if len(faults) > len(lines):
            lines.append(f"and {len(faults) - len(lines)} more; the command `check` names them all")
        raise DataError("\n".join(lines))
