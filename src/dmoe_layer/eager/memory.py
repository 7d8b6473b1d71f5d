"""Large tensors on a CPU, in memory that the system hands out in few and large pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From here on glibc always maps fresh memory; smaller tensors mostly get some that was used before.
LEAST_BYTES = 2**25
# Linux's name for "in huge pages, please"; Python's mmap knows it on Linux alone.
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape)``, of which a large one costs fewer page faults.

    A tensor of many MiB is fresh memory in every call, and the system clears and maps it as it is
    written for the first time: 4 KiB at a time by default, which took a fifth of a training step
    at the width of a ViT. Where Linux leaves huge pages to be asked for (its default), this asks
    for 2 MiB at a time. Elsewhere it changes nothing, and the numbers are the same anyway.
    """
    empty = like.new_empty(shape, dtype=dtype)
    if _advise is not None and empty.device.type == "cpu" and empty.nbytes >= LEAST_BYTES:
        start = -(-empty.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = empty.data_ptr() + empty.nbytes - start
        _advise(start, length, _MADV_HUGEPAGE)  # whether it was followed or not: no matter
    return empty


class Scratch:
    """Rows of one width that are written again and again."""

    def __init__(self, like: Tensor, width: int, dtype: torch.dtype) -> None:
        self._buffer = like.new_empty((0, width), dtype=dtype)

    def rows(self, rows: int) -> Tensor:
        """The first ``rows``, with whatever stands in them; more than ever before are new."""
        if rows > self._buffer.shape[0]:
            width = self._buffer.shape[1]
            self._buffer = self._buffer[:0].clone()  # gives the old ones back first
            self._buffer = new_empty(self._buffer, (rows, width))
        return self._buffer[:rows]


def _system_call() -> Callable[..., int] | None:
    if _MADV_HUGEPAGE is None or not sys.platform.startswith("linux"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_advise = _system_call()
