"""The eager backend: the experts' MLPs in plain PyTorch, for any device and dtype.

Tokens are sorted by expert and computed in blocks of one expert. The hidden layer of a block is
never kept: backward computes it again, block by block, and draws the same dropout from the seed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .dispatch import Dispatch
from .operators import MIN_GEMM_ROWS, refuse_double_backward, seeded_generator


@torch.library.custom_op("dmoe_layer::experts", mutates_args=())
def experts(
    x_TD: Tensor,
    expert_indices_TK: Tensor,
    gates_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Σ_j gates[t, j] · Expert_{indices[t, j]}(x[t]) for every token: (T, D), in x's dtype.

    Expert(x) = Dropout(w2 · act(w1 · x + b1) + b2), computed in ``dtype``, which autocast may have
    chosen: x and weights are converted block by block, so that no copy of them is kept for
    backward. Without a seed nothing is dropped.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        dispatch = Dispatch(expert_indices_TK, len(w1_EHD))
        drop = Dropout(dropout, seed, x_TD)
        rows_RD = x_TD.new_empty((dispatch.order.numel(), x_TD.shape[1]), dtype=dtype)
        for e, start, stop in dispatch.blocks:
            w1_HD, b1_H, w2_DH, b2_D = _of_expert(e, dtype, w1_EHD, b1_EH, w2_EDH, b2_ED)
            x_RD = x_TD.index_select(0, dispatch.token_of_row[start:stop]).to(dtype)
            h_RH = ACTIVATIONS[activation].forward(_linear(x_RD, w1_HD, b1_H))
            rows_RD[start:stop] = drop(_linear(h_RH, w2_DH, b2_D))
        return dispatch.combine(rows_RD, gates_TK * drop.scale).to(x_TD.dtype)


@experts.register_fake
def _(x_TD, expert_indices_TK, gates_TK, *weights_and_options):  # type: ignore[no-untyped-def]
    return x_TD.new_empty(x_TD.shape)


@torch.library.custom_op("dmoe_layer::experts_backward", mutates_args=())
def experts_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    expert_indices_TK: Tensor,
    gates_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, w1, b1, w2, b2; an empty tensor where ``needed`` says no.

    The gate's gradient needs no output of the expert: with dO the gradient of the token's output
    after dropout and dA' = dO·w2, it is <dA', h> + <dO, b2> (SonicMoE's formula).
    """
    need_x, need_gates, need_w1, need_b1, need_w2, need_b2 = needed
    act = ACTIVATIONS[activation]
    with torch.autocast(x_TD.device.type, enabled=False):
        dispatch = Dispatch(expert_indices_TK, len(w1_EHD))
        drop = Dropout(dropout, seed, x_TD)
        gates_R = (gates_TK * drop.scale).reshape(-1)[dispatch.order]
        dgates_R = torch.empty_like(gates_R)
        dx_RD = x_TD.new_empty(
            (dispatch.order.numel(), x_TD.shape[1]) if need_x else 0, dtype=dtype
        )
        dw1, dw2 = _sum_like(w1_EHD, need_w1, x_TD), _sum_like(w2_EDH, need_w2, x_TD)
        db1, db2 = _sum_like(b1_EH, need_b1, x_TD), _sum_like(b2_ED, need_b2, x_TD)
        for e, start, stop in dispatch.blocks:
            rows = slice(start, stop)
            w1_HD, b1_H, w2_DH, b2_D = _of_expert(e, dtype, w1_EHD, b1_EH, w2_EDH, b2_ED)
            tokens = dispatch.token_of_row[rows]
            do_RD = drop(dy_TD.index_select(0, tokens).to(dtype))
            x_RD = x_TD.index_select(0, tokens).to(dtype)
            z_RH = _linear(x_RD, w1_HD, b1_H)
            h_RH = act.forward(z_RH)
            dh_RH = do_RD @ w2_DH
            if need_gates:
                dgates_R[rows] = (dh_RH.to(dgates_R.dtype) * h_RH).sum(dim=1)
                if b2_D is not None:
                    dgates_R[rows] += (do_RD @ b2_D).to(dgates_R.dtype)
            gates = gates_R[rows, None].to(dtype)
            do_RD = do_RD * gates
            if need_w2:
                _add_product(dw2[e], do_RD.mT, h_RH)
            if need_b2:
                db2[e] += do_RD.sum(dim=0, dtype=db2.dtype)
            if not (need_x or need_w1 or need_b1):
                continue
            dz_RH = act.backward(dh_RH.mul_(gates), z_RH)
            if need_w1:
                _add_product(dw1[e], dz_RH.mT, x_RD)
            if need_b1:
                db1[e] += dz_RH.sum(dim=0, dtype=db1.dtype)
            if need_x:
                torch.mm(dz_RH, w1_HD, out=dx_RD[rows])
        dgates_TK = dgates_R[dispatch.rows_TK] * drop.scale
        dx_TD = (dispatch.combine(dx_RD) if need_x else dx_RD).to(x_TD.dtype)
        own = w1_EHD.dtype
        return dx_TD, dgates_TK, dw1.to(own), db1.to(own), dw2.to(own), db2.to(own)


