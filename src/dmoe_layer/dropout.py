"""Dropout that backward can draw again from a seed, and that costs little on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import seeded_generator


def in_steps(p: float, seed: Tensor | None) -> tuple[int, float]:
    """How many of 65536 steps are dropped, and the scale of what is kept. Without a seed: none."""
    dropped = 0 if seed is None else round(p * 2**16)
    # Of p = 1 nothing is left to scale.
    return dropped, 2**16 / (2**16 - dropped) if dropped < 2**16 else 1.0


# Entries that are drawn at once, few enough for their bits to stay in the cache.
_ENTRIES = 2**18


class Dropout:
    """Zeroes entries of block after block of rows, the same ones whenever the seed is the same.

    A random int64 holds four 16-bit numbers, each compared with a threshold: a tenth of the time
    of ``F.dropout``, which draws a float an entry. The price: p is rounded to 1/65536, and
    ``scale`` makes up for the p that is really used. To scale what is kept is left to the caller,
    who has a factor for each row anyway: the gate.
    """

    def __init__(self, p: float, seed: Tensor | None, device: torch.device) -> None:
        dropped, self.scale = in_steps(p, seed)
        self.all_dropped = dropped == 2**16
        self.threshold = dropped - 2**15
        self.generator = seeded_generator(device, seed) if seed is not None and dropped else None
        self._words = torch.empty(0, dtype=torch.int64, device=device)
        self._kept = torch.empty(0, device=device)

    def __call__(self, rows_RD: Tensor) -> Tensor:
        """Zeroes in place; the rows stand without gaps."""
        if self.generator is None:
            return rows_RD
        if self.all_dropped:
            return rows_RD.zero_()
        entries = rows_RD.view(-1)
        for part in entries.split(_ENTRIES):
            self._drop(part)
        return rows_RD

    def _drop(self, entries: Tensor) -> None:
        if self._kept.shape[0] < entries.shape[0] or self._kept.dtype != entries.dtype:
            self._kept = torch.empty_like(entries)
            self._words = self._words.new_empty((entries.shape[0] + 3) // 4)
        words = self._words[: (entries.shape[0] + 3) // 4]
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)
        # Compared in place, then converted: bools would cost several times as much.
        kept = self._kept[: entries.shape[0]].copy_(bits.ge_(self.threshold)[: entries.shape[0]])
        entries.mul_(kept)
