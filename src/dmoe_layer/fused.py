"""The experts by Triton kernels, as registered operators with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import keeps_hidden
from .fused_mlp import (
    NARROW,
    Call,
    fuses_backward,
    narrow_backward,
    narrow_forward,
    wide_backward,
    wide_forward,
)
from .operators import refuse_double_backward


def fused_experts(
    x_TD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
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

    ``order_R`` and ``offsets`` are the router's sort by expert. Expert(x) = Dropout(w2 · act(w1 ·
    x + b1) + b2), with operands in ``dtype`` and sums in fp32. Without a seed nothing is dropped.
    """
    trained = (x_TD, gates_TK, w1_EHD, b1_EH, w2_EDH, b2_ED)
    keep = x_TD.shape[1] > NARROW and keeps_hidden(order_R, w1_EHD, trained)
    inputs = (x_TD, order_R, offsets, gates_TK, w1_EHD, b1_EH, w2_EDH, b2_ED)
    return _fused_experts(*inputs, activation, dropout, seed, dtype, keep)[0]


@torch.library.custom_op("dmoe_layer::fused_experts", mutates_args=())
def _fused_experts(
    x_TD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """The output, and what backward finds of the hidden layer: (R, H), or an empty tensor."""
    tensors = (x_TD, order_R, offsets, gates_TK, w1_EHD, b1_EH, w2_EDH, b2_ED)
    call = Call(*tensors, activation, dropout, seed, dtype)
    if call.dim <= NARROW:
        return call.sum_slots(narrow_forward(call)), x_TD.new_empty(0, dtype=dtype)
    slots, hidden = wide_forward(call, keep_hidden)
    return call.sum_slots(slots), hidden


@_fused_experts.register_fake
def _(x_TD, order_R, offsets, gates_TK, w1_EHD, *options):  # type: ignore[no-untyped-def]
    *_, dtype, keep_hidden = options
    shape = (order_R.shape[0], w1_EHD.shape[1]) if keep_hidden else (0,)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dmoe_layer::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    dy_TD: Tensor,
    hidden_RH: Tensor,
    x_TD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
    gates_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gates, w1, b1, w2, b2; an empty tensor for a bias that is not there."""
    tensors = (x_TD, order_R, offsets, gates_TK, w1_EHD, b1_EH, w2_EDH, b2_ED)
    call = Call(*tensors, activation, dropout, seed, dtype)
    if fuses_backward(call.dim, dtype):
        slots, dgates, *dweights = narrow_backward(call, dy_TD.contiguous())
    else:
        slots, dgates, *dweights = wide_backward(call, dy_TD.contiguous(), hidden_RH)
    dw1, db1, dw2, db2 = (d.to(w1_EHD.dtype) for d in dweights)
    db1, db2 = (d.new_empty(0) if b is None else d for b, d in ((b1_EH, db1), (b2_ED, db2)))
    return call.sum_slots(slots), dgates, dw1, db1, dw2, db2


@fused_experts_backward.register_fake
def _(dy_TD, hidden, x_TD, order_R, offsets, gates_TK, w1, b1, w2, b2, *options):  # type: ignore[no-untyped-def]
    biases = [w1.new_empty(0) if b is None else torch.empty_like(b) for b in (b1, b2)]
    dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
    return torch.empty_like(x_TD), torch.empty_like(gates_TK), dw1, biases[0], dw2, biases[1]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.dropout, seed, ctx.dtype, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors, seed)


def _backward(ctx: Any, dy_TD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    options = (ctx.activation, ctx.dropout, seed, ctx.dtype)
    dx, dgates, *dweights = fused_experts_backward(dy_TD, *tensors, *options)
    grads = [dx, None, None, dgates, *dweights]
    needed = ctx.needs_input_grad[: len(grads)]
    return *(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * 5


_fused_experts.register_autograd(_backward, setup_context=_save_for_backward)
refuse_double_backward(fused_experts_backward)
