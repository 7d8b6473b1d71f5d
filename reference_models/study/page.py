"""Writes the page of the study's tables beside the csv that they are made of."""

from __future__ import annotations

from pathlib import Path

from ..files import write_whole
from . import sections
from .results import Results

PAGE = "README.md"


def write_page(results: Path) -> None:
    """Writes the page into a folder of results; the figures have been drawn before.

    Raises:
        DataError: a file of the results is missing.
    """
    page = text_of(Results(results))
    write_whole(results / PAGE, lambda target: target.write_bytes(page.encode()))


def text_of(results: Results) -> str:
    """The page, with a heading for each part of the study that the results have."""
    parts = [
        ("Scores", sections.scores(results)),
        ("Differences between methods", sections.against(results)),
        ("With another attribute than the right one", sections.told(results)),
        ("The layer with one setting changed", sections.ablations(results)),
        ("Stricter intervals", sections.strict(results)),
        ("Learning rates", sections.rates(results)),
        ("Initial weights alone", sections.spread(results)),
        ("Figures", sections.links(results)),
    ]
    text = [f"## {title}\n\n{part}" for title, part in parts if part]
    return "\n\n".join(["# Tables of the study", sections.made_with(results), *text]) + "\n"
