"""What the commands are given: a device, names from a list, numbers that must not be too small."""

from __future__ import annotations

from collections.abc import Collection

import torch


class ArgumentError(ValueError):
    """Which argument, what came and what was expected; shown without a traceback."""


def chosen_device(name: str | None) -> torch.device:
    """That of this name; without one a GPU if there is one, else the CPU.

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
