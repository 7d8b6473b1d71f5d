"""The paper's layer (Oh et al., ICML 2025, arXiv:2502.00619): its numbers, and its loop of masks.

Shapes: B samples, T tokens, D features, H hidden, E experts, K experts a token, A attribute values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_EXPERTS, K, HIDDEN_RATIO, DROPOUT = 8, 2, 4, 0.1


class MaskLoop(nn.Module):
    """A boolean mask for each expert and a Python loop over samples, as in the released code.

    One pair of linear layers for each attribute value's router; gates are a softmax over scores of
    which all but the k best are -inf.

    Args:
        weights: the parameters of a DMoE, by their names.
        k: experts a token.
    """

    def __init__(self, weights: Mapping[str, Tensor], k: int = K) -> None:
        super().__init__()
        self.k = k
        w_A2ED, b_A2E = weights["router.w_A2ED"], weights["router.bias"]
        self.clean, self.noise = (
            nn.ModuleList(linear(w_A2ED[a, i], b_A2E[a, i]) for a in range(len(w_A2ED)))
            for i in (0, 1)
        )
        self.experts = experts_of_modules(weights)

    def forward(self, x_BTD: Tensor, attributes_B: Tensor) -> Tensor:
        gates, indices = [], []
        for x_TD, value in zip(x_BTD, attributes_B.tolist(), strict=True):
            scores_TE = self.clean[value](x_TD)
            if self.training:
                scale_TE = F.softplus(self.noise[value](x_TD))
                scores_TE = scores_TE + torch.randn_like(scores_TE) * scale_TE
            best_TK, indices_TK = scores_TE.topk(self.k, dim=-1)
            kept_TE = torch.full_like(scores_TE, float("-inf")).scatter(-1, indices_TK, best_TK)
            gates.append(kept_TE.softmax(dim=-1))
            indices.append(indices_TK)
        gates_TE, indices_TK = torch.cat(gates), torch.cat(indices)
        x_TD = x_BTD.flatten(0, 1)
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            mask_T = (indices_TK == e).any(dim=-1)
            if mask_T.any():
                y_TD[mask_T] += expert(x_TD[mask_T]) * gates_TE[mask_T, e, None]
        return y_TD.view_as(x_BTD)


def experts_of_modules(weights: Mapping[str, Tensor]) -> nn.ModuleList:
    """A DMoE's experts, each of plain modules with a copy of its parameters."""
    stacked = [weights[name] for name in ("w1_EHD", "w1_bias", "w2_EDH", "w2_bias")]
    return nn.ModuleList(mlp(*of_one) for of_one in zip(*stacked, strict=True))


def mlp(w1_HD: Tensor, b1_H: Tensor, w2_DH: Tensor, b2_D: Tensor) -> nn.Sequential:
    """One expert of plain modules."""
    return nn.Sequential(linear(w1_HD, b1_H), nn.ReLU(), linear(w2_DH, b2_D), nn.Dropout(DROPOUT))


def linear(w_OI: Tensor, b_O: Tensor) -> nn.Linear:
    """A layer with copies of these parameters; drawing others first would cost random numbers."""
    layer = nn.Linear(w_OI.shape[1], w_OI.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(w_OI.clone()), nn.Parameter(b_O.clone())
    return layer
