"""The tuples of tensors that modules pass to each other; ``layer`` explains the shape letters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where one call of a [`DMoE`][] sent its tokens: a tuple of plain tensors.

    T is the number of tokens inside the mask. The tokens of the first sample come first, then those
    of the second, and so on. Within a sample they have the order of ``x`` with its channels moved
    to the last axis. The tensors belong to the autograd graph, so that a loss of them trains the
    router.

    Attributes:
        expert_indices: The experts of each token, best first: (T, k) int64.
        gates: The weights of those experts, (T, k), at least fp32: the softmax over their k scores.
            The gates of a token sum to 1.
        logits: The scores of all experts, noise included: (T, E), at least fp32.
        attributes: The attribute value of each token's sample, with -1 for unknown: (T,) int64, or
            (T, n) for n attributes. None if there were no attributes.

    Examples:
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


# A pickled Routing names this module, where the class was once defined. So old files load with this
# version, and new files load with old versions.
Routing.__module__ = "dmoe_layer.router"


class RouterWeights(NamedTuple):
    """The weights of all routers; on the second axis 0 is the clean router, 1 its noise."""

    w_A2ED: Tensor
    b_A2E: Tensor


class ExpertWeights(NamedTuple):
    """The two layers of all experts. Without biases ``b1_EH`` and ``b2_ED`` are None.

    Gated experts have a w1 of (E, 2H, D) and a b1 of (E, 2H): first the H rows of the gate, then
    the H rows of the linear half.
    """

    w1_EHD: Tensor
    b1_EH: Tensor | None
    w2_EDH: Tensor
    b2_ED: Tensor | None


class ExpertOptions(NamedTuple):
    """How the experts compute.

    Attributes:
        activation: A name of ``activations.ACTIVATIONS``.
        dropout: The probability of setting an entry of an expert's output to zero.
        seed: The seed of the dropout, an int64 scalar on the CPU. None stands for no dropout.
        dtype: The dtype of the operands, which autocast may have chosen.
    """

    activation: str
    dropout: float
    seed: Tensor | None
    dtype: torch.dtype
