"""Where results are written, CSV files of rows, and how numbers are shown in tables."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from reference_models.errors import DataError
from reference_models.files import write_whole

HERE = Path(__file__).parent
# A run of everything writes here and renews its section of the page; others write elsewhere.
RESULTS, README = HERE / "results", HERE / "README.md"
OTHER_RESULTS = Path("bench_output")


def check_writable(folder: Path) -> None:
    """Makes the folder, and a file in it, before anything is measured.

    Raises:
        DataError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(
            f"out: got {folder}, expected a folder that can be written to ({error.strerror})."
        ) from error


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Rows of one dataclass, at least one; its fields are the columns. Whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {n: f"{v:.6g}" if isinstance(v, float) else v for n, v in asdict(row).items()}
        )
    content = text.getvalue()
    write_whole(path, lambda target: target.write_text(content, encoding="utf-8", newline=""))


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
