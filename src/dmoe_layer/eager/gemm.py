"""The matrix products of a block, by oneDNN where it does them as exactly as BLAS and sooner.

PyTorch hands fp32 products on a CPU to BLAS, which is MKL on x86, and MKL uses half of the vector
width of a processor that is not Intel's: measured on an AMD EPYC, oneDNN needs half of its time at
every width from 24 to 768. Linear layers reach oneDNN through the operator that torch.compile's
code calls, and the weights' gradients as those of a convolution of width one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import onednn_linear

# BLAS rounds otherwise in GEMMs of a few rows. A sample's output shall not depend on how many rows
# of its batch-mates stand beside its own, and where that can be had not even in the last bit, so
# shorter ones are padded: from 8 rows on, MKL gives most products' rows the same bits whatever
# their number. Measured with torch 2.13 on an AMD EPYC: all of the router's with 4 or 8 experts
# and widths from 16 to 192; with 2, 16 or 40 experts one in ten differs by its last bit.
MIN_GEMM_ROWS = 8

# A product's rows are a multiple of this, padded with zeros: a convolution of at least 16 images
# goes to oneDNN at any number of threads, and rows keep their bits whatever the number of others
# (see MIN_GEMM_ROWS; oneDNN's do from 2 rows on, measured at widths from 1 to 4096 and up to 48
# threads).
ROWS = 16

# PyTorch brings its own oneDNN. Those of 2.8, 2.10 and 2.11 give a row other bits beside another
# number of rows, on processors without AVX-512 nearly always; those of 2.13, 2.14 and 2.15 do
# not (2.9 and 2.12 were not asked). BLAS keeps a row's bits with all, and is taken before 2.13.
ONEDNN_KEEPS_BITS = torch.__version__ >= "2.13"


def round_rows(rows: int) -> int:
    """``rows`` rounded up to one of 32 sizes an octave: oneDNN compiles each size it meets."""
    step = max(ROWS, 2 ** (rows.bit_length() - 6) if rows >= 64 else 0)
    return -(-rows // step) * step


def linear(x_RI: Tensor, w_OI: Tensor, b_O: Tensor | None = None, relu: bool = False) -> Tensor:
    """x·wᵀ + b, and ReLU of that if asked. The weight may be a transposed view."""
    multiply = onednn_linear if _by_onednn(x_RI, w_OI) else F.linear
    y_RO = multiply(x_RI, w_OI, b_O)
    return y_RO.relu_() if relu else y_RO  # oneDNN's own ReLU makes 0 of a NaN


def sum_of_products(a_RO: Tensor, b_RI: Tensor) -> Tensor:
    """aᵀ·b: (O, I), the gradient of a weight."""
    if not _by_onednn(a_RO, b_RI):
        return a_RO.mT @ b_RI
    rows, out, inner = *a_RO.shape, b_RI.shape[1]
    if rows < max(out, inner):
        return onednn_linear(a_RO.mT, b_RI.mT, None)
    # Many rows for a small sum: the convolution splits the rows among the threads.
    images = (a_RO.view(ROWS, -1, 1, out), b_RI.view(ROWS, -1, 1, inner))
    channels_last = [image.permute(0, 3, 1, 2) for image in images]
    w_OI11 = a_RO.new_empty(out, inner, 1, 1)
    stride, padding, dilation, transposed, groups = [1, 1], [0, 0], [1, 1], False, 1
    options = (None, stride, padding, dilation, transposed, padding, groups, [False, True, False])
    _, dw_OI11, _ = torch.ops.aten.convolution_backward(*channels_last, w_OI11, *options)
    return dw_OI11.view(out, inner)


def road() -> str:
    """Which library computes the products of wide fp32 layers on this machine's CPU."""
    return "oneDNN" if _by_onednn(*[torch.empty(16, 16, dtype=torch.float32)] * 2) else "BLAS"


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        ONEDNN_KEEPS_BITS
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and min(*a.shape, *b.shape) >= 16  # the floats in a vector
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
