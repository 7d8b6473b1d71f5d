"""Measures the machine's own limits, by a large matrix product and a large copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..measure import Stopwatch


@dataclass(frozen=True)
class Roofline:
    """What the machine reached here: FLOP/s of a large matrix product, bytes/s of a large copy."""

    flops: float
    bytes: float

    def seconds(self, flops: float, n_bytes: float) -> float:
        """The least time: all of one, the other meanwhile.

        >>> Roofline(flops=10.0, bytes=100.0).seconds(20, 300)
        3.0
        """
        return max(flops / self.flops, n_bytes / self.bytes)


def measure_roofline(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> Roofline:
    """The best of a few large matrix products in ``dtype``, and of a few large copies."""
    watch = Stopwatch(device)
    n, copied = (8192, 2**30) if watch.cuda else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product = min(watch.laps(lambda: a @ b)[0] for _ in range(repeats + 1))
    copy = min(watch.laps(lambda: target.copy_(source))[0] for _ in range(repeats + 1))
    return Roofline(2 * n**3 / product, 2 * copied / copy)
