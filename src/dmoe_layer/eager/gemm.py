"""The matrix products of a block, by oneDNN or by BLAS, depending on processor and width.

PyTorch hands fp32 products on a CPU to BLAS, which is MKL on x86. A linear layer reaches oneDNN
through the operator that torch.compile's code calls, a weight's gradient as that of a convolution
of width one. Products alone, PyTorch 2.13, two threads of an AMD EPYC, GFLOP/s of BLAS and oneDNN::

                             16384 rows   4096 rows    392 rows      gradient of
                             24 → 96      192 → 768    768 → 3072    192 → 768
    Zen 4 (AVX-512)          128, 155     177, 199     167, 204      184, 178
    Zen 4 held to AVX2       128, 160     181, 163     166, 187      183, 65

In the layer BLAS gains from the buffers that it writes to and has less to prepare in each call, and
below the widths of the rule it is level or ahead. With all products by BLAS the layer's time is so
many times that of the rule, forward and backward, then eval (medians of seven steps in turns)::

                             2 × 8192 × 192    8 × 196 × 768    1 × 49 × 384
    Zen 4 (AVX-512)          1.06, 1.04        1.09, 1.11       1.20, 1.19
    Zen 4 held to AVX2       1.00, 1.01        0.97, 1.05       1.09, 1.03

With AVX2 a transposed weight costs oneDNN more than BLAS if there are hundreds of rows, and less if
there are few. On Zen 5, whose vectors of 512 bits are computed at once, MKL uses half of the width,
and oneDNN needed half of BLAS' time at every width from 24 to 768, gradients included. Intel's
processors were not measured and are taken to be like Zen 4; what is neither x86 nor knows AVX2
computes with BLAS. Nothing is timed while a program runs: on one machine the bits of a result are
always the same.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch_private import has_onednn_linear, onednn_linear
from .memory import Scratch
from .processor import Processor, processor

# BLAS rounds otherwise in GEMMs of a few rows. A sample's output shall not depend on how many rows
# of its batch-mates stand beside its own, and where that can be had not even in the last bit, so
# shorter ones are padded: from 8 rows on, MKL gives most products' rows the same bits whatever
# their number. Measured with torch 2.13 on an AMD EPYC: all of the router's with 4 or 8 experts
# and widths from 16 to 192; with 2, 16 or 40 experts one in ten differs by its last bit.
MIN_GEMM_ROWS = 8

# The rows of an expert's product are a multiple of this. With other numbers MKL may leave a thread
# fewer than 4 rows, and rounds those otherwise. Measured on an AMD EPYC with 1 to 48 threads and
# widths from 9 to 3072; Intel's processors were not asked. One case is left: where few or odd
# numbers come out (a hidden layer of 5, fp64 at width 17), a row's last bit depends on its place.
ROWS = 16

# PyTorch brings its own oneDNN. Those of 2.8, 2.10 and 2.11 give a row other bits beside another
# number of rows, on processors without AVX-512 nearly always; those of 2.13, 2.14 and 2.15 do
# not, from 2 rows on (2.9 and 2.12 were not asked). Before 2.13 BLAS is taken.
ONEDNN_KEEPS_BITS = torch.__version__ >= "2.13"

# Rows that are added one after the other: fp32 loses about a digit and a half in so many.
_SUMMED_ROWS = 512


class Roads(NamedTuple):
    """Which products oneDNN computes. BLAS computes all others.

    Attributes:
        width: oneDNN computes linear layers whose smaller width is at least this. None: no layer.
        transposed_rows: The most rows of a product with a transposed weight, as in backward. None:
            any number.
        gradients: Whether oneDNN also computes the gradients of the weights of such layers.
    """

    width: int | None
    transposed_rows: int | None = None
    gradients: bool = False

    def __str__(self) -> str:
        if self.width is None:
            return "BLAS"
        rows = (
            "" if self.transposed_rows is None else f" (transposed: to {self.transposed_rows} rows)"
        )
        gradients = "oneDNN" if self.gradients else "BLAS"
        return f"linear layers oneDNN from width {self.width} on{rows}, gradients {gradients}"


def roads_of(cpu: Processor) -> Roads:
    """The rule for a processor, which follows from the figures above."""
    if cpu.architecture != "x86" or cpu.capability not in ("AVX2", "AVX512"):
        return Roads(None)
    if cpu.capability == "AVX2":
        return Roads(256, transposed_rows=128)
    if cpu.vendor == "AuthenticAMD" and cpu.family >= 26:
        return Roads(16, gradients=True)
    return Roads(128)


@cache
def roads() -> Roads:
    """The rule for this machine."""
    if not ONEDNN_KEEPS_BITS or not has_onednn_linear():
        return Roads(None)
    return roads_of(processor())


def road() -> str:
    """Says which library computes which products of fp32 layers on this machine."""
    return str(roads())


def least_rows(w1_EHD: Tensor, w2_EDH: Tensor, dtype: torch.dtype) -> int:
    """The least number of rows of an expert's product in ``dtype``; oneDNN needs only 2."""
    widths = (*w1_EHD.shape[1:], *w2_EDH.shape[1:])
    return 2 if _by_onednn(w1_EHD.device, dtype, *widths) else ROWS


