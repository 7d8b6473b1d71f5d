"""Reads the weights, the activation and the dropout of an MLP of another library.

Its linear layers give its widths. A copy is run (``trial``) to see what the block computes. The
block itself is neither run nor changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .kinds import Trials
from .linears import (
    bias_of,
    describe_convolution,
    is_1x1_convolution,
    is_linear,
    is_spatial_convolution,
    shown_linears,
    weight_of,
    weight_shape_of,
    widths_of,
)
from .trial import Layers, Reading, try_block

_NO_MODULE = (
    "If an MLP is no module by itself, match the layer that holds its linear layers, such as a "
    "torch.nn.TransformerEncoderLayer or a layer of BERT, or move it into a module first."
)
_CONVOLUTIONAL = (
    "Convolutional networks have none. Put experts behind their stages instead: insert_after("
    "model, pattern, ...) puts a DMoE(channel_dim=1, residual=True) behind each matching module."
)


class Mlp(NamedTuple):
    """A two-layer MLP with its weights as (out, in).

    The fields after channel_dim are only set for upcycling. In a gated MLP, the rows of the gate
    come first in w1 and b1, and then those of the linear half.
    """

    dim: int
    hidden_dim: int
    device: torch.device
    dtype: torch.dtype
    channel_dim: int
    w1_HD: Tensor | None = None
    b1_H: Tensor | None = None
    w2_DH: Tensor | None = None
    b2_D: Tensor | None = None
    activation: str = ""
    dropout: float = 0.0


def read_mlp(
    mlp: nn.Module, *, upcycle: bool, dropout: float | None = None, trials: Trials | None = None
) -> Mlp:
    """Reads the widths, the device and the dtype of a two-layer MLP, and its weights to upcycle it.

    Args:
        mlp: The block.
        upcycle: Whether to read its weights and its activation too. The activation must then be a
            known one.
        dropout: Replaces the block's dropout rate, which is then not read.
        trials: The trials of earlier blocks, one of which may also hold for this block.

    Raises:
        ValueError: The block is no such MLP, or could not be run. The error names the part.
    """
    layers = find_layers(mlp)
    parts = {name: mlp.get_submodule(name) for name in layers.names}
    if upcycle:
        for name, linear in parts.items():
            _require_parameters(mlp, name, linear)
    looks = {name: _looks_of(mlp, name, linear) for name, linear in parts.items()}
    (name, (dtype, device)), *rest = looks.items()
    for other, (other_dtype, other_device) in rest if upcycle else ():
        if (other_dtype, other_device) != (dtype, device):
            raise ValueError(
                f"{type(mlp).__name__}: could not read it as one MLP, because {name!r} is {dtype} "
                f"on {device}, but {other!r} is {other_dtype} on {other_device}."
            )
    channel_dim = 1 if is_1x1_convolution(parts[name]) else -1
    read = Mlp(layers.dim, layers.hidden_dim, device, dtype, channel_dim)
    with_rate = upcycle and dropout is None

    def trial() -> Reading:
        return try_block(mlp, layers, upcycle=upcycle, with_rate=with_rate)

    reading = (trials or Trials()).of(mlp, trial, upcycle, with_rate)
    if not upcycle:
        return read
    *first, last = (parts[name] for name in reading.names)
    w1_HD, b1_H = _joined(first, layers.hidden_dim if reading.gate_last else 0)
    return read._replace(
        w1_HD=w1_HD, b1_H=b1_H, w2_DH=weight_of(last), b2_D=bias_of(last),
        activation=reading.activation, dropout=reading.dropout if dropout is None else dropout,
    )  # fmt: skip


def find_layers(mlp: nn.Module) -> Layers:
    """Finds the linear layers of a block D -> H -> D, gated or not, without running it.

    Raises:
        ValueError: The block is not one. The error says why.
    """
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: got {type(mlp).__name__}, expected a torch.nn.Module.")
    kind = type(mlp).__name__
    found = {name: module for name, module in mlp.named_modules() if is_linear(module)}
    for name, linear in found.items():
        _require_plain_weight(f"{kind}: could not read {name or 'it'!r}", linear)
    layers = _as_layers({name: widths_of(linear) for name, linear in found.items()})
    if layers is None or len({is_1x1_convolution(linear) for linear in found.values()}) > 1:
        raise ValueError(f"{kind}: expected a two-layer MLP D -> H -> D, {_found_instead(mlp)}")
    for name, module in mlp.named_modules():
        if is_spatial_convolution(module):
            between = " and ".join(map(repr, layers.names))
            raise ValueError(
                f"{kind}: could not read it as a two-layer MLP. Beside or between {between} there "
                f"is a {describe_convolution(module)} ({name!r} {type(module).__name__}), which "
                "mixes tokens."
            )
    return layers


def _as_layers(widths: dict[str, tuple[int, int]]) -> Layers | None:
    """The order in which linear layers of these widths make an MLP, or None."""
    for last in reversed(widths):
        first = tuple(name for name in widths if name != last)
        hidden_dim, dim = widths[last]
        found = [widths[name] for name in first]
        if found == [(dim, hidden_dim)]:
            return Layers(first, last, dim, hidden_dim, gated=False)
        if found in ([(dim, 2 * hidden_dim)], [(dim, hidden_dim)] * 2):
            return Layers(first, last, dim, hidden_dim, gated=True)
    return None


def advice_for(module: nn.Module) -> str:
    """What to do with a module in which no MLP was found."""
    spatial = sum(map(is_spatial_convolution, module.modules()))
    linear = sum(isinstance(each, nn.Linear) for each in module.modules())
    return _CONVOLUTIONAL if spatial > linear else _NO_MODULE


@torch.no_grad()
def _joined(linears: list[Any], n_rolled: int) -> tuple[Tensor, Tensor | None]:
    """The first layers as one weight and bias, with the last ``n_rolled`` rows at the front."""
    weights, biases = [weight_of(linear) for linear in linears], [bias_of(x) for x in linears]
    if len(linears) == 1 and not n_rolled:
        return weights[0], biases[0]
    weight_HD = torch.cat(weights).roll(n_rolled, 0)
    if all(bias is None for bias in biases):
        return weight_HD, None
    filled = [
        weight.new_zeros(weight.shape[0]) if bias is None else bias
        for weight, bias in zip(weights, biases, strict=True)
    ]
    return weight_HD, torch.cat(filled).roll(n_rolled, 0)


def _require_plain_weight(label: str, linear: nn.Module) -> None:
    """Raises unless the weight of a linear layer has its shape; a computed one is not read."""
    for name, _ in linear.named_buffers(recurse=False):
        if name in ("weight", "bias"):
            raise ValueError(
                f"{label}: its {name} is a buffer, expected an nn.Parameter. It may be quantized. "
                "If it is frozen, make it a parameter with requires_grad=False."
            )
    weight = dict(linear.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return
    if is_lazy(weight):
        raise ValueError(f"{label}: it has no shape yet. Run the model once first.")
    shape = weight_shape_of(linear)
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(
            f"{label}: its weight is {weight.dtype} of shape {tuple(weight.shape)}, expected "
            f"floating point of shape {shape}. It may be quantized or sharded."
        )


def _require_parameters(mlp: nn.Module, name: str, linear: nn.Module) -> None:
    """Raises unless a linear layer's weight and bias are parameters of its own."""
    # A computed weight is not read, since spectral_norm changes its buffers each time.
    computed = None
    if "weight" not in dict(linear.named_parameters(recurse=False)):
        computed = "weight"
    if "bias" in vars(linear) or parametrize.is_parametrized(linear, "bias"):
        computed = "bias"
    if computed:
        raise ValueError(
            f"{type(mlp).__name__}: could not read '{name}.{computed}': it is no parameter but "
            "computed from others (weight_norm, pruning, LoRA). Make it a parameter first, for "
            "instance with torch.nn.utils.parametrize.remove_parametrizations."
        )


def _looks_of(mlp: nn.Module, name: str, linear: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a linear layer."""
    for parameter in linear.parameters():
        return parameter.dtype, parameter.device
    raise ValueError(f"{type(mlp).__name__}: could not read {name!r}: it has no parameters.")


def _found_instead(mlp: nn.Module) -> str:
    """Says, for an error, what a block has instead of linear layers that fit."""
    inside = sorted({type(module).__name__ for module in mlp.children()})
    shown = shown_linears(mlp) or f"inside: {', '.join(inside[:6]) or 'nothing'}"
    advice = f" {advice_for(mlp)}" if inside else ""
    return (
        f"found {sum(map(is_linear, mlp.modules()))} linear layers ({shown}). Match the module "
        f"that holds the MLP and nothing else.{advice}"
    )
