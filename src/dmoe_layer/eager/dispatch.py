"""Dispatch and combine: sorts tokens by expert, and sums the experts' rows back into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gemm import round_rows


class Block(NamedTuple):
    """The rows ``start`` to ``stop`` of the sorted order, all of one expert.

    A product reads up to ``padded_stop``, into the rows of the next block or beyond the last row.
    """

    expert: int
    start: int
    stop: int
    padded_stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def padded(self) -> slice:
        return slice(self.start, self.padded_stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


class Dispatch:
    """Sorts the T·k (token, slot) pairs of some tokens by expert, into rows.

    Args:
        expert_indices_TK: The experts of each token, (T, k) int64.
        n_experts: The number of experts, E.
        block_rows: The most rows of one expert that are computed together.
        least_rows: The least rows of a product (``gemm.round_rows``).

    Attributes:
        order: ``order[r]`` = t·k + j is the pair in the sorted row r, (T·k,) int64. The sort is
            stable, so that the rows of an expert have the order of the tokens.
        token_of_row: ``order // k``, (T·k,) int64.
        blocks: All rows in their order, cut by expert and then into parts of equal size.
    """

    def __init__(
        self, expert_indices_TK: Tensor, n_experts: int, block_rows: int, least_rows: int
    ) -> None:
        # A byte sorts several times faster than an int64, and most often holds the keys.
        keys = expert_indices_TK.reshape(-1).to(torch.uint8 if n_experts <= 256 else torch.int32)
        sorted_keys, self.order = keys.sort(stable=True)
        self._shape = expert_indices_TK.shape
        self.token_of_row = self.order // self._shape[1]
        counts = torch.bincount(sorted_keys, minlength=n_experts).tolist()
        self.blocks = list(_blocks(counts, block_rows, least_rows))

    def combine(self, rows_RD: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the k rows of each token, deterministic since without atomics."""
        rows_R = torch.arange(len(self.order), device=self.order.device)
        weights_TK = weights_TK.to(rows_RD.dtype)
        return F.embedding_bag(
            self.by_pair(rows_R), rows_RD, per_sample_weights=weights_TK, mode="sum"
        )

    def by_pair(self, values_R: Tensor) -> Tensor:
        """Puts one value per row back into the order of the pairs: (T, k)."""
        return torch.empty_like(values_R).scatter_(0, self.order, values_R).view(self._shape)


def _blocks(counts: list[int], block_rows: int, least_rows: int) -> Iterator[Block]:
    start = 0
    for expert, count in enumerate(counts):
        parts = -(-count // block_rows)
        for i in range(parts):
            first, stop = start + count * i // parts, start + count * (i + 1) // parts
            yield Block(expert, first, stop, first + round_rows(stop - first, least_rows))
        start += count
