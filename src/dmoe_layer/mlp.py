"""Reads a foreign two-layer MLP: its linears, activation and dropout; or says what it could not."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eager import ACTIVATIONS


class LinearPair(NamedTuple):
    """The two linear layers of an MLP, weights as (out, in)."""

    w1_HD: Tensor
    b1_H: Tensor | None
    w2_DH: Tensor
    b2_D: Tensor | None

    @property
    def dim(self) -> int:
        return self.w1_HD.shape[1]

    @property
    def hidden_dim(self) -> int:
        return self.w1_HD.shape[0]


def read_linears(mlp: nn.Module) -> LinearPair:
    """The two linear layers of a block D -> H -> D.

    Raises:
        ValueError: saying which part could not be read.
    """
    found = [(name, m) for name, m in mlp.named_modules() if _is_linear(m)]
    if len(found) != 2:
        names = ", ".join(f"{name or 'itself'} {tuple(m.weight.shape)}" for name, m in found)
        hint = " Three are the mark of a gated MLP (GLU)." if len(found) == 3 else ""
        raise ValueError(
            f"{type(mlp).__name__}: expected a two-layer MLP, found {len(found)} linear layers"
            f"{': ' + names if names else ''}.{hint}"
        )
    (name1, first), (name2, second) = found
    (w1_HD, b1_H), (w2_DH, b2_D) = _weight_and_bias(first), _weight_and_bias(second)
    if w1_HD.shape != w2_DH.shape[::-1]:
        raise ValueError(
            f"{type(mlp).__name__}: expected linear layers D -> H and H -> D, but {name1} maps "
            f"{w1_HD.shape[1]} -> {w1_HD.shape[0]} and {name2} maps "
            f"{w2_DH.shape[1]} -> {w2_DH.shape[0]}."
        )
    return LinearPair(w1_HD, b1_H, w2_DH, b2_D)


def read_dropout(mlp: nn.Module) -> float:
    """The rate of the block's last dropout, the one that stands where an expert's does."""
    rates = [m.p for m in mlp.modules() if isinstance(m, nn.Dropout)]
    return float(rates[-1]) if rates else 0.0


def read_activation(mlp: nn.Module) -> str:
    """The name of the activation, found by running the block.

    A copy of the block, in double precision and eval mode, is held against w2·act(w1·x + b1) + b2
    for every activation this package knows. What the block computes decides, not what it is
    called: a functional activation is found, and a residual, a norm or a scale inside the block
    is not overlooked.

    Raises:
        ValueError: if no activation explains the output, or the block cannot be run on x alone.
    """
    try:
        twin: Any = copy.deepcopy(mlp).to("cpu", torch.float64).eval()
    except Exception as error:
        raise ValueError(f"{type(mlp).__name__}: could not copy it to read it: {error}") from error
    linears = read_linears(twin)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, linears.dim, dtype=torch.float64, generator=generator)
    # Large enough to meet the saturated ends of the activation too.
    x = x * (4 / linears.w1_HD.detach().norm(dim=1).clamp_min(1e-6).mean())
    with torch.no_grad():
        try:
            y = twin(x)
        except Exception as error:
            raise ValueError(
                f"{type(mlp).__name__}: could not read its activation, because calling it with "
                f"one tensor of shape (batch, tokens, {linears.dim}) failed: {error}"
            ) from error
        for name, activation in ACTIVATIONS.items():
            hidden = activation.forward(F.linear(x, linears.w1_HD, linears.b1_H))
            expected = F.linear(hidden, linears.w2_DH, linears.b2_D)
            same_form = isinstance(y, Tensor) and y.shape == expected.shape
            if same_form and torch.allclose(y, expected, rtol=1e-9, atol=1e-9):
                return name
    inside = ", ".join(sorted({type(m).__name__ for m in mlp.modules() if m is not mlp}))
    raise ValueError(
        f"{type(mlp).__name__}: could not read its activation. Its two linear layers were found, "
        f"but its output is none of {', '.join(ACTIVATIONS)} between them (inside: {inside}). It "
        "may use another activation, or hold a residual, a norm or a scale."
    )


def _is_linear(module: nn.Module) -> bool:
    # Hugging Face's GPT-2 family keeps its linear layers as Conv1D, transposed.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.mT
    return weight, linear.bias
