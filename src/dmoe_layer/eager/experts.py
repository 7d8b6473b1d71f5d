"""The experts' MLPs in plain PyTorch, forward and backward, block by block of one expert's rows.

Where tokens are many, the hidden layer of a block is not kept: backward computes it again, and
draws the same dropout from the seed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..dropout import Dropout
from ..hidden_layer import keeps_hidden
from ..operators import refuse_double_backward
from ..tensors import ExpertOptions, ExpertWeights
from .dispatch import Block, Chunk, Dispatch
from .gemm import linear, round_rows, sum_of_products


def experts(
    x_TD: Tensor,
    expert_indices_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Tensor:
    """Σ_j gates[t, j] · Expert_{indices[t, j]}(x[t]) for every token: (T, D), in x's dtype.

    Expert(x) = Dropout(w2 · act(w1 · x + b1) + b2), computed in ``options.dtype``: x and weights
    are converted block by block, so that no copy of them is kept for backward.
    """
    keep_hidden = keeps_hidden(x_TD, gates_TK, weights)
    return _experts(x_TD, expert_indices_TK, gates_TK, *weights, *options, keep_hidden)[0]


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
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDH, b2_ED)
    options = ExpertOptions(activation, dropout, seed, dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        call = _ExpertPass(x_TD, expert_indices_TK, weights, options)
        scaled_gates_TK = gates_TK * call.drop.scale
        y_TD = x_TD.new_empty(x_TD.shape)
        z_RH = x_TD.new_empty(_hidden_shape(expert_indices_TK, w1_EHD, keep_hidden), dtype=dtype)
        for chunk in call.dispatch.chunks:
            for block in chunk.blocks:
                expert = call.expert_of(block)
                z, h_RH = call.hidden(expert, call.rows_of_x(block))
                if keep_hidden:
                    z_RH[block.rows] = z[: block.size]
                o_RD = linear(h_RH, expert.w2_DH, expert.b2_D)[: block.size]
                call.put_rows(chunk, block, call.drop(o_RD))
            y_TD[chunk.tokens] = call.combine(chunk, scaled_gates_TK)
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
    """Gradients of x, gates, w1, b1, w2, b2; an empty tensor where ``needed`` says no."""
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDH, b2_ED)
    options = ExpertOptions(activation, dropout, seed, dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        call = _ExpertPass(x_TD, expert_indices_TK, weights, options)
        gradients = _Gradients(call, gates_TK, needed)
        for chunk in call.dispatch.chunks:
            # A sum's gradient is expanded from one number, and rows of that are picked slowly.
            dy_CD = dy_TD[chunk.tokens].contiguous()
            for block in chunk.blocks:
                gradients.add_block(chunk, block, dy_CD, z_RH if keep_hidden else None)
            gradients.end_chunk(chunk)
        return gradients.results()


@experts_backward.register_fake
def _(dy_TD, z_RH, x_TD, expert_indices_TK, gates_TK, w1, b1, w2, b2, *options):  # type: ignore[no-untyped-def]
    needed, own = options[-1], w1.dtype
    inputs = ((x_TD, x_TD.dtype), (gates_TK, gates_TK.dtype), *((p, own) for p in (w1, b1, w2, b2)))
    return tuple(
        x_TD.new_empty(i.shape if n and i is not None else (0,), dtype=dtype)
        for (i, dtype), n in zip(inputs, needed, strict=True)
    )


class _Expert(NamedTuple):
    """One expert's weights, in the dtype that is computed in."""

    w1_HD: Tensor
    b1_H: Tensor | None
    w2_DH: Tensor
    b2_D: Tensor | None


