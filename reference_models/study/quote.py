"""How the study's pages write numbers, and the link to the page that explains them."""

from __future__ import annotations

from .tables import Difference, ScoreSummary

# Results can be written into any folder, so the link is not relative.
EXPLAINED = "[The study's page](https://github.com/dmoe-layer/dmoe-layer/blob/main/docs/explanation/study.md)"


def quotation(row: Difference) -> str:
    """A difference as pages quote it: its mean, its interval, and on how many seeds a is ahead.

    Example:
        >>> quotation(Difference("rule", "dmoe", "film", "es_dice", 0.1234, -0.0006, 0.145,
        ...                      ahead=4, seeds=5, by_seed=()))
        '+.123 (-.001 to .145; 4 of 5)'
    """
    return f"{signed(row)} ({interval(row)}; {row.ahead} of {row.seeds})"


def signed(row: Difference) -> str:
    """The mean of a difference."""
    text = short(row.difference)
    return text if text.startswith("-") else f"+{text}"


def interval(row: Difference | ScoreSummary) -> str:
    """The 95 % interval of a mean over seeds."""
    if row.low is None or row.high is None:
        return "no interval"
    return f"{short(row.low)} to {short(row.high)}"


def short(number: float) -> str:
    """Three decimals, and no nought before the point.

    Example:
        >>> short(0.8765), short(-0.0123), short(1.0), short(-0.0004)
        ('.876', '-.012', '1.000', '.000')
    """
    text = f"{round(number, 3) + 0.0:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
