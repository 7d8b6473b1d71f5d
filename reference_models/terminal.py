"""Lets commands print anything, whatever the terminal or the pipe can show."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Lets stdout write what its encoding lacks as stderr does, as \\u2022, and not fail.

    Pipes on Windows have the letters of one language, Linux under LC_ALL=C has ASCII, and no
    encoding has every name that a file can have.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has something else there
        sys.stdout.reconfigure(errors="backslashreplace")
