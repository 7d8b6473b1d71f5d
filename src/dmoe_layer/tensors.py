"""The tuples of tensors that travel from room to room; shape letters as in ``layer``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What one call routed. Plain tensors, never detached; T counts the tokens inside the mask.

    Attributes:
        expert_indices: (T, k) int64, the experts of each token, best first.
        gates: (T, k), the softmax over those k scores; sums to 1. At least fp32.
        logits: (T, E), the scores that were ranked, noise included. At least fp32.
        attributes: (T,) int64, each token's attribute value (-1: unknown), (T, n) for n
            attributes, or None where no attributes were given.

    Tokens stand sample after sample, in the order of ``x`` with the channels moved last.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> layer, x = DMoE(16, attribute_sizes=3), torch.randn(2, 10, 16)
        >>> y, routing = layer(x, torch.tensor([0, 2]), return_routing=True)
        >>> routing.attributes
        tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """

    expert_indices: Tensor
    gates: Tensor
    logits: Tensor
    attributes: Tensor | None = None


# By which pickle finds it again. It was defined there, and a file that holds one names the place:
# so those of an older layout load here, and those of this one load there.
Routing.__module__ = "dmoe_layer.router"


class RouterWeights(NamedTuple):
    """A row for every router, clean (0) and noise (1) weights side by side."""

    w_A2ED: Tensor
    b_A2E: Tensor


class ExpertWeights(NamedTuple):
    """All experts' two layers; without biases ``b1_EH`` and ``b2_ED`` are None.

    Of gated experts w1 is (E, 2H, D) and b1 (E, 2H): H rows of the gate, then H of the linear half.
    """

    w1_EHD: Tensor
    b1_EH: Tensor | None
    w2_EDH: Tensor
    b2_ED: Tensor | None


class ExpertOptions(NamedTuple):
    """How the experts compute.

    Attributes:
        activation: a name of ``activations.ACTIVATIONS``.
        dropout: the probability of zeroing an entry of an expert's output.
        seed: what dropout is drawn from, an int64 scalar on the CPU; None drops nothing.
        dtype: that of the operands, which autocast may have chosen.
    """

    activation: str
    dropout: float
    seed: Tensor | None
    dtype: torch.dtype
