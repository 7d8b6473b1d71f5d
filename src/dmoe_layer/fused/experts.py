"""The experts' computation by Triton kernels, as registered operators with autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dropout import in_steps
from ..hidden_layer import keeps_hidden
from ..operators import differentiable, refuse_double_backward, undispatched
from ..tensors import ExpertOptions, ExpertWeights
from . import narrow, wide
from .call import ExpertCall, draw_kept
from .launch import contiguous, converted
from .router import Plan, SortedPairs


def experts(
    x_TD: Tensor,
    plan: Plan,
    gates_TK: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Tensor:
    """Σ_j gates[t, j] · Expert_{indices[t, j]}(x[t]) for every token: (T, D), in x's dtype.

    ``plan`` is the router's. Expert(x) = Dropout(w2 · act(w1 · x + b1) + b2), with
    operands in ``options.dtype`` and sums in fp32.
    """
    pairs = plan.pairs
    if plan.x is not None:
        x_TD = plan.x.flatten(0, -2)
    is_narrow = narrow.fuses_forward(x_TD.shape[1], options.dtype)
    keep = not is_narrow and keeps_hidden(x_TD, gates_TK, weights)
    kept_RW = _kept(pairs, x_TD.shape[1], options)
    activation, dropout, _, dtype = options
    y_TD: Tensor = _experts(
        x_TD, *pairs, gates_TK, *weights, activation, dropout, kept_RW, dtype, keep
    )[0]
    return y_TD


def _kept(pairs: SortedPairs, dim: int, options: ExpertOptions) -> Tensor | None:
    """The bits of the entries that dropout does not zero, or None if it zeros none."""
    if options.seed is None or in_steps(options.dropout, options.seed)[0] == 0:
        return None
    kept_RW: Tensor = _draw(pairs.order_R, dim, options.dropout, options.seed)
    return kept_RW


_draw_kept = torch.library.custom_op("dmoe_layer::draw_kept", draw_kept, mutates_args=())
_draw = undispatched(_draw_kept)


@_draw_kept.register_fake
def _(order_R, dim, dropout, seed):  # type: ignore[no-untyped-def]
    return order_R.new_empty((order_R.shape[0], -(-dim // 32)))


@torch.library.custom_op("dmoe_layer::fused_experts", mutates_args=())
def _fused_experts(
    x_TD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    gates_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    dropout: float,
    kept_RW: Tensor | None,
    dtype: torch.dtype,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and what backward finds of the hidden layer: (R, H), or an empty tensor."""
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDH, b2_ED)
    pairs = SortedPairs(order_R, offsets, tiles)
    call = ExpertCall(x_TD, pairs, gates_TK, weights, activation, dropout, kept_RW, dtype)
    if narrow.fuses_forward(call.dim, dtype):
        return narrow.forward(call), call.empty(0)
    return wide.forward(call, keep_hidden)


@_fused_experts.register_fake
def _(x_TD, order_R, offsets, tiles, gates_TK, w1_EHD, *options):  # type: ignore[no-untyped-def]
    *_, dtype, keep_hidden = options
    keeps = keep_hidden and not narrow.fuses_forward(x_TD.shape[1], dtype)
    shape = (order_R.shape[0], w1_EHD.shape[1]) if keeps else (0,)
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(shape, dtype=dtype)


@torch.library.custom_op("dmoe_layer::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    dy_TD: Tensor,
    hidden_RH: Tensor,
    x_TD: Tensor,
    order_R: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    gates_TK: Tensor,
    w1_EHD: Tensor,
    b1_EH: Tensor | None,
    w2_EDH: Tensor,
    b2_ED: Tensor | None,
    activation: str,
    dropout: float,
    kept_RW: Tensor | None,
    dtype: torch.dtype,
    of_rows: bool,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and gates, if ``of_rows``; of w1, b1, w2 and b2, if ``of_weights``.

    An empty tensor for what is not wanted, and for a bias that is not there.
    """
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDH, b2_ED)
    pairs = SortedPairs(order_R, offsets, tiles)
    call = ExpertCall(x_TD, pairs, gates_TK, weights, activation, dropout, kept_RW, dtype)
    dy_TD, hidden_RH = contiguous(dy_TD, hidden_RH)
    if narrow.fuses_backward(call.dim, dtype, activation):
        found = narrow.backward(call, dy_TD, of_rows, of_weights)
    else:
        found = wide.backward(call, dy_TD, hidden_RH, of_rows, of_weights)
    dx = _nothing(x_TD, x_TD.dtype) if found.dx is None else found.dx
    dgates = _nothing(x_TD, gates_TK.dtype) if found.dgates is None else found.dgates
    own = w1_EHD.dtype
    dweights: list[Tensor] | list[None] = found.weights or [None] * 4
    dw1, db1, dw2, db2 = (
        _nothing(x_TD, own) if gradient is None or parameter is None else converted(gradient, own)
        for gradient, parameter in zip(dweights, weights, strict=True)
    )
    return dx, converted(dgates, gates_TK.dtype), dw1, db1, dw2, db2


@fused_experts_backward.register_fake
def _(dy_TD, hidden, x_TD, order_R, offsets, tiles, gates_TK, w1, b1, w2, b2, *options):  # type: ignore[no-untyped-def]
    of_rows, of_weights = options[-2:]
    of_tokens = [(t, t.dtype, of_rows) for t in (x_TD, gates_TK)]
    of_parameters = [(p, w1.dtype, of_weights) for p in (w1, b1, w2, b2)]
    return tuple(
        x_TD.new_empty(t.shape, dtype=dtype) if t is not None and wanted else _nothing(x_TD, dtype)
        for t, dtype, wanted in (*of_tokens, *of_parameters)
    )


def _nothing(x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces a gradient that is not needed, since the outputs of an operator are tensors."""
    return x_TD.new_empty((0,), dtype=dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.dropout, kept, ctx.dtype, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *tensors, kept)


def _backward(ctx: Any, dy_TD: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 14
    *tensors, kept = ctx.saved_tensors
    options = (ctx.activation, ctx.dropout, kept, ctx.dtype)
    needed = ctx.needs_input_grad[:9]
    of_rows, of_weights = needed[0] or needed[4], any(needed[5:])
    grads = _experts_backward(dy_TD, *tensors, *options, of_rows, of_weights)
    grads = [grads[0], None, None, None, *grads[1:]]
    return *(g if n else None for g, n in zip(grads, needed, strict=True)), *[None] * 5


_experts = differentiable(_fused_experts, _save_for_backward, _backward)
_experts_backward = refuse_double_backward(fused_experts_backward)
