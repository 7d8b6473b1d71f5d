"""The router's Triton kernels as registered operators: launches and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators import differentiable, refuse_double_backward
from ..tensors import RouterWeights, Routing
from .kernels import routing as kernels
from .kernels.common import TILE
from .launch import (
    block_size,
    compute_capability,
    contiguous,
    launch,
    most_tiles,
    offset_type,
    triton_dtype,
)

# A chunk of tokens is one program of the backward: enough of them to fill a GPU several times.
CHUNKS = 1024


class SortedPairs(NamedTuple):
    """The (token, slot) pairs by expert.

    Attributes:
        order_R: (T·k,) int32, each pair t·k + j, sorted by expert.
        offsets: (2, E + 1) int32; expert e's pairs are ``order_R[offsets[0, e] : offsets[0, e +
            1]]``, and its tiles ``tiles[offsets[1, e] : offsets[1, e + 1]]``.
        tiles: (tiles, 4) int32, the map of ``kernels.common.write_tiles`` of those.
    """

    order_R: Tensor
    offsets: Tensor
    tiles: Tensor


class Plan(NamedTuple):
    """What this backend's router leaves to its experts.

    Attributes:
        pairs: The sort by expert.
        x: The router's x, as one of its outputs, or None. The experts take it in place of their
            own. So their gradient of x goes to the router's backward, whose kernel adds it where it
            computes its own.
    """

    pairs: SortedPairs
    x: Tensor | None


def route(
    x: Tensor,
    weights: RouterWeights,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    k: int,
    seed: Tensor | None,
) -> tuple[Routing, Plan]:
    """Computes what ``eager.router.route`` does in one kernel; the plan is the sort by expert."""
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    found = _route(x, *weights, rows_BN, tokens_per_sample, k, seed, trained and seed is not None)
    logits_TE, indices_TK, gates_TK, *pairs, _, _, passed = found
    return Routing(indices_TK, gates_TK, logits_TE), Plan(SortedPairs(*pairs), passed)


@torch.library.custom_op("dmoe_layer::fused_route", mutates_args=())
def _fused_route(
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    k: int,
    seed: Tensor | None,
    keep_slopes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits (T, E), experts and gates (T, k), the three tensors of ``SortedPairs``; for backward:

    the experts in a byte each (T, k), and noise · softplus'(spread) (T, E), or an empty tensor.
    """
    x, w_A2ED, b_A2E, rows_BN = contiguous(x, w_A2ED, b_A2E, rows_BN)
    samples = _Samples(x, w_A2ED, rows_BN, tokens_per_sample)
    found = _outputs(x, w_A2ED, k, keep_slopes)
    logits, indices, gates, order, offsets, pair_tiles, chosen, slopes = found
    if not samples.tokens:
        offsets.zero_(), pair_tiles.zero_()
        return logits, indices, gates, order, offsets, pair_tiles, chosen, slopes
    n_experts, dim = w_A2ED.shape[2:]
    tiles = samples.programs(samples.tile)
    counts = x.new_empty((n_experts * tiles[0] * tiles[1],), dtype=torch.int32)
    launch(
        kernels.route_kernel, tiles, x,
        x, w_A2ED, b_A2E, rows_BN, samples.offsets,
        logits, indices, gates, chosen, slopes if keep_slopes else None, counts,
        samples.count, samples.each, 0 if seed is None else int(seed),
        n_experts=n_experts, dim=dim, K=k, SLOTS=block_size(k, 2), NOISY=seed is not None,
        **samples.blocks, **samples.scoring,
    )  # fmt: skip
    ends = counts.cumsum(0, dtype=torch.int32)  # backend.py: fewer than 2³¹ pairs
    # In two warps Triton 3.7 spills where experts are many.
    launch(
        kernels.sort_kernel, tiles, x,
        chosen, samples.offsets, ends, order, offsets, pair_tiles,
        samples.count, samples.each, pair_tiles.shape[0],
        n_experts=n_experts, K=k, num_warps=2 if n_experts <= 32 else 4, **samples.blocks,
    )  # fmt: skip
    return logits, indices, gates, order, offsets, pair_tiles, chosen, slopes


