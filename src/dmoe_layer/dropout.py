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

    def __call__(self, rows_RD: Tensor) -> Tensor:
        """Zeroes in place."""
        if self.generator is None:
            return rows_RD
        if self.all_dropped:
            return rows_RD.zero_()
        words = torch.empty((rows_RD.numel() + 3) // 4, dtype=torch.int64, device=rows_RD.device)
        bits = words.random_(-(2**63), None, generator=self.generator).view(torch.int16)
        # Compared in place, then converted: bools would cost several times as much.
        kept = bits.ge_(self.threshold)[: rows_RD.numel()].to(rows_RD.dtype)
        return rows_RD.mul_(kept.view(rows_RD.shape))
