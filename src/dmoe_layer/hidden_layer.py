"""Whether backward finds the hidden layer or computes it again; a rule of both backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch_private import known_while_compiling
from .tensors import ExpertWeights

# Computing an element again takes 2·D operations, against writing and reading it: measured, keeping
# pays from about this width on.
LEAST_WIDTH = 128


def keeps_hidden(x_TD: Tensor, gates_TK: Tensor, weights: ExpertWeights) -> bool:
    """Whether forward shall leave the hidden layer, (T·k, H), or if gated (T·k, 2H), to backward.

    Not if there is no backward, since nothing wants a gradient. Else from a width on, and only
    while it is no larger than the experts' weights and their gradients, which stand in memory
    anyway: the tokens of a volume may never multiply what is kept. A number of tokens that
    torch.compile leaves open counts as too many.
    """
    trained = (x_TD, gates_TK, *weights)
    if not torch.is_grad_enabled() or all(t is None or not t.requires_grad for t in trained):
        return False
    _, hidden, width = weights.w1_EHD.shape  # of gated experts both halves, 2H
    if width < LEAST_WIDTH:
        return False
    weights_and_gradients = 2 * (weights.w1_EHD.numel() + weights.w2_EDH.numel())
    is_small = gates_TK.numel() * hidden <= weights_and_gradients
    if not torch.compiler.is_compiling():
        return is_small
    return known_while_compiling(is_small)
