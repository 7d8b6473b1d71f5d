"""The two errors that a user sees without a traceback, and how their texts name many things."""

from __future__ import annotations

from collections.abc import Sequence


class DataError(Exception):
    """Says what is wrong with the user's data, with which file, and what to do."""


class RunError(Exception):
    """Says what is wrong with a recipe or a run, and what to do."""


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
