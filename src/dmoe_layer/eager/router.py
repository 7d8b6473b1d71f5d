"""The router in plain PyTorch: one matrix product scores the tokens of all samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import differentiable, refuse_double_backward, seeded_generator
from ..tensors import RouterWeights, Routing
from .gemm import MIN_GEMM_ROWS


def route(
    x: Tensor,
    weights: RouterWeights,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    k: int,
    seed: Tensor | None,
) -> tuple[Routing, Tensor]:
    """Scores every token, and selects its k best experts.

    Args:
        x: (B, T, D). With ``tokens_per_sample`` it is (sum of the counts, D).
        weights: The table of routers.
        rows_BN: The router of sample b is the sum of the rows ``rows_BN[b]`` of the table. With
            None all samples have the only router of the table.
        tokens_per_sample: The number of tokens of each sample of a ragged batch, (B,) int64.
        k: The number of experts of a token.
        seed: The seed of the noise. None stands for no noise.

    Returns:
        The routing, without attributes, and the plan, which in this backend is the experts'
            indices.
    """
    logits_TE = _logits(x, *weights, rows_BN, tokens_per_sample, seed)
    scores_TK, indices_TK = logits_TE.topk(k, dim=-1)
    return Routing(indices_TK, F.softmax(scores_TK, dim=-1), logits_TE), indices_TK


# One operator with its own backward. Autograd would save the scores, the noise and intermediate
# products, 5·T·E numbers, as much as x itself at the widths of a 3D U-Net. It would also save each
# sample's weights, which are many times x if a sample has few tokens. This operator saves x, a seed
# and the parameters, and draws the same noise again.
@torch.library.custom_op("dmoe_layer::router_logits", mutates_args=())
def router_logits(
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """The scores of every token, (T, E), with noise if there is a seed.

    The router of sample b is the sum of the rows ``rows_BN[b]`` of the table. With None all samples
    have the only router of the table.
    """
    with torch.autocast(x.device.type, enabled=False):
        tokens = _Tokens(x, w_A2ED, rows_BN, tokens_per_sample)
        w_B2ED, b_B2E = tokens.routers(w_A2ED), tokens.routers(b_A2E)
        clean_TE = tokens.project(w_B2ED[:, 0], b_B2E[:, 0])
        if seed is None:
            return clean_TE
        scale_TE = F.softplus(tokens.project(w_B2ED[:, 1], b_B2E[:, 1]))
        return clean_TE.addcmul_(_noise(clean_TE, seed), scale_TE)


@router_logits.register_fake
def _(x, w_A2ED, b_A2E, rows_BN, tokens_per_sample, seed):  # type: ignore[no-untyped-def]
    tokens = x.shape[0] * x.shape[1] if tokens_per_sample is None else x.shape[0]
    return x.new_empty((tokens, w_A2ED.shape[2]), dtype=_score_dtype(x, w_A2ED))


@torch.library.custom_op("dmoe_layer::router_logits_backward", mutates_args=())
def router_logits_backward(
    dlogits_TE: Tensor,
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, w and b."""
    with torch.autocast(x.device.type, enabled=False):
        tokens = _Tokens(x, w_A2ED, rows_BN, tokens_per_sample)
        w_B2ED, b_B2E = tokens.routers(w_A2ED), tokens.routers(b_A2E)
        # Clean scores, then the noise's scale, side by side: one product for each gradient.
        scores, n_experts = 1 if seed is None else 2, w_A2ED.shape[2]
        dscores_TSE = dlogits_TE.new_empty((dlogits_TE.shape[0], scores, n_experts))
        dscores_TSE[:, 0] = dlogits_TE
        if seed is not None:
            # softplus' is the logistic function.
            slope_TE = tokens.project(w_B2ED[:, 1], b_B2E[:, 1]).sigmoid_()
            slope_TE.mul_(_noise(dlogits_TE, seed))
            torch.mul(slope_TE, dlogits_TE, out=dscores_TSE[:, 1])
            del slope_TE  # before x's gradient, the largest of all, is there
        dscores_BTX = tokens.by_sample(dscores_TSE.flatten(1))
        # Not zeros_like, which lays out as its input is.
        dw_A2ED, db_A2E = (p.new_zeros(p.shape, dtype=tokens.dtype) for p in (w_A2ED, b_A2E))
        dw_BXD = dscores_BTX.mT @ tokens.x_BTD
        db_BX = dscores_BTX.sum(dim=1)
        shape = (scores, n_experts)
        tokens.add_to_routers(dw_A2ED[:, :scores], dw_BXD.unflatten(1, shape))
        tokens.add_to_routers(db_A2E[:, :scores], db_BX.unflatten(1, shape))
        dx_BTD = dscores_BTX @ w_B2ED[:, :scores].flatten(1, 2)
        dx = tokens.packed(dx_BTD).to(x.dtype).reshape(x.shape)
        return dx, dw_A2ED.to(w_A2ED.dtype), db_A2E.to(b_A2E.dtype)