class _ExpertPass:
    """What forward and backward of one call do alike: rows in, hidden layer, rows out."""

    def __init__(
        self,
        x_TD: Tensor,
        expert_indices_TK: Tensor,
        weights: ExpertWeights,
        options: ExpertOptions,
    ) -> None:
        self.x_TD, self.weights, self.dtype = x_TD, weights, options.dtype
        self.relu, self.activation = options.activation == "relu", ACTIVATIONS[options.activation]
        self.dispatch = Dispatch(expert_indices_TK, len(weights.w1_EHD))
        self.drop = Dropout(options.dropout, options.seed, x_TD.device)
        # One buffer for the tokens of a block, and one for the rows of a chunk.
        self._block_XD = self.block_buffer()
        most = max(
            (chunk.rows.stop - chunk.rows.start for chunk in self.dispatch.chunks), default=0
        )
        self._chunk_XD = x_TD.new_empty((most, x_TD.shape[1]), dtype=self.dtype)

    def block_buffer(self) -> Tensor:
        """Room for the rows of the largest block."""
        most = round_rows(max((block.size for block in self.dispatch.blocks), default=0))
        return self.x_TD.new_empty((most, self.x_TD.shape[1]), dtype=self.dtype)

    def expert_of(self, block: Block) -> _Expert:
        w1_EHD, b1_EH, w2_EDH, b2_ED = self.weights
        e, dtype = block.expert, self.dtype
        return _Expert(
            w1_EHD[e].to(dtype),
            None if b1_EH is None else b1_EH[e].to(dtype),
            w2_EDH[e].to(dtype),
            None if b2_ED is None else b2_ED[e].to(dtype),
        )

    def rows_of_x(self, block: Block) -> Tensor:
        """The tokens of a block, padded; to be used before the next block's are asked for."""
        return _gather(self.x_TD, self.dispatch.token_of_row[block.rows], self._block_XD)

    def hidden(self, expert: _Expert, x_RD: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden layer before and after its activation; of ReLU twice the latter.

        Before a gated activation it is twice as wide.
        """
        z_RH = linear(x_RD, expert.w1_HD, expert.b1_H, relu=self.relu)
        return z_RH, self.activate(z_RH)

    def activate(self, z_RH: Tensor) -> Tensor:
        return z_RH if self.relu else self.activation.forward(z_RH)

    def put_rows(self, chunk: Chunk, block: Block, rows_RD: Tensor) -> None:
        """Lets a block's rows wait for the others of their chunk."""
        first = chunk.rows.start
        self._chunk_XD[block.start - first : block.stop - first] = rows_RD

    def combine(self, chunk: Chunk, scaled_gates_TK: Tensor | None = None) -> Tensor:
        return self.dispatch.combine(chunk, self._chunk_XD, scaled_gates_TK)


class _Gradients:
    """The gradients of one call, which blocks add to; those that nobody needs stay empty.

    With dO the gradient of a token's output after dropout, g its gate and dA = dO·w2:

        dg = <dA, h> + <dO, b2>        (SonicMoE's formula: the expert's output is not needed)
        dw2 = Σ g·dO ⊗ h    db2 = Σ g·dO    dz = act'(z) · g·dA
        dw1 = Σ dz ⊗ x      db1 = Σ dz      dx = dz·w1
    """

    def __init__(self, call: _ExpertPass, gates_TK: Tensor, needed: list[bool]) -> None:
        self.call = call
        self.need_x, self.need_gates, need_w1, need_b1, need_w2, need_b2 = needed
        self.need_dz = self.need_x or need_w1 or need_b1
        scaled_TK = gates_TK * call.drop.scale
        self.gates_R = scaled_TK.reshape(-1)[call.dispatch.order]
        self.dgates_R = torch.empty_like(self.gates_R)
        self.dx_TD = call.x_TD.new_empty(call.x_TD.shape if self.need_x else (0,))
        w1_EHD, b1_EH, w2_EDH, b2_ED = call.weights
        self.w1, self.b1 = _Sum(w1_EHD, need_w1, w1_EHD), _Sum(b1_EH, need_b1, w1_EHD)
        self.w2, self.b2 = _Sum(w2_EDH, need_w2, w1_EHD), _Sum(b2_ED, need_b2, w1_EHD)
        self._do_XD = call.block_buffer()

    def add_block(self, chunk: Chunk, block: Block, dy_CD: Tensor, z_all: Tensor | None) -> None:
        """Adds what the rows of a block contribute.

        Args:
            chunk: the block's.
            block: whose rows.
            dy_CD: the output's gradient, of the chunk's tokens.
            z_all: (R, H) or, if gated, (R, 2H), what forward kept of the hidden layer; None: it
                is computed again.
        """
        call, rows, expert = self.call, block.size, self.call.expert_of(block)
        tokens_R = call.dispatch.token_of_row[block.rows] - chunk.tokens.start
        do_RD = _gather(dy_CD, tokens_R, self._do_XD)
        call.drop(do_RD[:rows])
        x_RD = call.rows_of_x(block)
        if z_all is None:
            z_RH, h_RH = call.hidden(expert, x_RD)
        else:
            z_RH = F.pad(z_all[block.rows], (0, 0, 0, len(x_RD) - rows))
            h_RH = call.activate(z_RH)
        dh_RH = linear(do_RD, expert.w2_DH.mT)
        if self.need_gates:
            dgates_R = self.dgates_R[block.rows]
            torch.sum(dh_RH[:rows].to(dgates_R.dtype) * h_RH[:rows], dim=1, out=dgates_R)
            if expert.b2_D is not None:
                dgates_R += (do_RD[:rows] * expert.b2_D).sum(dim=1, dtype=dgates_R.dtype)
        gates_R1 = self.gates_R[block.rows, None].to(call.dtype)
        do_RD[:rows] *= gates_R1
        self.w2.add_product(block, do_RD, h_RH)
        self.b2.add_rows(block, do_RD)
        if not self.need_dz:
            return
        dh_RH[:rows] *= gates_R1
        dz_RH = call.activation.backward(dh_RH, z_RH)
        self.w1.add_product(block, dz_RH, x_RD)
        self.b1.add_rows(block, dz_RH)
        if self.need_x:
            call.put_rows(chunk, block, linear(dz_RH, expert.w1_HD.mT)[:rows])

    def end_chunk(self, chunk: Chunk) -> None:
        """Sums the rows of dx into the chunk's tokens."""
        if self.need_x:
            self.dx_TD[chunk.tokens] = self.call.combine(chunk)

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        dgates = self.dgates_R.new_empty((0,))
        if self.need_gates:
            dgates = self.dgates_R[self.call.dispatch.rows_TK] * self.call.drop.scale
        sums = (self.w1.result(), self.b1.result(), self.w2.result(), self.b2.result())
        return self.dx_TD, dgates, *sums


class _Sum:
    """The gradient of a parameter of all experts, summed in fp32 at least: it has a term a token.

    An expert's first term is copied, and only an idle expert's part is filled with zeros: at the
    width of a transformer, one more pass over all gradients would be felt.
    """

    def __init__(self, parameter: Tensor | None, needed: bool, like: Tensor) -> None:
        self.needed, self.own = needed, like.dtype
        shape = (0,) if parameter is None or not needed else parameter.shape
        self.total = like.new_empty(shape, dtype=torch.promote_types(self.own, torch.float32))
        self.idle = set(range(shape[0]))

    def add_product(self, block: Block, a_RO: Tensor, b_RI: Tensor) -> None:
        """Adds aᵀ·b to the block's expert's."""
        if self.needed:
            self._add(block.expert, sum_of_products(a_RO, b_RI))

    def add_rows(self, block: Block, rows_RO: Tensor) -> None:
        """Adds the sum of the rows."""
        if self.needed:
            self._add(block.expert, rows_RO.sum(dim=0, dtype=self.total.dtype))

    def _add(self, expert: int, term: Tensor) -> None:
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


def _gather(source_TD: Tensor, tokens_R: Tensor, buffer_XD: Tensor) -> Tensor:
    """The tokens' rows, in the buffer, and zeros below them up to a size that products like."""
    rows = len(tokens_R)
    rows_RD = buffer_XD[: round_rows(rows)]
    if source_TD.dtype == buffer_XD.dtype:
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
