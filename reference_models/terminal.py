"""Lets commands print any text, even if the terminal or the pipe cannot show all letters."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Lets stdout write a letter that its encoding lacks as \\u2022, as stderr does.

    Pipes on Windows have the letters of one language, Linux under LC_ALL=C has only ASCII, and no
    encoding has every name that a file can have.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another class
        sys.stdout.reconfigure(errors="backslashreplace")
