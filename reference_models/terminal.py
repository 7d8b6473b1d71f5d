"""Lets commands print any text, and end quietly if nobody reads it any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def print_anything() -> None:
    """Lets stdout write a letter that its encoding lacks as \\u2022, as stderr does.

    Pipes on Windows have the letters of one language, Linux under LC_ALL=C has only ASCII, and no
    encoding has every name that a file can have.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has another class
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def ends_with_its_reader() -> Iterator[None]:
    """Ends the program without a traceback when the reader of its output has gone, as `head` does.

    Raises:
        SystemExit: with code 141, which shells give a program that a broken pipe has ended.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # What is still in memory would fail when Python ends.
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        raise  # another pipe than stdout
