"""Dropout that backward can draw again from a seed, and that is fast on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .operators import seeded_generator


def in_steps(p: float, seed: Tensor | None) -> tuple[int, float]:
    """How many of 65536 steps are dropped (none without a seed), and the scale of the others."""
    dropped = 0 if seed is None else round(p * 2**16)
    # With p = 1 nothing is left to scale.
    return dropped, 2**16 / (2**16 - dropped) if dropped < 2**16 else 1.0


# Entries that a CPU draws at once: their bits, and these as floats, take 1.5 MiB of its cache.
_ENTRIES = 2**18


class Dropout:
    """Sets entries of block after block of rows to zero: the same entries for the same seed.

    A random int64 gives four 16-bit numbers, and each is compared with a threshold. This takes a
    tenth of the time of ``F.dropout``, which draws a float for each entry. In return p is rounded
    to a multiple of 1/65536, and ``scale`` belongs to the rounded p. The caller multiplies by
    ``scale``, since it multiplies each row by a gate anyway.
    """

    def __init__(self, p: float, seed: Tensor | None, device: torch.device) -> None:
        dropped, self.scale = in_steps(p, seed)
        self.all_dropped = dropped == 2**16
        self.threshold = dropped - 2**15
        self._draw = _words(seed, device) if seed is not None and dropped else None
        self._at_once = _ENTRIES if device.type == "cpu" else 2**62
        self._kept = torch.empty(0, device=device)

    def __call__(self, rows_RD: Tensor) -> Tensor:
        """Sets entries to zero in place; the rows must be contiguous."""
        if self._draw is None:
            return rows_RD
        if self.all_dropped:
            return rows_RD.zero_()
        for entries in rows_RD.view(-1).split(self._at_once) if rows_RD.numel() else ():
            size = entries.shape[0]
            bits = self._draw((size + 3) // 4).view(torch.int16)[:size]
            if self._kept.shape[0] < size or self._kept.dtype != entries.dtype:
                self._kept = torch.empty_like(entries)
            # Compared in place, then converted: bools would cost several times as much.
            entries.mul_(self._kept[:size].copy_(bits.ge_(self.threshold)))
        return rows_RD


def _words(seed: Tensor, device: torch.device) -> Callable[[int], Tensor]:
    """Returns a function that draws a number of random int64, and then the next ones."""
    if device.type == "cpu":
        # It takes half of the time of PyTorch's generator, which uses one thread too.
        raw = np.random.SFC64(int(seed)).random_raw
        return lambda words: torch.from_numpy(raw(words).view(np.int64))
    generator = seeded_generator(device, seed)
    empty = partial(torch.empty, dtype=torch.int64, device=device)
    return lambda words: empty(words).random_(-(2**63), None, generator=generator)
