"""Two kinds of error that are shown without a traceback, and how they name what is wrong."""

from __future__ import annotations

from collections.abc import Sequence


class DataError(Exception):
    """What is wrong with a file or a folder, which one, and what to do; shown without traceback."""


class RunError(Exception):
    """What is wrong with a recipe or a run, and what to do; shown without traceback."""


def shown(names: Sequence[str], most: int = 100) -> str:
    """The first of a list of names, and how many more there are.

    Example:
        >>> shown(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def report_faults(faults: Sequence[DataError], damaged: list[DataError] | None) -> None:
    """Adds to `damaged`, where somebody collects; elsewhere raises the faults as one error.

    Raises:
        DataError: there are faults and `damaged` is None.
    """
    if damaged is not None:
        damaged.extend(faults)
    elif faults:
        shown = [str(fault) for fault in faults[:10]]
        if len(faults) > len(shown):
            shown.append(f"and {len(faults) - len(shown)} more; `check` names them all")
        raise DataError("\n".join(shown))
