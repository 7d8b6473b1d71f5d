"""Merged experts: one MLP a sample, whose weights are the gate-weighted sums of its experts'.

In plain PyTorch and by its autograd, on any device: the products are those of a dense MLP.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS


def mean_token(x_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Each sample's mean over its tokens inside the mask, (B, D), in fp32 at least.

    x is zero outside the mask, and each sample has a token inside.
    """
    total_BD = x_BTD.sum(dim=1, dtype=torch.promote_types(x_BTD.dtype, torch.float32))
    return total_BD / (x_BTD.shape[1] if mask_BT is None else mask_BT.sum(dim=1, keepdim=True))


def merged_experts(
    x_BTD: Tensor,
    expert_indices_BK: Tensor,
    gates_BK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    dropout: float,
    dtype: torch.dtype,
) -> Tensor:
    """Dropout(w2 · act(w1 · x + b1) + b2) of every token, (B, T, D), in x's dtype.

    A sample's w1 is Σ_j gates[b, j] · w1_{indices[b, j]}, and so are b1, w2 and b2, all summed in
    the precision of the gates; the MLP is computed in ``dtype``. A ``dropout`` of 0 drops nothing.
    Kept for backward are the hidden layer, the sums, and a copy in fp32 of weights that are less.
    """

    def merge(parameter: Tensor) -> Tensor:
        # Picked, since 0 · NaN of an expert that a sample did not choose would reach it; and summed
        # by the same operator, which keeps no (B, k, ...) for backward.
        rows = parameter.to(gates_BK.dtype).flatten(1)
        sums = F.embedding_bag(expert_indices_BK, rows, per_sample_weights=gates_BK, mode="sum")
        return sums.view(-1, *parameter.shape[1:]).to(dtype)

    def linear(x_BTI: Tensor, w_EOI: Tensor, b_EO: Tensor | None) -> Tensor:
        if b_EO is None:
            return x_BTI @ merge(w_EOI).mT
        return torch.baddbmm(merge(b_EO)[:, None], x_BTI, merge(w_EOI).mT)

    # Autocast, where it is on, asks for the very ``dtype``, and finds nothing to convert.
    h_BTH = ACTIVATIONS[activation].forward(linear(x_BTD.to(dtype), w1_EHD, b1_EH))
    return F.dropout(linear(h_BTH, w2_EDH, b2_ED), dropout).to(x_BTD.dtype)
