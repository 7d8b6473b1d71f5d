"""The command `python -m reference_models.study.unknown`: continues the study of unknown values."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from ...errors import DataError, RunError
from ...files import write_whole
from ...training.runs import lock_run
from .. import tables
from ..scenes import Design
from .page import write_page
from .plan import jobs
from .trials import UNKNOWN_SCORES, run_unknown

RESULTS = Path(__file__).parent / "results"
STUDY = Path(__file__).parents[1] / "results"  # whose learning rates are taken


@dataclass(frozen=True)
class UnknownSettings:
    """Continues the study of prediction without knowing the attribute of any test case."""

    results: Path = RESULTS
    """Folder of the page and of the csv, which records
    what has been run. By default the folder in this
    repository."""
    out: Path = Path("study_output/unknown")
    """Folder of the training under way."""
    most: int | None = None
    """Number of trainings after which to stop. By
    default all that are left. 0: run nothing, and
    write the page from the csv."""


def unknown(settings: UnknownSettings) -> None:
    """Runs the jobs that are not done yet, and writes the page."""
    torch.set_num_threads(1)
    results = settings.results
    results.mkdir(parents=True, exist_ok=True)
    there = (results / UNKNOWN_SCORES.name).exists()
    rows = UNKNOWN_SCORES.read(results) if there else []
    done = {(row.scene, row.method, row.seed) for row in rows}
    left = [
        job
        for job in jobs(tables.RATES.read(STUDY))
        if (job.scene, job.method, job.data_seed) not in done
    ]
    with lock_run(settings.out):
        for job in left[: settings.most]:
            rows += run_unknown(job, Design(), settings.out)
            _write(results / UNKNOWN_SCORES.name, UNKNOWN_SCORES.text(rows))
            Console(highlight=False, soft_wrap=True).print(f"{job.name}: done", markup=False)
    write_page(results)


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    try:
        unknown(tyro.cli(UnknownSettings, prog="python -m reference_models.study.unknown"))
    except (DataError, RunError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues the study.")
