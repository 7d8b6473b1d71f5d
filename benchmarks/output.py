"""Writes results into CSV files and pages, and formats numbers for tables."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reference_models.errors import DataError
from reference_models.files import write_whole
from reference_models.markdown import replace_section

HERE = Path(__file__).parent
# A run of everything writes here and renews its section of the page; others write elsewhere.
RESULTS, README = HERE / "results", HERE / "README.md"
OTHER_RESULTS = Path("bench_output")
# What `machine.device_kind` says of the machines that the page has sections for.
SECTIONS = ("cpu-avx2", "cpu-avx512", "cuda")


@dataclass(frozen=True)
class ResultsFolder:
    """Where a command writes its rows.

    ``whole``: everything that the README shows is measured, as it shows it.
    """

    path: Path
    whole: bool

    @classmethod
    def chosen(cls, out: Path | None, whole: bool) -> ResultsFolder:
        """The folder ``out``, or the one for such a run; makes it, and tries to write to it.

        Raises:
            DataError: it cannot be written to.
        """
        folder = out or (RESULTS if whole else OTHER_RESULTS)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise DataError(
                f"out: got {folder}, expected a folder that can be written to ({error.strerror})."
            ) from error
        return cls(folder, whole)

    def write(self, rows: Sequence[Any], name: str) -> Path:
        """Writes the rows to the CSV file of this name; returns its path."""
        write_csv(rows, self.path / name)
        return self.path / name

    def write_part(self, rows: Sequence[Any], name: str) -> None:
        """Writes what rows there are; of a whole run, whose old file stays till the end, none."""
        if not self.whole:
            self.write(rows, name)

    def finish(self, written: list[Path], mark: str, section: Callable[[], str]) -> None:
        """Renews the README's section ``mark`` after a whole run, and prints what was written.

        Raises:
            DataError: the README has no marks to write between.
        """
        if self.whole and self.path.resolve() == RESULTS:
            replace_section(README, mark, section())
            written = [*written, README]
        print("\nWrote " + ", ".join(map(str, written)))


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Rows of one dataclass, at least one; its fields are the columns. Whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in asdict(row).items()}
        )
    write_whole(
        path, lambda target: target.write_text(text.getvalue(), encoding="utf-8", newline="")
    )


def brief(value: float) -> str:
    """Three digits, without an exponent.

    >>> brief(1012.3), brief(39.96), brief(0.12345)
    ('1,010', '40', '0.123')
    """
    return f"{float(f'{value:.3g}'):,g}"


def median_and_quartiles(median: float, low: float | None, high: float | None) -> str:
    """
    >>> median_and_quartiles(1.0, 0.51, 1.5)
    '1 (0.51–1.5)'
    """
    return f"{brief(median)} ({brief(low or 0)}–{brief(high or 0)})"
