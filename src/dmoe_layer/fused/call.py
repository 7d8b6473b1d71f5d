"""One call of the experts' kernels: its inputs as every launch needs them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..dropout import in_steps
from ..tensors import ExpertOptions, ExpertWeights
from .kernels import sums
from .launch import block_size, contiguous, gemm_precision, launch
from .router import SortedPairs

# Programs that fill a GPU of 132 multiprocessors a few times.
PROGRAMS = 512


class BackwardOutputs(NamedTuple):
    """What a backward launch leaves.

    Attributes:
        slots: (R, D), each pair's share of dx, pair t·k + j in row t·k + j.
        dgates: (T, k).
        weights: of w1, b1, w2 and b2; empty if they were not asked for.
    """

    slots: Tensor
    dgates: Tensor
    weights: list[Tensor]


class ExpertCall:
    """One call: its tensors, weights in the dtype they are computed in, and sizes as options."""

    def __init__(
        self,
        x_TD: Tensor,
        pairs: SortedPairs,
        gates_TK: Tensor,
        weights: ExpertWeights,
        options: ExpertOptions,
    ) -> None:
        activation, dropout, seed, self.dtype = options
        self.x, self.gates, self.order, self.offsets = contiguous(x_TD, gates_TK, *pairs)
        self.w1, self.w2 = (self._operand(p) for p in (weights.w1_EHD, weights.w2_EDH))
        self.b1, self.b2 = (
            None if b is None else self._operand(b) for b in (weights.b1_EH, weights.b2_ED)
        )
        self.parameter_dtype = weights.w1_EHD.dtype
        self.n_experts, self.dim, self.hidden = weights.w2_EDH.shape
        self.first_rows = weights.w1_EHD.shape[1]  # an expert's: H, or 2H of a gated one
        self.gated = ACTIVATIONS[activation].gated
        self.rows, self.k = len(self.order), gates_TK.shape[1]
        self.relu = activation == "relu"
        dropped, scale = in_steps(dropout, seed)
        self.drop_args = (0 if seed is None else int(seed), dropped, scale)
        # Options of the kernels, each for those that take it.
        self.drop_opts = {"DROP": dropped > 0}
        self.act_opts = {"ACTIVATION": activation, "GATED": self.gated}
        self.sizes = {"n_experts": self.n_experts, "dim": self.dim, "hidden": self.hidden}
        self.expert_opts = {"EXPERTS": block_size(self.n_experts, 2)}
        self.gemm_opts = {**self.expert_opts, "PRECISION": gemm_precision()}

    def _operand(self, parameter: Tensor) -> Tensor:
        return parameter.to(self.dtype).contiguous()

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(shape, dtype=dtype or self.dtype)

    def sum_slots(self, slots: Tensor) -> Tensor:
        """Each token's sum over its k slots, in x's dtype."""
        y = torch.empty_like(self.x)
        width = block_size(min(self.dim, 128))
        rows = 2048 // width
        launch(
            sums.sum_slots_kernel, (-(-len(y) // rows), -(-self.dim // width)), y,
            slots, y, len(y), dim=self.dim, K=self.k, ROWS=rows, DIM=width,
        )  # fmt: skip
        return y
