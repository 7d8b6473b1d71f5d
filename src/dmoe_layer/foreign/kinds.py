"""Whether two modules differ only in their weights, so that one trial holds for both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import nn

Told = TypeVar("Told")
# Values that are equal if their repr is. It distinguishes -0.0 from 0.0, and True and "1" from 1.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Trials:
    """The results of trials of modules, or their errors; there is one trial for each kind."""

    def __init__(self) -> None:
        # The modules are stored too, since the keys name their parts by identity. They must live.
        self._told: dict[Hashable, tuple[nn.Module, Any]] = {}

    def of(self, module: nn.Module, trial: Callable[[], Told], *options: Hashable) -> Told:
        """The result of ``trial()``, or of an earlier one of the same kind and options.

        Raises:
            ValueError: The error of the trial.
        """
        key = kind_of(module), options
        if key not in self._told:
            try:
                self._told[key] = module, trial()
            except ValueError as error:
                self._told[key] = module, error
        told: Told = self._told[key][1]
        if isinstance(told, ValueError):
            raise told
        return told


def kind_of(module: nn.Module) -> Hashable:
    """A key that two modules share only if they differ in nothing but their parameters' values.

    It holds classes, names, hooks, and every attribute. Numbers and strings count by value,
    containers by their items, parameters by shape and dtype, and submodules in the same way again.
    All else, such as functions, configurations and buffers, counts by identity. So a module with
    an unknown attribute is a kind by itself. The key is valid as long as the modules live.
    """
    return _of_module(module, {})


def _of_module(module: nn.Module, seen: dict[int, int]) -> Hashable:
    # One module in two places differs from two equal modules.
    if id(module) in seen:
        return "again", seen[id(module)]
    seen[id(module)] = len(seen)
    if any(vars(kind).get("__slots__") for kind in type(module).__mro__):
        return id(module)  # vars() does not contain all of its attributes.
    attributes: list[tuple[str, Hashable]] = []
    for name, value in vars(module).items():
        if name == "_modules":
            parts = [(n, m if m is None else _of_module(m, seen)) for n, m in value.items()]
            attributes.append((name, tuple(parts)))
        else:
            attributes.append((name, _of_value(value, seen)))
    return id(type(module)), tuple(attributes)


def _of_value(value: Any, seen: dict[int, int]) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if id(value) in seen:  # a parameter in two places, or a list within itself
        return "again", seen[id(value)]
    seen[id(value)] = len(seen)
    if kind in (list, tuple):
        return kind, tuple(_of_value(v, seen) for v in value)
    if kind in (dict, OrderedDict):
        return kind, tuple((_of_value(k, seen), _of_value(v, seen)) for k, v in value.items())
    if kind in (set, frozenset) and all(type(v) in _PLAIN for v in value):
        return kind, frozenset(map(repr, value))
    if kind is nn.Parameter and value.is_floating_point():
        looks = value.shape, value.dtype, value.device, value.layout, value.requires_grad
        return kind, looks, _of_value(vars(value), seen)
    return id(value)
