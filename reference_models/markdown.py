"""Writes Markdown: tables, and the section of a page between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import DataError
from .files import write_whole


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Makes a Markdown table; the cells may contain Markdown.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    top, *rest = (f"| {' | '.join(cells)} |" for cells in (header, *lines))
    return "\n".join([top, f"|{'---|' * len(header)}", *rest])


def section(name: str, content: str) -> str:
    """Puts a text between two marks, by which `replace_section` finds it.

    Example:
        >>> print(section("scores", "| 1 |"))
        <!-- scores: begin -->
        | 1 |
        <!-- scores: end -->
    """
    begin, end = _marks(name)
    return f"{begin}\n{content}\n{end}"


def replace_section(page: Path, name: str, content: str) -> None:
    """Replaces the text between ``<!-- name: begin -->`` and ``<!-- name: end -->`` in a page.

    The text outside the marks stays as it is. The page is written completely or not at all.

    Raises:
        DataError: the page lacks one of the marks.
    """
    begin, end = _marks(name)
    before, found_begin, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise DataError(f"{page}: expected the marks {begin} and {end}, one is missing; add both.")
    new = f"{before}{section(name, content)}{after}"
    write_whole(page, lambda target: target.write_bytes(new.encode()))


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
