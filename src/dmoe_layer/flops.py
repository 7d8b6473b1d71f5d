"""FLOP formulas of the layer's operators, for torch.utils.flop_counter.

A multiply-add counts as two, as in the formulas of PyTorch's own operators. What backward computes
again does not count. Neither do softmax, noise, activations, padding and tokens outside of a mask.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from math import prod
from types import ModuleType

import torch

from .backend import load

COUNTER = "torch.utils.flop_counter"
# Formulas by the operator's name. A formula gets the shapes of the tensors.
FORMULAS: dict[str, Callable[..., int]] = {}


def _formula_of(operator: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    def add(formula: Callable[..., int]) -> Callable[..., int]:
        FORMULAS[operator] = formula
        return formula

    return add


@_formula_of("router_logits")
def _router(x, w_A2ED, b, rows, counts, seed, **_):  # type: ignore[no-untyped-def]
    """A product of every token with its clean router and, with a seed, with its noise router."""
    return 2 * prod(x) * w_A2ED[2] * (1 if seed is None else 2)


@_formula_of("router_logits_backward")
def _(dlogits, *inputs, **_):  # type: ignore[no-untyped-def]
    return 2 * _router(*inputs)


@_formula_of("fused_route")
def _(x, w, b, rows, counts, k, seed, *_, **__):  # type: ignore[no-untyped-def]
    return _router(x, w, b, rows, counts, seed)


@_formula_of("fused_route_backward")
def _(dlogits, dgates, chosen, gates, slopes, x, w, b, *options, **_):  # type: ignore[no-untyped-def]
    return 2 * _router(x, w, b, *options[:2], slopes)


def _products(gates_TK: Sequence[int], *weights: Sequence[int]) -> int:
    """A product of every (token, slot) pair with one expert's part of each of these weights.

    For gated experts w1 has the rows of the gate too.
    """
    return 2 * prod(gates_TK) * sum(prod(shape[1:]) for shape in weights)


@_formula_of("experts")
def _(x, indices, gates, w1, b1, w2, *options, **_):  # type: ignore[no-untyped-def]
    return _products(gates, w1, w2)


@_formula_of("fused_experts")
def _(x, order, offsets, tiles, gates, w1, b1, w2, *options, **_):  # type: ignore[no-untyped-def]
    return _products(gates, w1, w2)


@_formula_of("experts_backward")
def _(dy, z, x, indices, gates, w1, b1, w2, *options, **_):  # type: ignore[no-untyped-def]
    of_x, _, of_w1, _, of_w2, _ = options[-1]
    # The gradient of the hidden layer, and those of x, w1 and w2 that are needed.
    return _products(gates, w2, *[w1] * of_x, *[w1] * of_w1, *[w2] * of_w2)


@_formula_of("fused_experts_backward")
def _(dy, hidden, x, order, offsets, tiles, gates, w1, b1, w2, *options, **_):  # type: ignore[no-untyped-def]
    of_rows, of_weights = options[-2:]
    return _products(gates, w2, *[w1] * of_rows, *[w1, w2] * of_weights)


def _register(counter: ModuleType) -> None:
    """Registers all formulas at a counter, also those of kernels that are not loaded yet."""
    with contextlib.suppress(Exception):  # If the kernels cannot be loaded, none will be counted.
        load("triton")
    for name, formula in FORMULAS.items():
        if (operator := getattr(torch.ops.dmoe_layer, name, None)) is not None:
            counter.register_flop_formula(operator)(formula)


class _Loader(Loader):
    """Loads the counter as its own loader does, and registers the formulas."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        _register(module)


class _Finder(MetaPathFinder):
    """Waits for the counter to be imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


# The counter imports Triton, and so is not imported for this.
if COUNTER in sys.modules:
    _register(sys.modules[COUNTER])
sys.meta_path.insert(0, _Finder())
