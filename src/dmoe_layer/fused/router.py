"""The router's Triton kernels as registered operators: launches and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import refuse_double_backward
from ..tensors import RouterWeights, Routing
from .kernels import routing as kernels
from .kernels.common import TILE
from .launch import block_size, contiguous, launch, most_tiles, sum_by_row, sum_chunks, triton_dtype

# A chunk of tokens is one program of the backward: enough of them to fill a GPU several times.
CHUNKS = 1024


class SortedPairs(NamedTuple):
    """The (token, slot) pairs by expert: what this backend's router leaves to its experts.

    Attributes:
        order_R: (T·k,) int32, each pair t·k + j, sorted by expert.
        offsets: (E + 1,) int64; expert e's are ``order_R[offsets[e] : offsets[e + 1]]``.
        tiles: (tiles, 4) int32, the map of ``kernels.common.write_tiles`` of those.
    """

    order_R: Tensor
    offsets: Tensor
    tiles: Tensor


def route(
    x: Tensor,
    weights: RouterWeights,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    k: int,
    seed: Tensor | None,
) -> tuple[Routing, SortedPairs]:
    """As ``eager.router.route``, in one kernel, with the sort by expert as the plan."""
    found = _fused_route(x, *weights, rows_BN, tokens_per_sample, k, seed)
    logits_TE, indices_TK, gates_TK, *pairs = found
    return Routing(indices_TK, gates_TK, logits_TE), SortedPairs(*pairs)


@torch.library.custom_op("dmoe_layer::fused_route", mutates_args=())
def _fused_route(
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    k: int,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits (T, E), experts and gates (T, k), and the three tensors of ``SortedPairs``."""
    x, w_A2ED, b_A2E, rows_BN = contiguous(x, w_A2ED, b_A2E, rows_BN)
    samples = _Samples(x, w_A2ED, rows_BN, tokens_per_sample)
    tokens, n_experts, dim = samples.tokens, w_A2ED.shape[2], x.shape[-1]
    n_tiles = most_tiles(tokens, samples.tile, samples.count)
    logits = x.new_empty((tokens, n_experts), dtype=torch.float32)
    indices = x.new_empty((tokens, k), dtype=torch.int64)
    gates = x.new_empty((tokens, k), dtype=torch.float32)
    counts = x.new_empty((n_experts, n_tiles), dtype=torch.int32)
    launch(
        kernels.route_kernel, (n_tiles,), x,
        x, w_A2ED, b_A2E, rows_BN, samples.offsets, logits, indices, gates, counts,
        samples.count, n_tiles, 0 if seed is None else int(seed), n_experts=n_experts, dim=dim,
        K=k, SLOTS=block_size(k, 2), NOISY=seed is not None, **samples.blocks, **samples.scoring,
    )  # fmt: skip
    ends = counts.view(-1).cumsum(0).view(n_experts, n_tiles)
    offsets = torch.cat([ends.new_zeros(1), ends[:, -1]])
    order = x.new_empty((tokens * k,), dtype=torch.int32)  # backend.py: fewer than 2³¹ pairs
    tiles = x.new_empty((most_tiles(tokens * k, TILE.value, n_experts), 4), dtype=torch.int32)
    launch(
        kernels.sort_kernel, (n_tiles,), x,
        indices, samples.offsets, ends - counts, order, offsets, tiles, samples.count, n_tiles,
        tiles.shape[0],
        n_experts=n_experts, K=k, **samples.blocks,
    )  # fmt: skip
    return logits, indices, gates, order, offsets, tiles


@_fused_route.register_fake
def _(x, w_A2ED, b_A2E, rows_BN, tokens_per_sample, k, seed):  # type: ignore[no-untyped-def]
    tokens, n_experts = x.numel() // x.shape[-1], w_A2ED.shape[2]
    return (
        x.new_empty((tokens, n_experts), dtype=torch.float32),
        x.new_empty((tokens, k), dtype=torch.int64),
        x.new_empty((tokens, k), dtype=torch.float32),
        x.new_empty((tokens * k,), dtype=torch.int32),
        x.new_empty((n_experts + 1,), dtype=torch.int64),
        x.new_empty((most_tiles(tokens * k, TILE.value, n_experts), 4), dtype=torch.int32),
    )


