"""The table and the figure of "Should I use this?", which are made of the studies' csv.

`python -m reference_models.study.documents` renews them, and the pages beside the csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import DataError
from ..markdown import replace_section
from . import sections as of_study
from .figures import write_figures
from .page import write_page
from .results import Results
from .sites import page as sites_page
from .sites.runner import SiteRows
from .unknown import page as unknown_page
from .when_it_helps import DRAWN, FIGURE, scenes_drawn, write_figure

HERE = Path(__file__).parent
STUDY, SITES, UNKNOWN = HERE / "results", HERE / "sites/results", HERE / "unknown/results"
DOCS = HERE.parents[1] / "docs"
START = Path("start/should-i-use-this.md")


def renew() -> None:
    """Renews all pages and figures of this repository that show the studies' numbers.

    Raises:
        DataError: a csv or a mark in a page is missing.
    """
    write_figures(STUDY)
    write_page(STUDY)
    sites_page.write_page(SITES)
    unknown_page.write_page(UNKNOWN)
    renew_documents()


def renew_documents() -> None:
    """Renews what stands in docs/.

    Raises:
        DataError: a csv or a mark in the page is missing.
    """
    replace_section(DOCS / START, "costs", costs())
    write_figure(scenes_drawn(Results(STUDY), SiteRows.read(SITES)), DOCS / FIGURE)


def costs() -> str:
    """A table of what the networks of the figure cost."""
    return of_study.costs(Results(STUDY), [*DRAWN])


if __name__ == "__main__":
    try:
        renew()
    except DataError as error:
        sys.exit(str(error))
