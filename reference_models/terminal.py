"""Lets commands print any text, even if the terminal or the pipe cannot show all letters.

It also says how `--help` shows that a flag has no default.
"""

from __future__ import annotations

import io
import sys

import tyro

# For a flag that takes several words, and none by default: `--help` would show "(default: )".
OR_NONE = tyro.conf.arg(help_behavior_hint=lambda words: f"(default: {words or 'None'})")


def print_anything() -> None:
    """Lets stdout write a letter that its encoding lacks as \\u2022, as stderr does.

    Pipes on Windows have the letters of one language, Linux under LC_ALL=C has only ASCII, and no
    encoding has every name that a file can have.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another class
        sys.stdout.reconfigure(errors="backslashreplace")
