"""Dispatch and combine: sorts tokens by expert, and sums the experts' rows back into tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of one expert computed together: few enough for the hidden layer of one block to stay in the
# processor's cache at the widths of a 3D U-Net, and so many that threads, which wait for each other
# after every operation on a block, do so seldom: on a busy machine each such wait is long.
BLOCK_ROWS = 16384


class Block(NamedTuple):
    """Rows ``start`` to ``stop`` of the sorted order, all of one expert."""

    expert: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        return self.stop - self.start


class Chunk(NamedTuple):
    """Tokens that are computed and combined together: all of their rows stand side by side."""

    tokens: slice
    rows: slice
    blocks: list[Block]


class Dispatch:
    """Where the T·k (token, slot) pairs of a routing go.

    Rows are sorted by chunk, then by expert, so that the experts' rows of one chunk, and not of
    all tokens, wait to be combined: a short buffer that is used again costs neither the memory
    nor the system's time to hand out fresh pages of it. A chunk holds a full block of every
    expert, if all have the same load.

    Attributes:
        order: (T·k,) int64; ``order[r]`` = t·k + j is the pair in sorted row r. Stable, so that
            rows of one expert stand in the order of the tokens.
        token_of_row: (T·k,) int64, ``order // k``.
        rows_TK: (T, k) int64, the inverse: the row of each pair.
        chunks: the tokens in order, with the blocks that they make.
    """

    def __init__(self, expert_indices_TK: Tensor, n_experts: int) -> None:
        tokens, k = expert_indices_TK.shape
        step = max(BLOCK_ROWS * n_experts // k, 1)
        starts = range(0, tokens, step)
        # A byte sorts several times faster than an int64, and most often holds the keys.
        small = torch.uint8 if len(starts) * n_experts <= 256 else torch.int32
        keys_TK = expert_indices_TK.to(small, copy=True, memory_format=torch.contiguous_format)
        for i, start in enumerate(starts):
            keys_TK[start : start + step] += i * n_experts
        keys = keys_TK.view(-1)
        self.order = keys.argsort(stable=True)
        self.token_of_row = self.order // k
        rows = torch.empty_like(self.order)
        rows.scatter_(0, self.order, torch.arange(len(rows), device=rows.device))
        self.rows_TK = rows.view(tokens, k)
        counts = torch.bincount(keys, minlength=len(starts) * n_experts).tolist()
        self.chunks = [
            Chunk(
                slice(start, min(start + step, tokens)),
                slice(start * k, min(start + step, tokens) * k),
                list(_blocks(counts[i * n_experts : (i + 1) * n_experts], start * k)),
            )
            for i, start in enumerate(starts)
        ]

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in the order of their rows: of one expert each, at most ``BLOCK_ROWS``."""
        return [block for chunk in self.chunks for block in chunk.blocks]

    def combine(self, chunk: Chunk, rows_RD: Tensor, gates_TK: Tensor | None = None) -> Tensor:
        """For a chunk's tokens, the weighted sum of their k rows. No atomics: deterministic."""
        rows_TK = self.rows_TK[chunk.tokens] - chunk.rows.start
        if gates_TK is not None:
            gates_TK = gates_TK[chunk.tokens].to(rows_RD.dtype)
        return F.embedding_bag(rows_TK, rows_RD, per_sample_weights=gates_TK, mode="sum")


def _blocks(counts: list[int], start: int) -> Iterator[Block]:
    """Each expert's rows from ``start`` on, cut into equal parts."""
    for expert, count in enumerate(counts):
        parts = -(-count // BLOCK_ROWS)
        for i in range(parts):
            yield Block(expert, start + count * i // parts, start + count * (i + 1) // parts)
        start += count
