"""The router: scores every token with its sample's own router, and keeps the k best experts."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attributes import as_attributes, as_sizes, check_attributes, per_token
from .lazy import LazyDim
from .operators import (
    MIN_GEMM_ROWS,
    draw_seed,
    refuse_double_backward,
    refuse_functional_derivatives,
    seeded_generator,
)
from .options import check_choice, check_count, check_device, describe

UNKNOWN = ("error", "average", "learned")
NOISE = ("train", "always", "never")


class Routing(NamedTuple):
    """What one call routed. Plain tensors, never detached; T counts the tokens inside the mask.

    Attributes:
        expert_indices: (T, k) int64, the experts of each token, best first.
        gates: (T, k), the softmax over those k scores; sums to 1. At least fp32.
        logits: (T, E), the scores that were ranked, noise included. At least fp32.
        attributes: (T,) int64, each token's attribute value (-1: unknown), (T, n) for n
            attributes, or None where no attributes were given.

    Tokens stand sample after sample, in the order of ``x`` with the channels moved last.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> layer, x = DMoE(16, attribute_sizes=3), torch.randn(2, 10, 16)
        >>> y, routing = layer(x, torch.tensor([0, 2]), return_routing=True)
        >>> routing.attributes
        tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """

    expert_indices: Tensor
    gates: Tensor
    logits: Tensor
    attributes: Tensor | None = None


class AttributeRouter(LazyDim):
    """Noisy top-k gating with one router for each attribute value.

    For a token x of a sample whose attribute has value a (Oh et al., ICML 2025,
    arXiv:2502.00619, after Shazeer et al., arXiv:1701.06538)::

        R(x) = x·W_a + b_a + N(0,1) * softplus(x·W'_a + b'_a)      noise as ``noise`` says
        K(x) = softmax over the k largest of R(x)

    All routers stand in two parameters, ``w_A2ED`` and ``b_A2E`` (index 0 of the axis of length
    2: the clean weights W, index 1: the noise weights W'), so that the value that is absent from
    a batch still gets a zero gradient. Scores, softmax and gates are at least fp32, also under
    autocast.

    Args:
        dim: width D of a token; None learns it from the first input or a state_dict.
        n_experts: E.
        k: experts a token.
        attribute_sizes: None (one router for all), an int (one attribute with that many
            values) or a tuple (several attributes; their routers' scores, clean and noise, are
            summed).
        unknown: what the attribute value -1 does: "error" raises, "average" averages that
            attribute's routers' scores, "learned" has a router of its own.
        noise: "train" (in training only), "always" (what the paper's released code does),
            "never".
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: for an option that does not fit, at construction.
        MissingAttributesError: if called without attributes though ``attribute_sizes`` is set.

    Example:
        >>> import torch
        >>> from dmoe_layer import AttributeRouter
        >>> router = AttributeRouter(16, n_experts=8, k=2, attribute_sizes=3)
        >>> routing = router(torch.randn(4, 10, 16), torch.tensor([0, 2, 2, 1]))
        >>> routing.expert_indices.shape, routing.gates.shape, routing.logits.shape
        (torch.Size([40, 2]), torch.Size([40, 2]), torch.Size([40, 8]))
    """

    _dim_from = "w_A2ED"
    w_A2ED: Tensor
    b_A2E: Tensor

    def __init__(
        self,
        dim: int | None,
        n_experts: int = 8,
        k: int = 2,
        *,
        attribute_sizes: int | tuple[int, ...] | None = None,
        unknown: str = "error",
        noise: str = "train",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim is not None:
            check_count("dim", dim)
        check_count("n_experts", n_experts)
        check_count("k", k)
        if k > n_experts:
            raise ValueError(f"k: got {k}, expected at most n_experts={n_experts}.")
        check_choice("unknown", unknown, UNKNOWN)
        check_choice("noise", noise, NOISE)
        self.n_experts, self.k, self.unknown, self.noise = n_experts, k, unknown, noise
        self.sizes = as_sizes(attribute_sizes)
        self.attribute_sizes = attribute_sizes
        self._create_parameters(dim, device, dtype)

    def _shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        routers = sum(self.sizes or (1,))
        if self.sizes is not None and self.unknown == "learned":
            routers += len(self.sizes)
        return {"w_A2ED": (routers, 2, self.n_experts, dim), "b_A2E": (routers, 2, self.n_experts)}

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws weights and biases as ``nn.Linear`` does; nothing if the width is not known."""
        if self.dim is None:
            return
        bound = 1 / math.sqrt(self.w_A2ED.shape[-1])
        nn.init.uniform_(self.w_A2ED, -bound, bound, generator)
        nn.init.uniform_(self.b_A2E, -bound, bound, generator)

    def initialize_parameters(
        self, x: Tensor, attributes: Any = None, *, tokens_per_sample: Tensor | None = None
    ) -> None:
        """Learns ``dim`` from the first input, once nothing is wrong with it."""
        self.check(x, self._check_input(x, tokens_per_sample), attributes)
        self._learn_dim(x.shape[-1])

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, n_experts={self.n_experts}, k={self.k}, "
            f"attribute_sizes={self.attribute_sizes}, unknown={self.unknown!r}, "
            f"noise={self.noise!r}"
        )

    def forward(
        self,
        x: Tensor,
        attributes: Any = None,
        *,
        tokens_per_sample: Tensor | None = None,
        fused: bool = False,
    ) -> Any:
        """Routes every token.

        Args:
            x: (B, T, D); or, with ``tokens_per_sample``, the samples' tokens one after another,
                (sum of the counts, D).
            attributes: integers, (B,) or (B, n); a batch of 1 or a scalar applies to every
                sample; -1 is unknown.
            tokens_per_sample: (B,) int64, how many tokens of a ragged batch each sample has.
            fused: by the Triton kernel, which also begins the dispatch (:class:`DMoE` asks).

        Returns:
            Routing, over all tokens sample after sample; if ``fused``, also the order of the
            (token, slot) pairs by expert, (T·k,), and the experts' offsets in it, (E + 1,).
        """
        batch = self._check_input(x, tokens_per_sample)
        refuse_functional_derivatives(x)
        values_BN = self.check(x, batch, attributes)
        noisy = self.noise == "always" or (self.noise == "train" and self.training)
        seed = draw_seed() if noisy else None
        w_A2ED, b_A2E = self._table(self.w_A2ED), self._table(self.b_A2E)
        rows_BN = None if self.sizes is None or values_BN is None else self._rows(values_BN)
        inputs = (x, w_A2ED, b_A2E, rows_BN, tokens_per_sample)
        if fused:
            from .fused_router import fused_route

            logits_TE, indices_TK, gates_TK, *dispatch = fused_route(*inputs, self.k, seed)
        else:
            logits_TE = router_logits(*inputs, seed)
            scores_TK, indices_TK = logits_TE.topk(self.k, dim=-1)
            gates_TK, dispatch = F.softmax(scores_TK, dim=-1), []
        attributes_T = (
            None
            if values_BN is None
            else per_token(values_BN, logits_TE.shape[0], tokens_per_sample)
        )
        routing = Routing(indices_TK, gates_TK, logits_TE, attributes_T)
        return (routing, *dispatch) if fused else routing

    def check(self, x: Tensor, batch: int, attributes: Any) -> Tensor | None:
        """The attribute values of ``batch`` samples, (B, n) on ``x``'s device, or an error."""
        if attributes is None and self.sizes is None:
            return None
        given = None if attributes is None else as_attributes(attributes)
        values, bounds = (None, None) if given is None else given
        return check_attributes(x, batch, values, bounds, list(self.sizes or ()), self.unknown)

    def _check_input(self, x: Tensor, tokens_per_sample: Tensor | None) -> int:
        """The batch size, or an error."""
        ragged = tokens_per_sample is not None
        form = f"({'tokens' if ragged else 'B, T'}, {self.dim or 'dim'})"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x: got {describe(x)}, expected a floating-point tensor {form}.")
        if (
            x.ndim != (2 if ragged else 3)
            or x.shape[-1] == 0
            or (self.dim is not None and self.dim != x.shape[-1])
        ):
            raise ValueError(f"x: got {describe(x)}, expected {form}.")
        check_device(x, self.w_A2ED, "router")
        return (x if tokens_per_sample is None else tokens_per_sample).shape[0]

    def _table(self, parameter: Tensor) -> Tensor:
        """All rows that a value can point to: every value's router, then the unknown ones."""
        if self.unknown != "average" or self.sizes is None:
            return parameter
        parameter = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        means = [part.mean(dim=0, keepdim=True) for part in parameter.split(self.sizes)]
        return torch.cat([parameter, *means])

    def _rows(self, values_BN: Tensor) -> Tensor:
        """The row of the table for each sample and attribute: its value's, or its unknown's."""
        sizes = self.sizes or ()
        starts = (0, *itertools.accumulate(sizes))
        columns = [
            torch.where(values_B < 0, starts[-1] + i, values_B + starts[i])
            for i, values_B in enumerate(values_BN.unbind(dim=1))
        ]
        return torch.stack(columns, dim=1)


# One operator with its own backward: autograd's would keep the scores, the noise and their
# intermediate products, 5·T·E numbers, as much as x itself at the widths of a 3D U-Net, and each
# sample's weights, many times x where a sample has few tokens. This one keeps x and a seed beside
# the parameters, and draws the same noise again.
@torch.library.custom_op("dmoe_layer::router_logits", mutates_args=())
def router_logits(
    x: Tensor,
    w_A2ED: Tensor,
    b_A2E: Tensor,
    rows_BN: Tensor | None,
    tokens_per_sample: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """Scores of every token, (T, E): clean, plus noise when a seed is given.

    Sample b's router is the sum of the table's rows ``rows_BN[b]``; without rows, all samples
    have the table's only one.
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
    """Gradients of x, w and b."""
    with torch.autocast(x.device.type, enabled=False):
        tokens = _Tokens(x, w_A2ED, rows_BN, tokens_per_sample)
        w_B2ED, b_B2E = tokens.routers(w_A2ED), tokens.routers(b_A2E)
        dscores = [tokens.by_sample(dlogits_TE)]
        if seed is not None:
            # softplus' is the logistic function.
            slope_TE = tokens.project(w_B2ED[:, 1], b_B2E[:, 1]).sigmoid_()
            dnoise_TE = slope_TE.mul_(_noise(dlogits_TE, seed)).mul_(dlogits_TE)
            dscores.append(tokens.by_sample(dnoise_TE))
        dw_A2ED, db_A2E = (torch.zeros_like(p, dtype=tokens.dtype) for p in (w_A2ED, b_A2E))
        dx_BTD = torch.zeros_like(tokens.x_BTD)
        for i, dscores_BTE in enumerate(dscores):
            tokens.add_to_routers(dw_A2ED[:, i], dscores_BTE.mT @ tokens.x_BTD)
            tokens.add_to_routers(db_A2E[:, i], dscores_BTE.sum(dim=1))
            dx_BTD.baddbmm_(dscores_BTE, w_B2ED[:, i])
        dx = tokens.packed(dx_BTD).to(x.dtype).reshape(x.shape)
        return dx, dw_A2ED.to(w_A2ED.dtype), db_A2E.to(b_A2E.dtype)


@router_logits_backward.register_fake
def _(dlogits_TE, x, w_A2ED, b_A2E, rows_BN, tokens_per_sample, seed):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, w_A2ED, b_A2E))


class _Tokens:
    """The tokens of a batch as (B, T, D) in the precision of the scores, one matmul for all.

    Where all samples share a router they are one long sample. A ragged batch is padded with zeros
    to its longest sample, and unpadded on the way out.
    """

    def __init__(
        self, x: Tensor, w_A2ED: Tensor, rows_BN: Tensor | None, tokens_per_sample_B: Tensor | None
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
        """(A, ...) to each sample's sum of its rows, (B, ...).

        Rows are picked and added, never multiplied with a one-hot matrix: a NaN of one value's
        router must not reach the others as 0 * NaN. Nor may it on the way back.
        """
        table = table.to(self.dtype)
        if self.rows_BN is None:
            return table
        picked = table.index_select(0, self.rows_BN.reshape(-1))
        return picked.unflatten(0, self.rows_BN.shape).sum(dim=1)

    def add_to_routers(self, total: Tensor, values_B: Tensor) -> None:
        """The way back: adds each sample's values to all of its rows."""
        if self.rows_BN is None:
            total += values_B
        else:
            for rows_B in self.rows_BN.unbind(dim=1):
                total.index_add_(0, rows_B, values_B)

    def by_sample(self, values: Tensor) -> Tensor:
        """(T, any) to (B, longest, any)."""
        if self.positions_T is not None:
            padded = values.new_zeros(self.batch * self.longest, values.shape[-1])
            values = padded.index_copy_(0, self.positions_T, values)
        return values.reshape(self.batch, self.longest, values.shape[-1])

    def packed(self, values: Tensor) -> Tensor:
        """(B, longest, any) to (T, any)."""
        values = values.reshape(self.batch * self.longest, values.shape[-1])
        return values if self.positions_T is None else values.index_select(0, self.positions_T)

    def project(self, w_BED: Tensor, b_BE: Tensor) -> Tensor:
        return self.packed(torch.baddbmm(b_BE[:, None], self.x_BTD, w_BED.mT))


def _score_dtype(x: Tensor, w_A2ED: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, w_A2ED.dtype), torch.float32)


def _noise(like_TE: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(like_TE).normal_(generator=seeded_generator(like_TE.device, seed))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
    return *router_logits_backward(dlogits_TE, *ctx.saved_tensors), None, None, None


router_logits.register_autograd(_backward, setup_context=_save_for_backward)
refuse_double_backward(router_logits_backward)