@torch.library.custom_op("dmoe_layer::fused_route_backward", mutates_args=())
def fused_route_backward(
    dlogits: Tensor | None,
    dgates: Tensor | None,
    indices: Tensor,
    gates: Tensor,
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, w and b."""
    dlogits, dgates, indices, gates = contiguous(dlogits, dgates, indices, gates)
    x, w_A2ED, b_A2E, rows_BN = contiguous(x, w_A2ED, b_A2E, rows_BN)
    samples = _Samples(x, w_A2ED, rows_BN, tokens_per_sample)
    n_experts, dim = w_A2ED.shape[2], x.shape[-1]
    # A chunk's share of dw is 2·E·D numbers, and a quarter of its tokens' x at most.
    chunk = max(samples.tokens // CHUNKS, 8 * n_experts, samples.tile)
    chunk = -(-chunk // samples.tile) * samples.tile
    n_chunks = most_tiles(samples.tokens, chunk, samples.count)
    dx = torch.empty_like(x)
    shares = [x.new_empty((n_chunks, *p.shape[1:]), dtype=torch.float32) for p in (w_A2ED, b_A2E)]
    launch(
        kernels.route_backward_kernel, (n_chunks, -(-dim // samples.scoring["DIM"])), x,
        dlogits, dgates, indices, gates, x, w_A2ED, b_A2E, rows_BN, samples.offsets, dx, *shares,
        samples.count, chunk, 0 if seed is None else int(seed), n_experts=n_experts, dim=dim,
        K=indices.shape[1], NOISY=seed is not None,
        **{**samples.blocks, **samples.scoring, **samples.backward},
    )  # fmt: skip
    grads = []
    for share, parameter in zip(shares, (w_A2ED, b_A2E), strict=True):
        total = sum_chunks(share, samples.offsets, chunk)
        if rows_BN is not None:
            total = sum_by_row(total, rows_BN, len(parameter))
        grads.append(total.to(parameter.dtype))
    return dx, grads[0], grads[1]


@fused_route_backward.register_fake
def _(dlogits, dgates, indices, gates, x, w_A2ED, b_A2E, *options):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, w_A2ED, b_A2E))


class _Samples:
    """Where each sample's tokens stand, and the blocks that the router's kernels cut them into."""

    def __init__(
        self,
        x: Tensor,
        w_A2ED: Tensor,
        rows_BN: Tensor | None,
        tokens_per_sample: Tensor | None,
    ) -> None:
        self.tokens = x.numel() // x.shape[-1]
        if rows_BN is None:
            each = max(self.tokens, 1)  # one router for all: one long sample
            self.offsets = torch.arange(0, each + 1, each, device=x.device).clamp_(max=self.tokens)
        elif tokens_per_sample is None:
            ones = torch.full((x.shape[0] + 1,), x.shape[1], device=x.device)
            self.offsets = ones.cumsum(0) - x.shape[1]
        else:
            ends = tokens_per_sample.cumsum(0)
            self.offsets = torch.cat([ends.new_zeros(1), ends])
        self.count = len(self.offsets) - 1
        attributes = 0 if rows_BN is None else rows_BN.shape[1]
        # Products of two bf16 or fp16 numbers are exact in fp32; a sum of routers is no bf16.
        exact = x.dtype == w_A2ED.dtype and attributes <= 1
        dtype = x.dtype if exact else torch.float32
        # Registers decide: a number of fp32 is split into three of tf32, and with many experts the
        # scores of a token alone take many.
        experts = block_size(w_A2ED.shape[2], 8)
        many = experts > 16
        widest = 32 if many else 64 if dtype == torch.float32 else 128
        dim = block_size(min(x.shape[-1], widest))
        self.tile = 32 if many else 128 if x.shape[-1] <= 64 else 64
        self.blocks: dict[str, Any] = {
            "TOKENS": self.tile,
            "SAMPLES": block_size(self.count, 2),
            "EXPERTS": experts,
        }
        self.scoring: dict[str, Any] = {
            "DIM": dim,
            "ATTRIBUTES": attributes,
            "DOT": triton_dtype(dtype),
            "num_warps": 8 if many else 4,
        }
        # The backward's products are all of fp32 numbers: fewer tokens at a time, more warps. Its
        # chunks are multiples of the forward's tile, and so of this one.
        fewest = many or dim > 64
        self.backward = {
            "TOKENS": 16 if fewest else 32 if dim > 32 or dtype == torch.float32 else 64,
            "num_warps": 4 if 32 < dim <= 64 and not many else 8,
            "num_stages": 1,
        }


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w, b, rows, counts, _, seed = inputs
    _, indices, gates, *pairs = output
    ctx.mark_non_differentiable(indices, *pairs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices, gates, x, w, b, rows, counts, seed)


def _backward(ctx: Any, dlogits: Any, _: Any, dgates: Any, *__: Any) -> tuple[Tensor | None, ...]:
    if dlogits is None and dgates is None:
        return (None,) * 7
    return *fused_route_backward(dlogits, dgates, *ctx.saved_tensors), None, None, None, None


_fused_route.register_autograd(_backward, setup_context=_save_for_backward)
refuse_double_backward(fused_route_backward)
