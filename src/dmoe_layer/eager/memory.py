"""Makes large tensors on a CPU in memory of few, large pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From this size on glibc always maps new memory. Smaller tensors mostly get memory that was used.
LEAST_BYTES = 2**25
# The request for huge pages, which Python's mmap has only on Linux.
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Makes ``like.new_empty(shape)``, with fewer page faults if it is large.

    A tensor of many MiB is new memory in every call. The system clears and maps it when it is first
    written, by default 4 KiB at a time. That took a fifth of a training step at the width of a ViT.
    If Linux gives huge pages on request (its default), this function requests 2 MiB at a time.
    Elsewhere it does nothing. The numbers are the same in any case.
    """
    empty = like.new_empty(shape, dtype=dtype)
    if _advise is not None and empty.device.type == "cpu" and empty.nbytes >= LEAST_BYTES:
        start = -(-empty.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = empty.data_ptr() + empty.nbytes - start
        _advise(start, length, _MADV_HUGEPAGE)  # It does not matter whether the system follows.
    return empty


class Scratch:
    """Memory for rows of one width that are written again and again."""

    def __init__(self, like: Tensor, width: int, dtype: torch.dtype) -> None:
        self._buffer = like.new_empty((0, width), dtype=dtype)

    def rows(self, rows: int) -> Tensor:
        """The first ``rows`` rows, with any content; the memory grows if it has fewer."""
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
