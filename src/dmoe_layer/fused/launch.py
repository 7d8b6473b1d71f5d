"""Launches Triton kernels, chooses sizes of blocks, and sums the results of many programs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..operators import PLAIN_TENSORS
from .kernels.common import TILE
from .kernels.sums import sum_chunks_kernel


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs ``kernel`` on the device of ``on``; an empty grid runs nothing."""
    if 0 in grid:
        return
    if on.is_cuda and on.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(on):
            return launch(kernel, grid, on, *arguments, **options)
    # What ``kernel[grid](...)`` calls, without a function and a dictionary in between. A fused
    # product and sum rounds once instead of twice. The option is explicit, because Triton's default
    # is about to change.
    kernel.run(*arguments, grid=grid, warmup=False, enable_fp_fusion=True, **options)


def contiguous(*tensors: Any) -> tuple[Any, ...]:
    """Makes tensors contiguous, as kernels read them; None stays None.

    They become plain tensors, since subclasses such as MONAI's MetaTensor change methods that
    Triton calls.
    """
    found = []
    for t in tensors:
        if t is not None and not (type(t) in PLAIN_TENSORS and t.is_contiguous()):
            t = t.as_subclass(Tensor).contiguous()
        found.append(t)
    return tuple(found)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``; ``to`` takes ten times as long to find that nothing is to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def block_size(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``size``; the side of a GEMM is at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def most_tiles(rows: int, block: int, groups: int) -> int:
    """The most tiles that ``rows`` in ``groups`` can need, however they are split; at least one."""
    return rows // block + max(groups, 1)


class Windows(NamedTuple):
    """How the tile map is cut for sums over an expert's rows, see ``kernels.common.rows_of_chunk``.

    Attributes:
        number: How many windows there are.
        tiles: How many tiles each has.
        first_tile: The number of the first tile that is cut.
    """

    number: int
    tiles: int
    first_tile: int

    @classmethod
    def of(cls, tiles: int, rows: int, first_tile: int = 0) -> Windows:
        """Cuts ``tiles`` tiles, so that each window has ``rows`` rows or more, or all there are."""
        each = min(-(-rows // TILE.value), tiles)
        return cls(-(-tiles // each), each, first_tile)


def gemm_precision(dtype: torch.dtype) -> str:
    """How tensor cores compute a GEMM of fp32 numbers; of others it changes nothing.

    They compute three products of tf32 parts, which are as exact as fp32. They compute only one if
    the user has allowed that for PyTorch's own matmul.
    """
    if dtype != torch.float32:
        return "tf32x3"
    matmul = torch.backends.cuda.matmul
    # If both settings exist, it is an error to read the old one after the new one was written.
    new = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if new is None else new == "tf32"
    return "tf32" if allowed else "tf32x3"


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name for a dtype of PyTorch's."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[
        dtype
    ]


@functools.cache  # since PyTorch asks for all properties of a GPU each time
def compute_capability(device: torch.device) -> int:
    """That of a GPU, times ten. Without a GPU, in the interpreter, the answer is 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Triton 3.4, which is that of PyTorch 2.8, takes more registers than those after it.
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5)

# A tensor with at least so many numbers needs offsets of 64 bits.
LEAST_INT64 = 2**31


def needs_int64(numbers: int) -> bool:
    """Whether offsets into a tensor of that size have 64 bits."""
    return numbers >= LEAST_INT64


def offset_type(numbers: int) -> Any:
    """The type of offsets into a tensor of that size; 32 bits take half the instructions."""
    return tl.int64 if needs_int64(numbers) else tl.int32


def sum_chunks(offsets: Tensor, windows: Windows, shares: list[Tensor]) -> list[Tensor]:
    """Sums the shares in the gradients of w1, b1, w2 and b2 over the chunks of each expert.

    Shares are (windows + E, ...) in fp32, sums (E, ...). The order of a sum is always the same. One
    launch computes all of them.
    """
    n_experts = offsets.shape[1] - 1
    totals = [s.new_empty((n_experts, *s.shape[1:])) for s in shares]
    numbers = [s.shape[1:].numel() for s in shares]
    block = sum_block(max(numbers))
    launch(
        sum_chunks_kernel, (n_experts, sum(-(-n // block) for n in numbers)), offsets,
        *shares, *totals, *numbers, offsets, n_experts, *windows,
        OFFSET=offset_type(max(s.numel() for s in shares)), CHUNKS=4096 // block, BLOCK=block,
    )  # fmt: skip
    return totals


def sum_block(numbers: int) -> int:
    """How many numbers a program sums: fewer, but more chunks at a time, if there are few."""
    return 128 if numbers < 2**14 else 512
