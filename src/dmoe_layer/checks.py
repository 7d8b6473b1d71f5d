"""Checks of arguments; their errors name the argument, its value and what was expected."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_count(name: str, value: Any) -> None:
    """Raises unless ``value`` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an int >= 1.")
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected at least 1.")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises unless ``value`` is one of the names in ``choices``."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}.")


def check_flag(name: str, value: Any) -> None:
    """Raises unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected True or False.")


def check_device(x: Tensor, parameter: Tensor, owner: str) -> None:
    """Raises unless ``x`` is on the parameter's device, which this package's operators need."""
    if x.device != parameter.device:
        raise ValueError(
            f"x: got a tensor on {x.device}, but the {owner}'s parameters are on "
            f"{parameter.device}. Move one of them with .to(device). Parameters on meta have no "
            "values, and must be loaded first."
        )


def check_is_no_proxy(x: Any) -> None:
    """Raises for a proxy, which ``torch.fx.symbolic_trace`` passes in the place of a tensor."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            "x: got a torch.fx.Proxy, but what a DMoE does depends on values, which a symbolic "
            "trace does not have. Use torch.export, or a torch.fx.Tracer whose is_leaf_module "
            "returns True for every DMoE."
        )


def describe(value: Any) -> str:
    """Describes the value that an argument had, for the text of an error."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"{value!r:.60} ({type(value).__name__})"