@experts_backward.register_fake
def _(dy_TD, x_TD, expert_indices_TK, gates_TK, w1, b1, w2, b2, *options):  # type: ignore[no-untyped-def]
    needed, own = options[-1], w1.dtype
    inputs = ((x_TD, x_TD.dtype), (gates_TK, gates_TK.dtype), *((p, own) for p in (w1, b1, w2, b2)))
    return tuple(
        x_TD.new_empty(i.shape if n and i is not None else 0, dtype=dtype)
        for (i, dtype), n in zip(inputs, needed, strict=True)
    )


class Dropout:
    """Zeroes entries of block after block of rows, the same ones whenever the seed is the same.

    A random int64 holds four 16-bit numbers, each compared with a threshold: a tenth of the time
    of ``F.dropout``, which draws a float an entry. The price: p is rounded to 1/65536, and
    ``scale`` makes up for the p that is really used.
    """

    def __init__(self, p: float, seed: Tensor | None, like: Tensor) -> None:
        dropped = 0 if seed is None else round(p * 2**16)
        self.all_dropped = dropped == 2**16
        self.scale = 1.0 if self.all_dropped else 2**16 / (2**16 - dropped)
        self.threshold = dropped - 2**15
        self.generator = (
            seeded_generator(like.device, seed) if seed is not None and dropped else None
        )

    def __call__(self, rows_RD: Tensor) -> Tensor:
        if self.generator is None:
            return rows_RD
        if self.all_dropped:
            return torch.zeros_like(rows_RD)
        words = torch.empty((rows_RD.numel() + 3) // 4, dtype=torch.int64, device=rows_RD.device)
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)
        return rows_RD * (bits[: rows_RD.numel()] >= self.threshold).view(rows_RD.shape)


def _of_expert(
    expert: int, dtype: torch.dtype, *parameters: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    w1_HD, b1_H, w2_DH, b2_D = (None if p is None else p[expert].to(dtype) for p in parameters)
    return w1_HD, b1_H, w2_DH, b2_D  # type: ignore[return-value]


def _linear(x_RI: Tensor, w_OI: Tensor, b_O: Tensor | None) -> Tensor:
    rows = x_RI.shape[0]
    if rows < MIN_GEMM_ROWS:
        x_RI = F.pad(x_RI, (0, 0, 0, MIN_GEMM_ROWS - rows))
    return F.linear(x_RI, w_OI, b_O)[:rows]


def _sum_like(parameter: Tensor | None, needed: bool, x: Tensor) -> Tensor:
    """Zeros to sum a gradient in: fp32 at least, since one sum has a term for every token."""
    if parameter is None or not needed:
        return x.new_empty(0)
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.dropout, seed, ctx.dtype = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    need_x, _, need_gates, *need_weights = ctx.needs_input_grad[:7]
    needed = [need_x, need_gates, *need_weights]
    options = (ctx.activation, ctx.dropout, seed, ctx.dtype)
    grads = experts_backward(dy_TD, *tensors, *options, needed)
    dx, dgates, *dweights = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return dx, None, dgates, *dweights, None, None, None, None


experts.register_autograd(_backward, setup_context=_save_for_backward)
refuse_double_backward(experts_backward)