@router_logits_backward.register_fake
def _(dlogits_TE, x, w_A2ED, b_A2E, rows_BN, tokens_per_sample, seed):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, w_A2ED, b_A2E))


class _Tokens:
    """The tokens of a batch as (B, T, D) in the precision of the scores, for one matmul.

    If all samples share a router, they count as one long sample. A ragged batch is padded with
    zeros to its longest sample, and its results are unpadded.
    """

    def __init__(
        self,
        x: Tensor,
        w_A2ED: Tensor,
        rows_BN: Tensor | None,
        tokens_per_sample_B: Tensor | None,
    ) -> None:
        self.dtype = _score_dtype(x, w_A2ED)
        self.rows_BN = rows_BN
        self.positions_T: Tensor | None = None
        counts_B = tokens_per_sample_B
        if counts_B is not None and int(counts_B.sum()) != len(x):
            raise ValueError(
                f"tokens_per_sample: got a sum of {int(counts_B.sum())}, expected x's {len(x)} "
                "tokens."
            )
        if rows_BN is None:
            x_TD = x.to(self.dtype).reshape(-1, x.shape[-1])
            self.batch, self.longest = 1, max(len(x_TD), MIN_GEMM_ROWS)
            if len(x_TD) < MIN_GEMM_ROWS:
                self.positions_T = torch.arange(len(x_TD), device=x.device)
            self.x_BTD = self.by_sample(x_TD)
        elif counts_B is None:
            self.batch, self.longest = x.shape[:2]
            self.x_BTD = x.to(self.dtype)
        else:
            self.batch = len(counts_B)
            self.longest = max(int(counts_B.max()) if self.batch else 0, MIN_GEMM_ROWS)
            # Each sample's tokens move from their packed place to the start of its padded row.
            starts_B = torch.arange(self.batch, device=x.device) * self.longest
            shift_B = starts_B - (counts_B.cumsum(0) - counts_B)
            self.positions_T = torch.arange(len(x), device=x.device)
            self.positions_T += shift_B.repeat_interleave(counts_B, output_size=len(x))
            self.x_BTD = self.by_sample(x.to(self.dtype))

    def routers(self, table: Tensor) -> Tensor:
        """Sums the rows of the table, (A, ...), that each sample has: (B, ...).

        Rows are picked and added, and never multiplied with a one-hot matrix. A NaN in the router
        of one value must not reach the others as 0 * NaN, in backward neither.
        """
        table = table.to(self.dtype)
        if self.rows_BN is None:
            return table
        picked = table.index_select(0, self.rows_BN.reshape(-1))
        return picked.unflatten(0, self.rows_BN.shape).sum(dim=1)

    def add_to_routers(self, total: Tensor, values_B: Tensor) -> None:
        """Adds each sample's values to all of its rows, for backward."""
        if self.rows_BN is None:
            total += values_B
        else:
            for rows_B in self.rows_BN.unbind(dim=1):
                total.index_add_(0, rows_B, values_B)

    def by_sample(self, values: Tensor) -> Tensor:
        """Pads (T, any) to (B, longest, any)."""
        if self.positions_T is not None:
            padded = values.new_zeros(self.batch * self.longest, values.shape[-1])
            values = padded.index_copy_(0, self.positions_T, values)
        return values.reshape(self.batch, self.longest, values.shape[-1])

    def packed(self, values: Tensor) -> Tensor:
        """Unpads (B, longest, any) to (T, any)."""
        values = values.reshape(self.batch * self.longest, values.shape[-1])
        return values if self.positions_T is None else values.index_select(0, self.positions_T)

    def project(self, w_BED: Tensor, b_BE: Tensor) -> Tensor:
        return self.packed(torch.baddbmm(b_BE[:, None], self.x_BTD, w_BED.mT))


def _score_dtype(x: Tensor, w_A2ED: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, w_A2ED.dtype), torch.float32)


def _noise(like_TE: Tensor, seed: Tensor) -> Tensor:
    # Numbers are drawn in the order of memory, so forward and backward need the same layout.
    noise_TE = like_TE.new_empty(like_TE.shape)
    return noise_TE.normal_(generator=seeded_generator(like_TE.device, seed))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
    return *_logits_backward(dlogits_TE, *ctx.saved_tensors), None, None, None


_logits = differentiable(router_logits, _save_for_backward, _backward)
_logits_backward = refuse_double_backward(router_logits_backward)
