"""The activations an expert may have, by name.

To add one: a row in ``ACTIVATIONS``, its formula in ``tests/naive.py``, its name in the docstring
of ``DMoE``. The Triton kernels have theirs in the functions ``activate`` and ``slope`` of
``fused/kernels/common.py``. Without a branch there, say ``fused=False``: the eager backend then
takes every layer that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation.

    Attributes:
        forward: from the input z to the output.
        backward: from the output's gradient, which may be overwritten, and z to the gradient of z.
            ReLU's may be given ReLU's output for z: both are positive or neither is.
        fused: whether the Triton kernels have it too.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    fused: bool = True


ACTIVATIONS = {
    "relu": Activation(
        F.relu, lambda dh, z: aten.threshold_backward.grad_input(dh, z, 0, grad_input=dh)
    ),
    "gelu": Activation(F.gelu, lambda dh, z: aten.gelu_backward(dh, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda dh, z: aten.gelu_backward(dh, z, approximate="tanh"),
    ),
    "silu": Activation(F.silu, aten.silu_backward),
}
