"""The rule, for both backends, of whether backward computes the hidden layer again."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch_private import known_while_compiling
from .tensors import ExpertWeights

# To compute an element again takes 2·D operations. To save it costs a write and a read. Measured,
# it is faster to save from about this width on.
LEAST_WIDTH = 128


def keeps_hidden(x_TD: Tensor, gates_TK: Tensor, weights: ExpertWeights) -> bool:
    """Whether forward saves the hidden layer, (T·k, H) or, if gated, (T·k, 2H), for backward.

    It does not if nothing needs a gradient, or if the tokens are narrow. It also does not if the
    hidden layer is larger than the experts' weights and their gradients, which are in memory
    anyway. So the memory does not grow with the tokens of a volume. A number of tokens that
    torch.compile leaves open counts as too many.
    """
    trained = (x_TD, gates_TK, *weights)
    if not torch.is_grad_enabled() or all(t is None or not t.requires_grad for t in trained):
        return False
    _, hidden, width = weights.w1_EHD.shape  # 2H for gated experts
    if width < LEAST_WIDTH:
        return False
    weights_and_gradients = 2 * (weights.w1_EHD.numel() + weights.w2_EDH.numel())
    is_small = gates_TK.numel() * hidden <= weights_and_gradients
    if not torch.compiler.is_compiling():
        return is_small
    return known_while_compiling(is_small)