def _outputs(x: Tensor, w_A2ED: Tensor, k: int, keep_slopes: bool) -> tuple[Tensor, ...]:
    """Makes the memory for what ``_fused_route`` returns.

    If x is in fp32, so are the slopes, since the error of a gradient depends on theirs. If x has
    half precision, bf16 is exact enough, and does not lose the smallest slopes as fp16 would.
    """
    tokens, n_experts = x.numel() // x.shape[-1], w_A2ED.shape[2]
    slope_dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    indices = x.new_empty((tokens, k), dtype=torch.int64)
    return (
        x.new_empty((tokens, n_experts), dtype=torch.float32),
        indices,
        torch.empty_like(indices, dtype=torch.float32),
        x.new_empty((tokens * k,), dtype=torch.int32),
        x.new_empty((2, n_experts + 1), dtype=torch.int32),
        x.new_empty((most_tiles(tokens * k, TILE.value, n_experts), 4), dtype=torch.int32),
        torch.empty_like(indices, dtype=torch.int8),
        x.new_empty((tokens, n_experts) if keep_slopes else (0,), dtype=slope_dtype),
    )


@_fused_route.register_fake
def _(x, w_A2ED, b_A2E, rows_BN, tokens_per_sample, k, seed, keep_slopes):  # type: ignore[no-untyped-def]
    return _outputs(x, w_A2ED, k, keep_slopes)


