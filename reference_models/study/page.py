"""Writes the study's tables into a Markdown page.

`python -m reference_models.study.page reference_models/study/results reference_models/README.md`
draws the figures again and renews this project's page.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import tyro

from ..errors import DataError
from ..markdown import replace_section, section
from . import sections
from .figures import FOLDER, write_figures
from .results import Results

MARK = "study"  # the name of the part of a page that is this file's


def write_page(results: Path, page: Path) -> None:
    """Puts the tables between the marks of a page; a page that is not there is made of them.

    The page beside the results has all of them, another page the scores alone.

    Args:
        results: folder of the csv and figures.
        page: the markdown file; what lies outside the marks stays as it is.

    Raises:
        DataError: a file of the results is missing, or the page has no marks.
    """
    figures = Path(os.path.relpath((results / FOLDER).resolve(), page.resolve().parent))
    whole = page.resolve().parent == results.resolve()
    content = block(results, figures.as_posix(), whole=whole)
    if page.exists():
        replace_section(page, MARK, content)
    else:
        page.write_text(f"# The study\n\n{section(MARK, content)}\n", encoding="utf-8")


def block(results: Path, figures: str, *, whole: bool) -> str:
    """What stands between the marks.

    Args:
        results: folder of the csv.
        figures: that of the figures, as the page's links name it.
        whole: all tables, or the scores alone.
    """
    read = Results(results)
    parts = [sections.made_with(read), sections.scores(read)]
    if whole:
        parts += [
            sections.against(read),
            sections.told(read),
            sections.ablations(read),
            sections.strict(read),
            sections.rates(read),
            sections.spread(read),
        ]
    parts.append(sections.links(read, figures))
    return "\n\n".join(part for part in parts if part)


def renew(results: Path, page: Path, /) -> None:
    """Draws the figures of a results folder again, and renews a page's tables.

    Args:
        results: folder with the csv.
        page: markdown file with the marks.
    """
    write_figures(results)
    write_page(results, page)


if __name__ == "__main__":
    try:
        tyro.cli(renew)
    except DataError as error:
        sys.exit(str(error))
