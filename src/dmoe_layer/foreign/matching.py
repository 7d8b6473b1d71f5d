"""Finds the modules of a model that match a pattern."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def outermost(
    named: list[tuple[str, nn.Module]], matches: Callable[[str, nn.Module], bool]
) -> list[tuple[str, nn.Module]]:
    """The matching modules that are not inside another matching module."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in named:  # A module comes right before the modules inside it.
        inside = bool(found) and name.startswith(f"{found[-1][0]}.")
        if not inside and matches(name, module):
            found.append((name, module))
    return found


def as_predicate(pattern: Any) -> Callable[[str, nn.Module], bool]:
    """Makes a predicate of a glob on names, or of a predicate with one or two arguments."""
    if isinstance(pattern, str):
        return lambda name, module: fnmatch.fnmatchcase(name, pattern)
    # A class is callable too, but a call does not test whether a module is an instance.
    if not callable(pattern) or isinstance(pattern, (type, nn.Module)):
        raise TypeError(
            f"pattern: got {pattern!r}, expected a glob on module names such as '*.mlp', or a "
            "function such as lambda name, module: isinstance(module, MLPBlock)."
        )
    # Arguments with a default (lambda module, kind=MLPBlock: ...) stay as they are.
    required = [
        parameter
        for parameter in inspect.signature(pattern).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) == 1:
        return lambda name, module: bool(pattern(module))
    return lambda name, module: bool(pattern(name, module))
