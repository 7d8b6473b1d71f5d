"""The eager backend: the experts' MLPs in plain PyTorch, for any device and dtype.

Tokens are sorted by expert and computed in blocks of one expert. Where tokens are many, the hidden
layer of a block is not kept: backward computes it again, block by block, and draws the same
dropout from the seed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .dispatch import Dispatch, keeps_hidden
from .dropout import Dropout
from .gemm import linear, padded, sum_of_products
from .operators import refuse_double_backward


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
    trained = (x_TD, gates_TK, w1_EHD, b1_EH, w2_EDH, b2_ED)
    keep_hidden = keeps_hidden(expert_indices_TK, w1_EHD, trained)
    options = (activation, dropout, seed, dtype, keep_hidden)
    return _experts(x_TD, expert_indices_TK, gates_TK, w1_EHD, b1_EH, w2_EDH, b2_ED, *options)[0]


@torch.library.custom_op("dmoe_layer::experts", mutates_args=())
def _experts(
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
    keep_hidden: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output, and what backward needs of the hidden layer: (R, H), or an empty tensor."""
    act = ACTIVATIONS[activation]
    with torch.autocast(x_TD.device.type, enabled=False):
        dispatch = Dispatch(expert_indices_TK, len(w1_EHD))
        drop = Dropout(dropout, seed, x_TD)
        weights_TK = gates_TK * drop.scale
        y_TD = x_TD.new_empty(x_TD.shape)
        z_RH = x_TD.new_empty(_hidden_shape(expert_indices_TK, w1_EHD, keep_hidden), dtype=dtype)
        x_buffer, rows_buffer = _buffers(dispatch, x_TD, dtype)
        for chunk in dispatch.chunks:
            for e, start, stop in chunk.blocks:
                w1_HD, b1_H, w2_DH, b2_D = _of_expert(e, dtype, w1_EHD, b1_EH, w2_EDH, b2_ED)
                x_RD = _gather(x_TD, dispatch.token_of_row[start:stop], x_buffer)
                z = linear(x_RD, w1_HD, b1_H, relu=activation == "relu")
                h_RH = z if activation == "relu" else act.forward(z)
                if keep_hidden:
                    z_RH[start:stop] = z[: stop - start]
                o_RD = drop(linear(h_RH, w2_DH, b2_D)[: stop - start])
                rows_buffer[start - chunk.rows.start : stop - chunk.rows.start] = o_RD
            y_TD[chunk.tokens] = dispatch.combine(chunk, rows_buffer, weights_TK)
        return y_TD, z_RH


@_experts.register_fake
def _(x_TD, indices_TK, gates, w1_EHD, b1, w2, b2, act, p, seed, dtype, keep_hidden=False):  # type: ignore[no-untyped-def]
    shape = _hidden_shape(indices_TK, w1_EHD, keep_hidden)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dmoe_layer::experts_backward", mutates_args=())
