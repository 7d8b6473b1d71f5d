"""Router and experts in plain ATen operators, of which an exported program consists.

While a program is exported (``_torch_private.exporting``), a layer computes by this file and not by
the operators of a backend, which need this package. None of the Python in this file is left in the
program, since its loops run over experts and slots, whose numbers are fixed.

The experts have two forms. In the *sparse* form each expert picks the rows of its tokens, whose
number depends on the data. That is the work of k experts per token. The *dense* form computes all
experts for every token in two products, and sets the gates of the others to zero. That is E/k times
the work, but no shape depends on the data, as some compilers of exported programs need.
"""

from __future__ import annotations

import functools
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._torch_private import has_autocast, known_while_compiling
from .activations import ACTIVATIONS
from .tensors import ExpertOptions, ExpertWeights, RouterWeights, Routing

FORMS = ("auto", "sparse", "dense")
# Up to so many multiply-adds of all experts, the dense form is faster. Measured in ONNX Runtime
# with one thread (AVX-512), 8 experts, D = 24 and 96: dense took 53 to 86 % of the time of sparse
# up to 2**21.2, and 150 to 160 % from 2**22.2 on.
DENSE_MULTIPLY_ADDS = 2**21


class _Form(threading.local):
    def __init__(self) -> None:
        self.chosen = "auto"


_form = _Form()


class expert_form(AbstractContextManager[None]):
    """A context in which programs are exported with this form of the experts, one of ``FORMS``."""

    def __init__(self, form: str) -> None:
        self.form, self.outer = form, "auto"

    def __enter__(self) -> None:
        self.outer, _form.chosen = _form.chosen, self.form

    def __exit__(self, *error: Any) -> None:
        _form.chosen = self.outer


def route(
    x: Tensor,
    weights: RouterWeights,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    k: int,
    seed: Tensor | None,
) -> tuple[Routing, Tensor]:
    """Computes what ``eager.router.route`` does. With a seed the program draws the noise itself.

    A row that the table does not have is an index out of range. In a runtime that does not check
    indices, the scores of that sample, and so its output, become NaN.
    """
    is_double = torch.float64 in (x.dtype, weights.w_A2ED.dtype)
    dtype = torch.float64 if is_double else torch.float32
    with _without_autocast(x):
        x, (w_A2ED, b_A2E) = x.to(dtype), (weight.to(dtype) for weight in weights)
        if tokens_per_sample is None:
            scores = functools.partial(_scores, x, rows_BN)
        else:
            scores = functools.partial(_ragged_scores, x, rows_BN, tokens_per_sample)
        logits_TE = scores(w_A2ED[:, 0], b_A2E[:, 0])
        if seed is not None:
            scale_TE = F.softplus(scores(w_A2ED[:, 1], b_A2E[:, 1]))
            logits_TE = logits_TE + torch.randn_like(logits_TE) * scale_TE
        scores_TK, indices_TK = logits_TE.topk(k, dim=-1)
        return Routing(indices_TK, F.softmax(scores_TK, dim=-1), logits_TE), indices_TK


def _scores(x: Tensor, rows_BN: Tensor | None, w_AED: Tensor, b_AE: Tensor) -> Tensor:
    if rows_BN is None:
        return F.linear(x, w_AED[0], b_AE[0]).flatten(0, -2)
    w_BED, b_BE = _sum_of_rows(w_AED, rows_BN), _sum_of_rows(b_AE, rows_BN)
    b_BE = _nan_where(_outside(rows_BN, b_AE), b_BE)
    return torch.baddbmm(b_BE[:, None], x, w_BED.mT).flatten(0, 1)


def _ragged_scores(
    x_TD: Tensor, rows_BN: Tensor | None, counts_B: Tensor, w_AED: Tensor, b_AE: Tensor
) -> Tensor:
    """The scores of masked tokens: all routers compute them, and each token picks its sample's."""
    if rows_BN is None:
        return _scores(x_TD, None, w_AED, b_AE)
    positions_T1 = torch.arange(x_TD.shape[0], device=x_TD.device)[:, None]
    samples_T = (positions_T1 >= counts_B.cumsum(0)).sum(dim=1)
    # Zeros are added, one a sample, so that a run with fewer rows fails even if no token would miss
    # the row of a sample that is masked whole; and every sample's biases are picked, so that its
    # wrong value fails too.
    rows_BN = rows_BN + (counts_B < 0)[:, None]
    b_BE = _nan_where(_outside(rows_BN, b_AE), _sum_of_rows(b_AE, rows_BN))
    rows_TN = rows_BN.index_select(0, samples_T)
    scores_TAE = F.linear(x_TD, w_AED.flatten(0, 1)).unflatten(1, b_AE.shape)
    picked = [
        scores_TAE.gather(1, rows_T[:, None, None].expand(-1, 1, b_AE.shape[1]))[:, 0]
        for rows_T in rows_TN.unbind(dim=1)
    ]
    return functools.reduce(torch.add, picked) + b_BE.index_select(0, samples_T)


def _sum_of_rows(table: Tensor, rows_BN: Tensor) -> Tensor:
    """Rows are picked, never multiplied with zeros: NaNs of one value's router stay its own."""
    return functools.reduce(torch.add, [table.index_select(0, r) for r in rows_BN.unbind(dim=1)])


