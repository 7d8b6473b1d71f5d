"""Dispatch and combine: sorts tokens by expert, and sums the experts' rows back into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of one expert computed together: enough for the GEMM to run at full speed, few enough for
# the hidden layer of one block to stay in the processor's cache at the widths of a 3D U-Net.
BLOCK_ROWS = 8192


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` of the sorted order, all of one expert."""

    expert: int
    start: int
    stop: int


class Dispatch:
    """Where the T·k (token, slot) pairs of a routing go.

    Attributes:
        order: (T·k,) int64; ``order[r]`` = t·k + j is the pair in sorted row r. Stable, so that
            rows of one expert stand in the order of the tokens.
        token_of_row: (T·k,) int64, ``order // k``.
        rows_TK: (T, k) int64, the inverse: the row of each pair.
        blocks: contiguous rows of one expert each, at most ``BLOCK_ROWS``.
    """

    def __init__(self, expert_indices_TK: Tensor, n_experts: int) -> None:
        pairs = expert_indices_TK.numel()
        # A byte sorts several times faster than an int64, and holds an expert's number.
        small = torch.uint8 if n_experts <= 256 else torch.int32
        flat = expert_indices_TK.reshape(-1)
        self.order = flat.to(small).argsort(stable=True)
        self.token_of_row = self.order // expert_indices_TK.shape[1]
        rows = torch.empty_like(self.order)
        rows[self.order] = torch.arange(pairs, device=rows.device)
        self.rows_TK = rows.view(expert_indices_TK.shape)
        self.blocks = list(_blocks(torch.bincount(flat, minlength=n_experts).tolist()))

    def combine(self, rows_RD: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        """Each token's weighted sum of its k rows: (T, D). No atomics, so deterministic."""
        if weights_TK is not None:
            weights_TK = weights_TK.to(rows_RD.dtype)
        return F.embedding_bag(self.rows_TK, rows_RD, per_sample_weights=weights_TK, mode="sum")


def _blocks(counts: list[int]) -> Iterator[Block]:
    start = 0
    for expert, count in enumerate(counts):
        stop = start + count
        while start < stop:
            yield Block(expert, start, min(start + BLOCK_ROWS, stop))
            start = min(start + BLOCK_ROWS, stop)
