"""One call of the experts' kernels: its inputs as every launch needs them."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..dropout import in_steps
from ..tensors import ExpertWeights
from .kernels import sums
from .kernels.common import TILE
from .kernels.dropout import draw_kept_kernel
from .launch import block_size, contiguous, converted, gemm_precision, launch, offset_type
from .router import SortedPairs

# Programs that fill a GPU of 132 multiprocessors a few times.
PROGRAMS = 512


class BackwardOutputs(NamedTuple):
    """What a backward launch leaves.

    Attributes:
        dx, dgates: (T, D) and (T, k); None if they were not asked for.
        weights: of w1, b1, w2 and b2; empty if they were not asked for.
    """

    dx: Tensor | None
    dgates: Tensor | None
    weights: list[Tensor]


class ExpertCall:
    """One call: its tensors, its weights in the computation's dtype, its sizes as options."""

    def __init__(
        self,
        x_TD: Tensor,
        pairs: SortedPairs,
        gates_TK: Tensor,
        weights: ExpertWeights,
        activation: str,
        dropout: float,
        kept_RW: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self.x_dtype = dtype, x_TD.dtype
        # Whether autocast has chosen a smaller dtype than that of x, which the outputs have.
        self.autocast = x_TD.dtype.itemsize > dtype.itemsize
        # Rounded here once, as kernels would each time that they read them: in fp32 rows would take
        # twice the registers and the traffic.
        rounded = [None if t is None else converted(t, dtype) for t in (x_TD, *weights)]
        self.x, self.w1, self.b1, self.w2, self.b2 = contiguous(*rounded)
        self.gates, self.kept, self.order, self.offsets, self.tiles = contiguous(
            gates_TK, kept_RW, *pairs
        )
        self.parameter_dtype = weights.w1_EHD.dtype
        self.n_experts, self.dim, self.hidden = weights.w2_EDH.shape
        self.first_rows = weights.w1_EHD.shape[1]  # of an expert: H, or 2H if gated
        self.gated = ACTIVATIONS[activation].gated
        # Whether rows are whole vectors of 8 numbers; else each number's address takes registers.
        self.has_vectors = not (self.dim % 8 or self.hidden % 8)
        self.rows, self.k = len(self.order), gates_TK.shape[1]
        self.relu = activation == "relu"
        self.scale = in_steps(dropout, kept_RW)[1]
        # Options of the kernels, each for those that take it.
        self.act_opts = {"ACTIVATION": activation, "GATED": self.gated}
        self.sizes = {"dim": self.dim, "hidden": self.hidden, "K": self.k}
        self.gemm_opts = {"PRECISION": gemm_precision(dtype)}

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def programs(self, rows: int) -> int:
        """The number of programs for all tiles, if a program computes ``rows`` rows."""
        return self.tiles.shape[0] * (TILE.value // rows)

    def offset_opts(self, width: int) -> dict[str, Any]:
        """The option of kernels whose tensors have at most ``width`` numbers for each pair."""
        return {"OFFSET": offset_type(self.rows * width)}

    @property
    def wide_width(self) -> int:
        """The most numbers that the wide experts' kernels have for each pair."""
        # 2: hidden_backward_kernel writes a number for each pair and slice, after one for each.
        return max(self.first_rows, self.dim, 2)

    @cached_property
    def wide_offset_opts(self) -> dict[str, Any]:
        """The option of these kernels."""
        return self.offset_opts(self.wide_width)

    def pair_sums(self) -> tuple[Tensor, Tensor | None]:
        """Makes the memory for the pairs' rows, which are summed for each token.

        The first pair of each token has (T, D), which becomes the sum, in the dtype of the layer's
        x. The others have (T·(k - 1), D). So the sum needs no further memory.
        """
        tokens, others = self.x.shape[0], self.k - 1
        rest = self.empty(tokens * others, self.dim) if others else None
        return torch.empty_like(self.x, dtype=self.x_dtype), rest

    def sum_pairs(self, y: Tensor, rest: Tensor | None) -> Tensor:
        """Adds the rest to ``y``, and returns it."""
        if rest is None:
            return y
        width = block_size(min(self.dim, 128))
        rows = 2048 // width
        launch(
            sums.sum_pairs_kernel, (-(-y.shape[0] // rows), -(-self.dim // width)), y,
            rest, y, y.shape[0], dim=self.dim, REST=self.k - 1, **self.offset_opts(self.dim),
            ROWS=rows, DIM=width, num_warps=2,
        )  # fmt: skip
        return y


def draw_kept(order_R: Tensor, dim: int, dropout: float, seed: Tensor) -> Tensor:
    """Draws (R, ⌈D / 32⌉) int32: a bit for each output of a sorted pair, 0 if dropout zeros it."""
    (order_R,) = contiguous(order_R)
    kept = order_R.new_empty((order_R.shape[0], -(-dim // 32)))
    launch(
        draw_kept_kernel, (-(-kept.numel() // 256),), kept,
        kept, int(seed), in_steps(dropout, seed)[0], kept.numel(),
        OFFSET=offset_type(kept.numel()), BLOCK=256, num_warps=2,
    )  # fmt: skip
    return kept
