"""Writes Markdown: tables, and the part of a page between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import DataError
from .files import write_whole


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Makes a table of cells that are Markdown themselves.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    top, *rest = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([top, f"|{'---|' * len(header)}", *rest])


def section(name: str, content: str) -> str:
    """Text between the marks by which `replace_section` finds it.

    Example:
        >>> print(section("scores", "| 1 |"))
        <!-- scores: begin -->
        | 1 |
        <!-- scores: end -->
    """
    begin, end = _marks(name)
    return f"{begin}\n{content}\n{end}"


def replace_section(page: Path, name: str, content: str) -> None:
    """Puts text between the marks ``<!-- name: begin -->`` and ``<!-- name: end -->`` of a page.

    What lies outside them stays as it is; the page is written whole or not at all.

    Raises:
        DataError: the page has no such marks.
    """
    begin, end = _marks(name)
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise DataError(f"{page}: got none of {begin} … {end}, expected both; add them.")
    new = f"{before}{section(name, content)}{after}"
    write_whole(page, lambda target: target.write_bytes(new.encode()))


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
