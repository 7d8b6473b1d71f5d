"""Launches Triton kernels, chooses sizes of blocks, and sums the results of many programs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import language as tl

from ..operators import PLAIN_TENSORS
from .kernels.sums import sum_chunks_kernel


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *arguments: Any, **options: Any) -> None:
    """Runs ``kernel`` on the device of ``on``; an empty grid runs nothing."""
    if 0 in grid:
        return
    if on.is_cuda and on.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(on):
            return launch(kernel, grid, on, *arguments, **options)
    # A fused product and sum rounds once instead of twice. The option is explicit, because Triton's
    # default is about to change.
    kernel[grid](*arguments, **options, enable_fp_fusion=True)


def contiguous(*tensors: Any) -> tuple[Any, ...]:
    """Makes tensors contiguous, as kernels read them; None stays None.

    They become plain tensors, since subclasses such as MONAI's MetaTensor change methods that
    Triton calls.
    """
    return tuple(
        t
        if t is None or (type(t) in PLAIN_TENSORS and t.is_contiguous())
        else t.as_subclass(Tensor).contiguous()
        for t in tensors
    )


def block_size(size: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``size``; the side of a GEMM is at least 16."""
    return max(least, 1 << (size - 1).bit_length())


def most_tiles(rows: int, block: int, groups: int) -> int:
    """The most tiles that ``rows`` in ``groups`` can need, however they are split; at least one."""
    return rows // block + max(groups, 1)


def gemm_precision() -> str:
    """How tensor cores compute a GEMM of fp32 numbers.

    They compute three products of tf32 parts, which are as exact as fp32. They compute only one if
    the user has allowed that for PyTorch's own matmul.
    """
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


def is_hopper(device: torch.device) -> bool:
    """Whether a GPU has compute capability 9.0 or more, whose matrix products read shared memory.

    On other GPUs their operands are in registers. Without a GPU, in the interpreter, the answer is
    yes.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


# A tensor with at least so many numbers needs offsets of 64 bits.
LEAST_INT64 = 2**31


def offset_type(numbers: int) -> Any:
    """The type of offsets into a tensor of that size; 32 bits take half the instructions."""
    return tl.int32 if numbers < LEAST_INT64 else tl.int64


class Shares(NamedTuple):
    """The share of each chunk of rows in the gradients of a weight and its bias, in fp32.

    The tensors are (chunks, ...). ``chunk_rows`` is the number of rows of a chunk, or 0 if the
    tensors are the gradients themselves.
    """

    weight: Tensor
    bias: Tensor
    chunk_rows: int


def sum_block(numbers: int) -> int:
    """How many numbers a program sums: fewer, but more chunks at a time, if there are few."""
    return 128 if numbers < 2**14 else 512


def sum_chunks(offsets: Tensor, *layers: Shares) -> list[Tensor]:
    """Sums the weight and the bias of each layer over the chunks of each group: (groups, ...).

    The order of a sum is always the same. One launch computes all of them.
    """
    open_ = [layer for layer in layers if layer.chunk_rows]
    groups = offsets.shape[0] - 1
    totals = [[s.new_empty((groups, *s.shape[1:])) for s in layer[:2]] for layer in open_]
    numbers = [[s.shape[1:].numel() for s in layer[:2]] for layer in open_]
    if open_:
        block = sum_block(max(map(max, numbers)))
        given = [
            (*layer[:2], *sums, *sizes, layer.chunk_rows)
            for layer, sums, sizes in zip(open_, totals, numbers, strict=True)
        ]
        programs = sum(-(-n // block) for sizes in numbers for n in sizes)
        launch(
            sum_chunks_kernel, (groups, programs), offsets,
            *given[0], *(given[1] if len(given) > 1 else [None] * 4 + [0] * 3), offsets, groups,
            GROUPS=block_size(groups, 2), CHUNKS=4096 // block, BLOCK=block,
        )  # fmt: skip
    summed = iter(totals)
    return [s for layer in layers for s in (next(summed) if layer.chunk_rows else layer[:2])]
