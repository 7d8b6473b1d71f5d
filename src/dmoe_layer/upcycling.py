"""Upcycling: makes a layer in which every expert starts as a given MLP."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from .foreign.read_mlp import Mlp

Layer = TypeVar("Layer", bound=nn.Module)


def upcycled(kind: type[Layer], mlp: Mlp, **options: Any) -> Layer:
    """Makes a layer of the class ``kind`` (``DMoE`` or a subclass); each expert is the MLP.

    The experts' weights are not drawn at random first. Only the router uses the random generator.

    Raises:
        TypeError: An option was passed that the MLP decides.
    """
    decided = {"dim", "hidden_dim", "activation", "bias", "zero_init", "device", "dtype"}
    if clash := sorted(decided & options.keys()):
        raise TypeError(f"from_mlp: got {', '.join(clash)}, which the MLP decides. Leave it out.")
    layer: Any = kind.__new__(kind)
    vars(layer)["_is_overwritten"] = True  # for reset_parameters, which __init__ calls
    layer.__init__(
        mlp.dim,
        hidden_dim=mlp.hidden_dim,
        activation=mlp.activation,
        bias=mlp.b1_H is not None or mlp.b2_D is not None,
        dropout=mlp.dropout,
        device=mlp.device,
        dtype=mlp.dtype,
        **{"channel_dim": mlp.channel_dim, **options},
    )
    del layer._is_overwritten
    with torch.no_grad():
        for new_EX, old_X in (
            (layer.w1_EHD, mlp.w1_HD),
            (layer.w1_bias, mlp.b1_H),
            (layer.w2_EDH, mlp.w2_DH),
            (layer.w2_bias, mlp.b2_D),
        ):
            if new_EX is not None:
                new_EX.zero_() if old_X is None else new_EX.copy_(old_X.expand_as(new_EX))
    layer._copied_on_meta = layer.w1_EHD.is_meta
    made: Layer = layer
    return made
