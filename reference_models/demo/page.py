"""Writes the demo's report: one HTML page with a picture, the scores and what they mean."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import write_whole
from ..report.page import page_template
from .verdict import Verdict


def write_page(
    path: Path,
    picture: Path,
    table: Sequence[Sequence[str]],
    terms: str,
    verdict: Verdict,
    chance: str,
    limits: str,
    runs: Mapping[str, Path],
) -> None:
    """Writes the page, whole or not at all.

    Args:
        path: the HTML file.
        picture: a PNG file, which becomes part of the page.
        table: rows of cells, the header first.
        terms, verdict, chance, limits: the page's sentences.
        runs: the folder of each method's run, within the page's folder.
    """
    links = {
        name: (run / "evaluation-test" / "report.html").relative_to(path.parent).as_posix()
        for name, run in runs.items()
    }
    page = page_template(Path(__file__).parent).render(
        picture=base64.b64encode(picture.read_bytes()).decode(),
        table=table,
        terms=terms,
        verdict=verdict,
        chance=chance,
        limits=limits,
        links=links,
    )
    write_whole(path, lambda target: target.write_text(page, encoding="utf-8"))
