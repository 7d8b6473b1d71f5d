"""The command `python -m reference_models.study.sites`: continues the study of many sites."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ...errors import DataError, RunError
from ..documents import renew_documents
from .page import write_page
from .runner import run_sites

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class SitesSettings:
    """Continues the study of many sites that share a few rules, and of new sites."""

    results: Path | None = None
    """Folder of the page and of the csv, which record
    what has been run. By default this repository's
    own folder."""
    out: Path = Path("study_output/sites")
    """Folder of trained networks. A network that is missing there is trained again when needed."""
    processes: int = 2
    """Number of jobs that run at the same time, each of
    them on one core. 0: run nothing, and write the
    page from the csv."""


def sites(settings: SitesSettings) -> None:
    """Runs the jobs that are not done yet, and writes the page."""
    torch.set_num_threads(1)
    results = settings.results or RESULTS
    if settings.processes:
        run_sites(results, settings.out, processes=settings.processes)
    write_page(results)
    if results == RESULTS:
        renew_documents()


if __name__ == "__main__":
    try:
        sites(tyro.cli(SitesSettings, prog="python -m reference_models.study.sites"))
    except (DataError, RunError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues the study.")
