"""The command `python -m reference_models.study.sites`: goes on with the study of many sites."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ...errors import DataError, RunError
from .page import write_page
from .runner import run_sites

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class SitesSettings:
    """Where many sites share a few protocols, and where a new site comes: what has not been run."""

    results: Path = RESULTS
    """Folder of the csv, which say what is done, and of the page. By default this project's own."""
    out: Path = Path("study_output/sites")
    """Folder of trained networks; what is missing in it is trained again."""
    processes: int = 2
    """Number of jobs at a time, each on a core of its own; 0: write the page of what is done."""


def sites(settings: SitesSettings) -> None:
    """Runs what is not done yet, and writes the page."""
    torch.set_num_threads(1)
    if settings.processes:
        run_sites(settings.results, settings.out, processes=settings.processes)
    write_page(settings.results)


if __name__ == "__main__":
    try:
        sites(tyro.cli(SitesSettings))
    except (DataError, RunError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The study goes on by the same command.")