def _outside(rows_BN: Tensor, table: Tensor) -> Tensor:
    return (rows_BN >= table.shape[0]).any(dim=1, keepdim=True)


def experts(
    x_TD: Tensor,
    expert_indices_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Tensor:
    """Computes what ``eager.experts.experts`` does, in the chosen form."""
    dense = _form.chosen == "dense" or (
        _form.chosen == "auto" and _is_dense_better(x_TD, expert_indices_TK, weights)
    )
    form = _dense if dense else _sparse
    with _without_autocast(x_TD):
        dtype = options.dtype
        w1_EHD, b1_EH, w2_EDH, b2_ED = weights
        own = ExpertWeights(
            w1_EHD.to(dtype),
            None if b1_EH is None else b1_EH.to(dtype),
            w2_EDH.to(dtype),
            None if b2_ED is None else b2_ED.to(dtype),
        )
        y_TD = form(x_TD.to(dtype), expert_indices_TK, gates_TK.to(dtype), own, options)
        return y_TD.to(x_TD.dtype)


def _is_dense_better(x_TD: Tensor, indices_TK: Tensor, weights: ExpertWeights) -> bool:
    """Whether every token has all experts anyway, or tokens are few and experts are narrow.

    A number of tokens that the program leaves open counts as many. So does every number in
    ``torch.jit.trace``, which does not say whether it stays open.
    """
    if indices_TK.shape[1] == weights.w1_EHD.shape[0]:
        return True
    if torch.jit.is_tracing():
        return False
    multiply_adds = x_TD.shape[0] * (weights.w1_EHD.numel() + weights.w2_EDH.numel())
    return known_while_compiling(multiply_adds <= DENSE_MULTIPLY_ADDS)


def _sparse(
    x_TD: Tensor,
    indices_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Tensor:
    w1_EHD, b1_EH, w2_EDH, b2_ED = weights
    activate, k = ACTIVATIONS[options.activation].forward, indices_TK.shape[1]
    pairs, outputs = [], []
    for e in range(w1_EHD.shape[0]):
        # Not both of one nonzero: of a masked layer's tokens, whose number is open, the most pairs
        # that there may be is no int64, and ONNX cannot write the bound.
        tokens_R = (indices_TK == e).any(dim=1).nonzero()[:, 0]
        slots_R = (indices_TK.index_select(0, tokens_R) == e).to(torch.int64).argmax(dim=1)
        x_RD = x_TD.index_select(0, tokens_R)
        h_RH = activate(F.linear(x_RD, w1_EHD[e], None if b1_EH is None else b1_EH[e]))
        outputs.append(F.linear(h_RH, w2_EDH[e], None if b2_ED is None else b2_ED[e]))
        pairs.append(tokens_R * k + slots_R)
    rows_RD, pairs_R = torch.cat(outputs), torch.cat(pairs)
    if options.seed is not None:
        rows_RD = F.dropout(rows_RD, options.dropout, training=True)
    # In which row each pair stands.
    rows_R = torch.arange(pairs_R.shape[0], device=x_TD.device)
    row_of_pair = torch.zeros_like(indices_TK).flatten().scatter(0, pairs_R, rows_R)
    row_TK = row_of_pair.unflatten(0, indices_TK.shape)
    weighted = [
        rows_RD.index_select(0, row_T) * gates_T[:, None]
        for row_T, gates_T in zip(row_TK.unbind(dim=1), gates_TK.unbind(dim=1), strict=True)
    ]
    return functools.reduce(torch.add, weighted)


def _dense(
    x_TD: Tensor,
    indices_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Tensor:
    if options.seed is not None:
        raise RuntimeError(
            "experts='dense': the model is in training mode, in which dropout acts on the output "
            "of each expert, but this form never computes the output of one expert. Call "
            "model.eval(), or choose experts='sparse'."
        )
    w1_EHD, b1_EH, w2_EDH, b2_ED = weights
    n_experts, _, hidden = w2_EDH.shape
    gates_TE = gates_TK.new_zeros(x_TD.shape[0], n_experts).scatter(1, indices_TK, gates_TK)
    z_TX = F.linear(x_TD, w1_EHD.flatten(0, 1), None if b1_EH is None else b1_EH.flatten())
    h_TEH = ACTIVATIONS[options.activation].forward(z_TX.unflatten(1, w1_EHD.shape[:2]))
    # An expert that a token is not sent to may overflow on it, and 0 times infinity is NaN.
    gates_TE1 = gates_TE[:, :, None]
    h_TEH = torch.where(gates_TE1 == 0, 0, h_TEH * gates_TE1)
    y_TD = h_TEH.flatten(1) @ w2_EDH.transpose(1, 2).reshape(n_experts * hidden, -1)
    return y_TD if b2_ED is None else y_TD + gates_TE @ b2_ED


def _nan_where(outside_B1: Tensor, values: Tensor) -> Tensor:
    # By a root, since PyTorch 2.8 saves no program that has NaN as a number.
    return torch.where(outside_B1, values.new_full((), -1).sqrt(), values)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off, only if it is on: the context becomes a block of the program."""
    device: Any = x.device.type
    if has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