def round_rows(rows: int, least: int) -> int:
    """``rows`` rounded up, so that a row keeps its bits, to one of few: oneDNN compiles each.

    From ``ROWS`` on 32 an octave. What is beyond ``rows`` is read and computed, and never used.

    >>> [round_rows(rows, 2) for rows in (1, 3, 17, 1000)], round_rows(1, 16)
    ([2, 4, 32, 1008], 16)
    """
    if rows <= ROWS:
        return max(least, 1 << (rows - 1).bit_length())
    step = max(ROWS, 2 ** (rows.bit_length() - 6) if rows >= 64 else 0)
    return -(-rows // step) * step


def most_padding(rows: int) -> int:
    """At least ``round_rows(r, least) - r`` for every r up to ``rows``."""
    return max(ROWS, rows // 32)


def linear(x_RI: Tensor, w_OI: Tensor, b_O: Tensor | None, scratch: Scratch) -> Tensor:
    """x·wᵀ + b, which BLAS writes to ``scratch``, and oneDNN to a tensor of its own."""
    if _by_onednn(x_RI.device, x_RI.dtype, *w_OI.shape):
        return onednn_linear(x_RI, w_OI, b_O)
    out_RO = scratch.rows(x_RI.shape[0])
    if b_O is None:
        return torch.mm(x_RI, w_OI.mT, out=out_RO)
    return torch.addmm(b_O, x_RI, w_OI.mT, out=out_RO)


def linear_backward(dy_RO: Tensor, w_OI: Tensor, scratch: Scratch) -> Tensor:
    """dy·w, the gradient of the input of a linear layer; where it is written as :func:`linear`."""
    most = roads().transposed_rows
    few = most is None or dy_RO.shape[0] <= most
    if few and _by_onednn(dy_RO.device, dy_RO.dtype, *w_OI.shape):
        return onednn_linear(dy_RO, w_OI.mT, None)
    return torch.mm(dy_RO, w_OI, out=scratch.rows(dy_RO.shape[0]))


def add_product(total_OI: Tensor, a_RO: Tensor, b_RI: Tensor, *, first: bool) -> None:
    """Adds aᵀ·b, a weight's gradient, to the total; the first term overwrites what is there."""
    if a_RO.dtype != total_OI.dtype:
        term_OI = a_RO.mT @ b_RI
    elif roads().gradients and _by_onednn(a_RO.device, a_RO.dtype, *a_RO.shape, b_RI.shape[1]):
        term_OI = _product_by_onednn(a_RO, b_RI)
    elif first:
        torch.mm(a_RO.mT, b_RI, out=total_OI)
        return
    else:
        total_OI.addmm_(a_RO.mT, b_RI)
        return
    if first:
        total_OI.copy_(term_OI)
    else:
        total_OI += term_OI


def weighted_sum(rows_RO: Tensor, weights_R: Tensor) -> Tensor:
    """Σ weight · row, (O,), in parts: BLAS adds row to row, and so many would cost digits."""
    parts = rows_RO.shape[0] // _SUMMED_ROWS
    whole = parts * _SUMMED_ROWS
    by_part = rows_RO[:whole].view(parts, _SUMMED_ROWS, rows_RO.shape[1])
    weights_P1R = weights_R[:whole].view(parts, 1, _SUMMED_ROWS)
    return (weights_P1R @ by_part).sum(dim=(0, 1)) + weights_R[whole:] @ rows_RO[whole:]


def _product_by_onednn(a_RO: Tensor, b_RI: Tensor) -> Tensor:
    rows, out, inner = *a_RO.shape, b_RI.shape[1]
    # A convolution of at least 16 images goes to oneDNN at any number of threads.
    whole = rows // ROWS * ROWS
    if rows < max(out, inner):
        return onednn_linear(a_RO.mT, b_RI.mT, None)
    # Many rows for a small sum: the convolution splits the rows among the threads.
    images = (a_RO[:whole].view(ROWS, -1, 1, out), b_RI[:whole].view(ROWS, -1, 1, inner))
    channels_last = [image.permute(0, 3, 1, 2) for image in images]
    w_OI11 = a_RO.new_empty(out, inner, 1, 1)
    stride, padding, dilation, transposed, groups = [1, 1], [0, 0], [1, 1], False, 1
    options = (None, stride, padding, dilation, transposed, padding, groups, [False, True, False])
    _, dw_OI11, _ = torch.ops.aten.convolution_backward(*channels_last, w_OI11, *options)
    return dw_OI11.view(out, inner).addmm_(a_RO[whole:].mT, b_RI[whole:])


def _by_onednn(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    least = roads().width
    return (
        least is not None
        and min(widths) >= least
        and dtype == torch.float32
        and device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
    )