@torch.library.custom_op("dmoe_layer::fused_route_backward", mutates_args=())
def fused_route_backward(
    dlogits: Tensor | None,
    dgates: Tensor | None,
    chosen: Tensor,
    gates: Tensor,
    slopes: Tensor | None,
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    others: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, w and b; to that of x it adds ``others``, if they are given."""
    dlogits, dgates, chosen, gates, slopes = contiguous(dlogits, dgates, chosen, gates, slopes)
    x, w_A2ED, rows_BN, others = contiguous(x, w_A2ED, rows_BN, others)
    samples = _Samples(x, w_A2ED, rows_BN, tokens_per_sample)
    n_experts, dim = w_A2ED.shape[2:]
    # A chunk's share of dw is 2·E·D numbers, and a quarter of its tokens' x at most.
    chunk = max(samples.tokens // CHUNKS, 8 * n_experts, samples.tile)
    chunk = -(-chunk // samples.tile) * samples.tile
    chunks = samples.programs(chunk)
    n_chunks = chunks[0] * chunks[1]
    dx, dw, db = torch.empty_like(x), torch.empty_like(w_A2ED), b_A2E.new_empty(b_A2E.shape)
    dw_shares = x.new_empty((n_chunks, *w_A2ED.shape[1:]), dtype=torch.float32)
    db_shares = x.new_empty((n_chunks, *b_A2E.shape[1:]), dtype=torch.float32)
    routers = x.new_empty((n_chunks, max(samples.attributes, 1)), dtype=torch.int32)
    launch(
        kernels.route_backward_kernel, (*chunks, -(-dim // samples.backward["DIM"])), x,
        dlogits, dgates, chosen, gates, slopes, x, w_A2ED, rows_BN, samples.offsets, others,
        dx, dw_shares, db_shares, routers, samples.count, samples.each, chunk,
        n_experts=n_experts, dim=dim, K=chosen.shape[1], **{**samples.blocks, **samples.backward},
    )  # fmt: skip
    # Few numbers make few programs: each then takes more chunks at a time.
    block, at_once = (32, 128) if 2 * n_experts * dim < 1024 else (128, 16)
    blocks = -(-2 * n_experts * dim // block) + -(-2 * n_experts // block)
    launch(
        kernels.sum_routers_kernel, (len(w_A2ED), blocks), x,
        dw_shares, db_shares, routers, dw, db, n_chunks,
        n_experts=n_experts, dim=dim, OFFSET=offset_type(dw_shares.numel()),
        ROUTERS=routers.shape[1], CHUNKS=at_once, BLOCK=block,
    )  # fmt: skip
    return dx, dw, db


@fused_route_backward.register_fake
def _(dlogits, dgates, chosen, gates, slopes, x, w_A2ED, b_A2E, *options):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, w_A2ED, b_A2E))


class _Samples:
    """Where the tokens of each sample are, and into which blocks the router's kernels cut them.

    Attributes:
        count: The number of samples.
        each: The number of tokens of each sample, if all have the same; else 0.
        offsets: Where the tokens of each sample begin, (count + 1,), if the numbers differ.
    """

    def __init__(
        self,
        x: Tensor,
        w_A2ED: Tensor,
        rows_BN: Tensor | None,
        tokens_per_sample: Tensor | None,
    ) -> None:
        self.tokens = x.numel() // x.shape[-1]
        self.offsets: Tensor | None = None
        if rows_BN is None:
            self.count, self.each = 1, self.tokens  # one router for all: one long sample
        elif tokens_per_sample is None:
            self.count, self.each = x.shape[:2]
        else:
            self.count, self.each = len(tokens_per_sample), 0
            self.offsets = tokens_per_sample.new_zeros(self.count + 1)
            torch.cumsum(tokens_per_sample, 0, out=self.offsets[1:])
        self.attributes = 0 if rows_BN is None else rows_BN.shape[1]
        # Products of two bf16 or fp16 numbers are exact in fp32; a sum of routers is no bf16.
        exact = x.dtype == w_A2ED.dtype and self.attributes <= 1
        dtype = x.dtype if exact else torch.float32
        # Registers decide: a number of fp32 is split into three of tf32, and with many experts the
        # scores of a token alone take many.
        experts = block_size(w_A2ED.shape[2], 8)
        many = experts > 16
        widest = 32 if many else 64 if dtype == torch.float32 else 128
        dim = block_size(min(x.shape[-1], widest))
        if many:
            warps = 16 if experts > 32 else 8
        else:  # In fewer threads the same tokens take fewer instructions, but more registers.
            warps = 2 if experts <= 8 and dim <= 64 and dtype != torch.float32 else 4
        self.tile = 32 if many else 128 if x.shape[-1] <= 64 else 64
        self.blocks: dict[str, Any] = {
            "TOKENS": self.tile,
            "SAMPLES": 1 if self.offsets is None else block_size(self.count, 2),
            "EXPERTS": experts,
        }
        self.scoring: dict[str, Any] = {
            "DIM": dim,
            "ATTRIBUTES": self.attributes,
            "DOT": triton_dtype(dtype),
            "num_warps": warps,
        }
        # The backward's products are of fp32 numbers. Of the blocks that spill nothing with any
        # Triton these have the fewest instructions a token; its chunks are multiples of the
        # forward's tile, and so of these. Where x is in half precision, one product of tf32 has
        # digits enough for dx and dw.
        is_half = x.dtype != torch.float32
        tokens, warps, stages = 16, 4, 1
        if many:
            warps = 8
        elif is_half:
            tokens, warps = 64, 4 if dim <= 64 else 8
        elif dim <= 32:
            capability = compute_capability(x.device)
            tokens = 64 if capability >= 100 else 16  # of which Triton 3.9 spills with few
            # With one Triton 3.4 and 3.6 spill.
            stages = 2 if capability >= 100 or capability in (86, 89) else 1
        self.backward: dict[str, Any] = {
            "TOKENS": tokens,
            "DIM": dim,
            "ATTRIBUTES": self.attributes,
            "PRECISION": "tf32" if is_half else "tf32x3",
            "num_warps": warps,
            "num_stages": stages,
        }

    def programs(self, block: int) -> tuple[int, int]:
        """The first two axes of a grid whose programs have at most ``block`` tokens of a sample."""
        if not self.tokens:
            return 0, 0
        if self.offsets is None:
            return -(-self.each // block), self.count
        return most_tiles(self.tokens, block, self.count), 1


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w, b, rows, counts, _, seed, keep_slopes = inputs
    _, indices, gates, order, offsets, tiles, chosen, slopes = output
    ctx.mark_non_differentiable(indices, order, offsets, tiles, chosen, slopes)
    ctx.set_materialize_grads(False)
    ctx.lacks_slopes = seed is not None and not keep_slopes
    ctx.save_for_backward(chosen, gates, slopes if keep_slopes else None, x, w, b, rows, counts)


def _backward(
    ctx: Any, dlogits: Any, _: Any, dgates: Any, *__: Any, passed: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    if dlogits is None and dgates is None:
        return passed, *[None] * 7
    if ctx.lacks_slopes:
        raise RuntimeError(
            "dmoe_layer::fused_route: got keep_slopes=False with a seed, so that the gradient of "
            "the noise is not known. Call it with keep_slopes=True to differentiate it."
        )
    return *_route_backward(dlogits, dgates, *ctx.saved_tensors, passed), *[None] * 5


_route = differentiable(_fused_route, _save_for_backward, _backward, passes_first=True)
_route_backward = refuse_double_backward(fused_route_backward)