def experts_backward(
    dy_TD: Tensor,
    z_RH: Tensor,
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
    keep_hidden: bool,
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
        dx_TD = x_TD.new_empty(x_TD.shape) if need_x else x_TD.new_empty((0,))
        dw1, dw2 = _Sum(w1_EHD, need_w1, w1_EHD), _Sum(w2_EDH, need_w2, w1_EHD)
        db1, db2 = _Sum(b1_EH, need_b1, w1_EHD), _Sum(b2_ED, need_b2, w1_EHD)
        x_buffer, rows_buffer = _buffers(dispatch, x_TD, dtype)
        do_buffer = torch.empty_like(x_buffer)
        for chunk in dispatch.chunks:
            # A sum's gradient is expanded from one number, and rows of that are picked slowly.
            dy_CD = dy_TD[chunk.tokens].contiguous()
            for e, start, stop in chunk.blocks:
                rows = stop - start
                w1_HD, b1_H, w2_DH, b2_D = _of_expert(e, dtype, w1_EHD, b1_EH, w2_EDH, b2_ED)
                tokens = dispatch.token_of_row[start:stop]
                do_RD = _gather(dy_CD, tokens - chunk.tokens.start, do_buffer)
                drop(do_RD[:rows])
                x_RD = _gather(x_TD, tokens, x_buffer)
                if keep_hidden:
                    z = F.pad(z_RH[start:stop], (0, 0, 0, len(x_RD) - rows))
                else:
                    z = linear(x_RD, w1_HD, b1_H, relu=activation == "relu")
                h_RH = z if activation == "relu" else act.forward(z)
                dh_RH = linear(do_RD, w2_DH.mT)
                if need_gates:
                    products = dh_RH[:rows].to(dgates_R.dtype) * h_RH[:rows]
                    torch.sum(products, dim=1, out=dgates_R[start:stop])
                    if b2_D is not None:
                        dgates_R[start:stop] += (do_RD[:rows] * b2_D).sum(
                            dim=1, dtype=dgates_R.dtype
                        )
                gates = gates_R[start:stop, None].to(dtype)
                do_RD[:rows] *= gates
                if need_w2:
                    dw2.add(e, sum_of_products(do_RD, h_RH))
                if need_b2:
                    db2.add(e, do_RD.sum(dim=0, dtype=db2.total.dtype))
                if not (need_x or need_w1 or need_b1):
                    continue
                dh_RH[:rows] *= gates
                dz_RH = act.backward(dh_RH, z)
                if need_w1:
                    dw1.add(e, sum_of_products(dz_RH, x_RD))
                if need_b1:
                    db1.add(e, dz_RH.sum(dim=0, dtype=db1.total.dtype))
                if need_x:
                    dx_RD = linear(dz_RH, w1_HD.mT)[:rows]
                    rows_buffer[start - chunk.rows.start : stop - chunk.rows.start] = dx_RD
            if need_x:
                dx_TD[chunk.tokens] = dispatch.combine(chunk, rows_buffer)
        dgates_TK = (
            dgates_R[dispatch.rows_TK] * drop.scale if need_gates else dgates_R.new_empty((0,))
        )
        return dx_TD, dgates_TK, dw1.result(), db1.result(), dw2.result(), db2.result()


@experts_backward.register_fake
def _(dy_TD, z_RH, x_TD, expert_indices_TK, gates_TK, w1, b1, w2, b2, *options):  # type: ignore[no-untyped-def]
    needed, own = options[-1], w1.dtype
    inputs = ((x_TD, x_TD.dtype), (gates_TK, gates_TK.dtype), *((p, own) for p in (w1, b1, w2, b2)))
    return tuple(
        x_TD.new_empty(i.shape if n and i is not None else (0,), dtype=dtype)
        for (i, dtype), n in zip(inputs, needed, strict=True)
    )


class _Sum:
    """The gradient of a parameter of all experts, summed in fp32 at least: it has a term a token.

    An expert's first term is copied, and only an idle expert's part is filled with zeros: at the
    width of a transformer, one more pass over all gradients would be felt.
    """

    def __init__(self, parameter: Tensor | None, needed: bool, like: Tensor) -> None:
        shape = (0,) if parameter is None or not needed else parameter.shape
        self.own = like.dtype
        self.total = like.new_empty(shape, dtype=torch.promote_types(self.own, torch.float32))
        self.idle = set(range(shape[0]))

    def add(self, expert: int, term: Tensor) -> None:
        if expert in self.idle:
            self.idle.remove(expert)
            self.total[expert] = term
        else:
            self.total[expert] += term

    def result(self) -> Tensor:
        """In the parameter's own dtype."""
        for expert in self.idle:
            self.total[expert] = 0
        return self.total.to(self.own)


def _hidden_shape(expert_indices_TK: Tensor, w1_EHD: Tensor, keep: bool) -> tuple[int, int]:
    return (expert_indices_TK.numel() if keep else 0), w1_EHD.shape[1]


def _of_expert(
    expert: int, dtype: torch.dtype, *parameters: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    w1_HD, b1_H, w2_DH, b2_D = (None if p is None else p[expert].to(dtype) for p in parameters)
    return w1_HD, b1_H, w2_DH, b2_D  # type: ignore[return-value]


def _buffers(dispatch: Dispatch, x_TD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One for the tokens of a block, and one for the rows of a chunk."""
    block = max((stop - start for _, start, stop in dispatch.blocks), default=0)
    chunk = max((chunk.rows.stop - chunk.rows.start for chunk in dispatch.chunks), default=0)
    width = x_TD.shape[1]
    return (
        x_TD.new_empty((padded(block), width), dtype=dtype),
        x_TD.new_empty((chunk, width), dtype=dtype),
    )


def _gather(source_TD: Tensor, tokens_R: Tensor, buffer: Tensor) -> Tensor:
    """The tokens' rows, in the buffer, and zeros below them up to a size that products like."""
    rows = len(tokens_R)
    rows_RD = buffer[: padded(rows)]
    if source_TD.dtype == buffer.dtype:
        torch.index_select(source_TD, 0, tokens_R, out=rows_RD[:rows])
    else:
        rows_RD[:rows] = source_TD.index_select(0, tokens_R)
    rows_RD[rows:].zero_()
    return rows_RD


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.activation, ctx.dropout, seed, ctx.dtype, ctx.keep_hidden = inputs
    ctx.save_for_backward(output[1], *tensors, seed)


def _backward(ctx: Any, dy_TD: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 12
    *tensors, seed = ctx.saved_tensors
    need_x, _, need_gates, *need_weights = ctx.needs_input_grad[:7]
    needed = [need_x, need_gates, *need_weights]
    options = (ctx.activation, ctx.dropout, seed, ctx.dtype, ctx.keep_hidden)
    grads = experts_backward(dy_TD, *tensors, *options, needed)
    dx, dgates, *dweights = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return dx, None, dgates, *dweights, *[None] * 5


_experts.register_autograd(_backward, setup_context=_save_for_backward)
refuse_double_backward(experts_backward)
