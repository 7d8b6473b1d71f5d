"""Runs a command line, and checks its arguments: a device, names from a list, numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection

import torch

from reference_models.errors import DataError
from reference_models.terminal import print_anything


class ArgumentError(ValueError):
    """Which argument, what came and what was expected; shown without a traceback."""


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    words: list[str] | None,
) -> int:
    """Parses the words (None: those of the process) and runs; returns the exit status.

    An `ArgumentError` or a `DataError` is shown as a sentence, without a traceback: status 2.
    """
    print_anything()
    options = parser.parse_args(words)
    try:
        run(options)
    except (ArgumentError, DataError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    """Adds the flag whose value `chosen_device` takes."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="Device that computes. The default is a GPU if there is one, and else the CPU.",
    )


def chosen_device(name: str | None) -> torch.device:
    """The device of this name; without a name a GPU if there is one, else the CPU.

    Raises:
        ArgumentError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ArgumentError("device: got cuda, but PyTorch finds no GPU; expected cpu.")
    return torch.device(name or ("cuda" if has_gpu else "cpu"))


def chosen_names(argument: str, text: str, known: Collection[str]) -> list[str]:
    """Names from a comma-separated list, each once, or all of them for "all".

    Raises:
        ArgumentError: one of them is not known.

    Example:
        >>> chosen_names("providers", "dense,eager,dense", ["eager", "dense", "gemm-loop"])
        ['dense', 'eager']
    """
    if text == "all":
        return list(known)
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise ArgumentError(
            f"{argument}: got {unknown[0]!r}, expected all or some of {', '.join(known)}."
        )
    return names


def require_at_least(least: int, argument: str, value: int | None) -> None:
    """Nothing to require of an argument that was not given.

    Raises:
        ArgumentError: the number is smaller.
    """
    if value is not None and value < least:
        raise ArgumentError(f"{argument}: got {value}, expected {least} or more.")
