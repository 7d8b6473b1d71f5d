"""Dropout that backward can draw again from a seed, and that costs little on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .operators import seeded_generator


def in_steps(p: float, seed: Tensor | None) -> tuple[int, float]:
    """How many of 65536 steps are dropped, and the scale of what is kept. Without a seed: none."""
    dropped = 0 if seed is None else round(p * 2**16)
    # Of p = 1 nothing is left to scale.
    return dropped, 2**16 / (2**16 - dropped) if dropped < 2**16 else 1.0


# Entries that a CPU draws at once: their bits, and these as floats, take 1.5 MiB of its cache.
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
        self._draw = _words(seed, device) if seed is not None and dropped else None
        self._at_once = _ENTRIES if device.type == "cpu" else 2**62
        self._kept = torch.empty(0, device=device)

    def __call__(self, rows_RD: Tensor) -> Tensor:
        """Zeroes in place; the rows stand without gaps."""
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
    """Draws so many random int64, and then the next ones."""
    if device.type == "cpu":
        # In half of the time of PyTorch's generator, which is one thread's work too.
        raw = np.random.SFC64(int(seed)).random_raw
        return lambda words: torch.from_numpy(raw(words).view(np.int64))
    generator = seeded_generator(device, seed)
    empty = partial(torch.empty, dtype=torch.int64, device=device)
    return lambda words: empty(words).random_(-(2**63), None, generator=generator)
