"""The experts' MLPs in plain PyTorch, forward and backward: chunks of tokens, blocks of rows.

The tokens of a chunk are gathered expert by expert. Each expert computes its rows a block at a
time, and the rows are summed back into the tokens. If there are many tokens, the hidden layer of a
block is not saved. Backward computes it again, and draws the same dropout from the seed. Few
buffers are used again and again, since new memory costs time, and so does a block that leaves the
processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..dropout import Dropout
from ..hidden_layer import keeps_hidden
from ..operators import differentiable, refuse_double_backward
from ..tensors import ExpertOptions, ExpertWeights
from .dispatch import Block, Dispatch
from .gemm import (
    add_product,
    least_rows,
    linear,
    linear_backward,
    most_padding,
    weighted_sum,
)
from .memory import Scratch, new_empty

# On a CPU the hidden layer of a block has about so many entries, 4 MiB in fp32: it stays in the
# cache. Yet a block has so many rows that a product's fixed costs do not count, and no more than
# others gain from. Other devices have blocks of the most rows.
BLOCK_ENTRIES, LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS = 2**20, 2048, 8192


def experts(
    x_TD: Tensor,
    expert_indices_TK: Tensor,
    gates_TK: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
) -> Tensor:
    """Σ_j gates[t, j] · Expert_{indices[t, j]}(x[t]) for every token: (T, D), in x's dtype.

    Expert(x) = Dropout(w2 · act(w1 · x + b1) + b2), computed in ``options.dtype``. x and weights
    are converted block by block, so that no copy of them is saved for backward.
    """
    keep_hidden = keeps_hidden(x_TD, gates_TK, weights)
    y_TD: Tensor = _experts(x_TD, expert_indices_TK, gates_TK, *weights, *options, keep_hidden)[0]
    return y_TD


@torch.library.custom_op("dmoe_layer::experts", mutates_args=())
def experts_forward(
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
    """The output, and the hidden layer for backward: (R, H), or an empty tensor."""
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDH, b2_ED)
    options = ExpertOptions(activation, dropout, seed, dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        call = _ExpertPass(x_TD, expert_indices_TK, weights, options)
        z_RH = new_empty(x_TD, _hidden_shape(expert_indices_TK, w1_EHD, keep_hidden), dtype)
        scaled_gates_TK = gates_TK * call.drop.scale
        y_TD, rows_XD = new_empty(x_TD, x_TD.shape), call.row_buffer()
        for chunk in call.chunks():
            call.gather(x_TD, chunk, rows_XD)
            for block in chunk.dispatch.blocks:
                expert = call.expert_of(block)
                z_XH, h_XH = call.hidden(expert, call.operand(rows_XD, block))
                if keep_hidden:
                    z_RH[chunk.rows][block.rows] = z_XH[: block.size]
                o_XD = linear(h_XH, expert.w2_DH, expert.b2_D, call.o_scratch)
                rows_XD[block.rows] = o_XD[: block.size]
            o_RD = call.drop(rows_XD[: chunk.size])
            y_TD[chunk.tokens] = chunk.dispatch.combine(o_RD, scaled_gates_TK[chunk.tokens])
        return y_TD, z_RH


@experts_forward.register_fake
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
    """The gradients of x, gates, w1, b1, w2, b2; empty tensors for those not ``needed``."""
    weights = ExpertWeights(w1_EHD, b1_EH, w2_EDH, b2_ED)
    options = ExpertOptions(activation, dropout, seed, dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        call = _ExpertPass(x_TD, expert_indices_TK, weights, options)
        gradients = _Gradients(call, gates_TK, needed)
        for chunk in call.chunks():
            gradients.add_chunk(chunk, dy_TD, z_RH[chunk.rows] if keep_hidden else None)
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
    """The weights of one expert, in the dtype of the computation."""

    w1_HD: Tensor
    b1_H: Tensor | None
    w2_DH: Tensor
    b2_D: Tensor | None


class _Chunk(NamedTuple):
    """Tokens that are dispatched and combined together."""

    tokens: slice
    rows: slice
    dispatch: Dispatch

    @property
    def size(self) -> int:
        return self.rows.stop - self.rows.start


class _ExpertPass:
    """What forward and backward of one call share: rows in, hidden layer, rows out."""

    def __init__(
        self,
        x_TD: Tensor,
        expert_indices_TK: Tensor,
        weights: ExpertWeights,
        options: ExpertOptions,
    ) -> None:
        self.x_TD, self.weights, self.dtype = x_TD, weights, options.dtype
        self.indices_TK = expert_indices_TK
        self.relu, self.activation = options.activation == "relu", ACTIVATIONS[options.activation]
        self.drop = Dropout(options.dropout, options.seed, x_TD.device)
        (tokens, k), (n_experts, hidden, dim) = expert_indices_TK.shape, weights.w1_EHD.shape
        self.block_rows = MOST_BLOCK_ROWS
        if x_TD.device.type == "cpu":
            fitting = BLOCK_ENTRIES // max(hidden, dim)
            self.block_rows = min(max(fitting, LEAST_BLOCK_ROWS), MOST_BLOCK_ROWS)
        # A full block of every expert, if all have the same load.
        self.chunk_tokens = max(self.block_rows * n_experts // k, 1)
        self._least_rows = least_rows(weights.w1_EHD, weights.w2_EDH, options.dtype)
        self._most_rows = min(tokens, self.chunk_tokens) * k
        self._z_scratch, self.o_scratch = self.scratch(hidden), self.scratch(dim)
        self._last: tuple[int, _Expert] | None = None

    def chunks(self) -> Iterator[_Chunk]:
        (tokens, k), n_experts = self.indices_TK.shape, self.weights.w1_EHD.shape[0]
        for start in range(0, tokens, self.chunk_tokens):
            stop = min(start + self.chunk_tokens, tokens)
            indices_CK = self.indices_TK[start:stop]
            dispatch = Dispatch(indices_CK, n_experts, self.block_rows, self._least_rows)
            yield _Chunk(slice(start, stop), slice(start * k, stop * k), dispatch)

    def scratch(self, width: int, dtype: torch.dtype | None = None) -> Scratch:
        """Memory for the rows of a block, in the dtype of the computation or another."""
        return Scratch(self.x_TD, width, dtype or self.dtype)

    def row_buffer(self) -> Tensor:
        """Memory for the rows of a chunk.

        The padding of a block reaches into the next one. That of the last block reaches beyond all
        rows, where zeros avoid numbers that are slow to compute with.
        """
        rows, beyond = self._most_rows, most_padding(min(self._most_rows, self.block_rows))
        buffer_XD = new_empty(self.x_TD, (rows + beyond, self.x_TD.shape[1]), self.dtype)
        buffer_XD[rows:].zero_()
        return buffer_XD

    def gather(self, source_TD: Tensor, chunk: _Chunk, rows_XD: Tensor) -> None:
        """Writes each row's token to a row buffer."""
        # A sum's gradient is expanded from one number, and rows of that are picked slowly.
        source_CD = source_TD[chunk.tokens].contiguous()
        tokens_R, rows_RD = chunk.dispatch.token_of_row, rows_XD[: chunk.size]
        if source_CD.dtype == rows_RD.dtype:
            torch.index_select(source_CD, 0, tokens_R, out=rows_RD)
        else:
            rows_RD.copy_(source_CD.index_select(0, tokens_R))

    def operand(self, rows_XD: Tensor, block: Block) -> Tensor:
        """The rows and the padding of a block as the operand of a product.

        For odd widths it is a copy, which starts at aligned memory. Otherwise MKL rounds
        differently, and where a block starts depends on the other samples of the batch.
        """
        block_XD = rows_XD[block.padded]
        aligned = rows_XD.shape[1] * rows_XD.element_size() % 16 == 0
        return block_XD if aligned else block_XD.clone()

    def expert_of(self, block: Block) -> _Expert:
        """The weights of the block's expert; blocks of one expert follow each other."""
        if self._last is None or self._last[0] != block.expert:
            w1_EHD, b1_EH, w2_EDH, b2_ED = self.weights
            e, dtype = block.expert, self.dtype
            expert = _Expert(
                w1_EHD[e].to(dtype),
                None if b1_EH is None else b1_EH[e].to(dtype),
                w2_EDH[e].to(dtype),
                None if b2_ED is None else b2_ED[e].to(dtype),
            )
            self._last = (block.expert, expert)
        return self._last[1]

    def hidden(self, expert: _Expert, x_XD: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden layer before and after its activation; for ReLU both are the latter.

        Before a gated activation it is twice as wide. The next block may overwrite it.
        """
        z_XH = linear(x_XD, expert.w1_HD, expert.b1_H, self._z_scratch)
        if self.relu:
            z_XH.relu_()
        return z_XH, self.activate(z_XH)

    def activate(self, z_XH: Tensor) -> Tensor:
        return z_XH if self.relu else self.activation.forward(z_XH)


class _Gradients:
    """The gradients of one call, to which chunks add; those that are not needed stay empty.

    With dO the gradient of a token's output after dropout, g its gate and dA = dO·w2:

        dg = <dA, h> + <dO, b2>        (SonicMoE's formula: the expert's output is not needed)
        dw2 = Σ g·dO ⊗ h    db2 = Σ g·dO    dz = act'(z) · dA
        dw1 = Σ dz ⊗ g·x    db1 = Σ g·dz    dx = Σ g·(dz·w1)
    """

    def __init__(self, call: _ExpertPass, gates_TK: Tensor, needed: list[bool]) -> None:
        self.call = call
        self.need_x, self.need_gates, need_w1, need_b1, need_w2, need_b2 = needed
        self.need_dz = self.need_x or need_w1 or need_b1
        self.gates_TK = gates_TK * call.drop.scale
        self.dgates_TK = gates_TK.new_empty(gates_TK.shape if self.need_gates else (0,))
        self.dx_TD = new_empty(call.x_TD, call.x_TD.shape if self.need_x else (0,))
        w1_EHD, b1_EH, w2_EDH, b2_ED = call.weights
        self.w1, self.b1 = _Sum(w1_EHD, need_w1, w1_EHD), _Sum(b1_EH, need_b1, w1_EHD)
        self.w2, self.b2 = _Sum(w2_EDH, need_w2, w1_EHD), _Sum(b2_ED, need_b2, w1_EHD)
        self._x_XD, self._do_XD = call.row_buffer(), call.row_buffer()
        hidden = w2_EDH.shape[2]
        self._dh_scratch = call.scratch(hidden)
        self._product_scratch = call.scratch(hidden, gates_TK.dtype)

    def add_chunk(self, chunk: _Chunk, dy_TD: Tensor, z_RH: Tensor | None) -> None:
        """Adds what the tokens of a chunk contribute.

        Args:
            chunk: whose tokens.
            dy_TD: the output's gradient, of all tokens.
            z_RH: what forward kept of the chunk's hidden layer, (R, H) or, if gated, (R, 2H);
                None: it is computed again.
        """
        call = self.call
        call.gather(call.x_TD, chunk, self._x_XD)
        call.gather(dy_TD, chunk, self._do_XD)
        call.drop(self._do_XD[: chunk.size])
        gates_CK = self.gates_TK[chunk.tokens]
        gates_R = gates_CK.reshape(-1)[chunk.dispatch.order]
        dgates_R = torch.empty_like(gates_R)
        for block in chunk.dispatch.blocks:
            z_XH = None
            if z_RH is not None:
                z_XH = z_RH[block.padded]
                if missing := block.padded_stop - block.start - z_XH.shape[0]:
                    z_XH = F.pad(z_XH, (0, 0, 0, missing))  # beyond the last block's rows
            self._add_block(block, gates_R[block.rows], dgates_R[block.rows], z_XH)
        if self.need_gates:
            self.dgates_TK[chunk.tokens] = chunk.dispatch.by_pair(dgates_R)
        if self.need_x:
            dx_RD = self._x_XD[: chunk.size]
            self.dx_TD[chunk.tokens] = chunk.dispatch.combine(dx_RD, gates_CK)

    def _add_block(
        self, block: Block, gates_R: Tensor, dgates_R: Tensor, z_XH: Tensor | None
    ) -> None:
        """Adds what the rows of a block contribute, and leaves dx in the place of x."""
        call, rows, expert = self.call, block.size, self.call.expert_of(block)
        x_RD, do_RD = self._x_XD[block.rows], self._do_XD[block.rows]
        do_XD = call.operand(self._do_XD, block)
        if z_XH is None:
            z_XH, h_XH = call.hidden(expert, call.operand(self._x_XD, block))
        else:
            h_XH = call.activate(z_XH)
        dh_XH = linear_backward(do_XD, expert.w2_DH, self._dh_scratch)
        h_RH, dh_RH = h_XH[:rows], dh_XH[:rows]
        if self.need_gates:
            own_RH = dh_RH.to(dgates_R.dtype)
            torch.sum(
                torch.mul(own_RH, h_RH, out=self._product_scratch.rows(rows)), dim=1, out=dgates_R
            )
            if expert.b2_D is not None:
                dgates_R += (do_RD * expert.b2_D).sum(dim=1, dtype=dgates_R.dtype)
        gates_R1 = gates_R[:, None].to(call.dtype)
        do_RD *= gates_R1
        self.w2.add_product(block, do_RD, h_RH)
        self.b2.add_rows(block, do_RD)
        if not self.need_dz:
            return
        dz_XH = call.activation.backward(dh_XH, z_XH)
        x_RD *= gates_R1
        self.w1.add_product(block, dz_XH[:rows], x_RD)
        self.b1.add_weighted_rows(block, dz_XH[:rows], gates_R1[:, 0])
        if self.need_x:
            x_RD.copy_(linear_backward(dz_XH, expert.w1_HD, call.o_scratch)[:rows])

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        sums = (self.w1.result(), self.b1.result(), self.w2.result(), self.b2.result())
        return self.dx_TD, self.dgates_TK.mul_(self.call.drop.scale), *sums


class _Sum:
    """The gradient of a parameter of all experts, summed in fp32 at least: it has a term a token.

    An expert's first term is copied, and only an idle expert's part is filled with zeros: at the
    width of a transformer, one more pass over all gradients would be felt.
    """

    def __init__(self, parameter: Tensor | None, needed: bool, like: Tensor) -> None:
        self.needed, self.own = needed, like.dtype
        shape = (0,) if parameter is None or not needed else parameter.shape
        self.total = new_empty(like, shape, torch.promote_types(self.own, torch.float32))
        self.idle = set(range(shape[0]))

    def add_product(self, block: Block, a_RO: Tensor, b_RI: Tensor) -> None:
        """Adds aᵀ·b to the block's expert's."""
        if self.needed:
            add_product(self.total[block.expert], a_RO, b_RI, first=self._is_first(block.expert))

    def add_rows(self, block: Block, rows_RO: Tensor) -> None:
        """Adds the sum of the rows."""
        if self.needed:
            self._add(block.expert, rows_RO.sum(dim=0, dtype=self.total.dtype))

    def add_weighted_rows(self, block: Block, rows_RO: Tensor, weights_R: Tensor) -> None:
        """Adds the weighted sum of the rows."""
        if not self.needed:
            return
        if rows_RO.dtype == self.total.dtype:
            self._add(block.expert, weighted_sum(rows_RO, weights_R))
        else:
            weighted_RO = rows_RO * weights_R[:, None]
            self._add(block.expert, weighted_RO.sum(dim=0, dtype=self.total.dtype))

    def _is_first(self, expert: int) -> bool:
        first = expert in self.idle
        self.idle.discard(expert)
        return first

    def _add(self, expert: int, term: Tensor) -> None:
        if self._is_first(expert):
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
    grads = _experts_backward(dy_TD, *tensors, *options, needed)
    dx, dgates, *dweights = [g if need else None for g, need in zip(grads, needed, strict=True)]
    return dx, None, dgates, *dweights, *[None] * 5


_experts = differentiable(experts_forward, _save_for_backward, _backward)
_experts_backward = refuse_double_backward(experts_backward)
