"""The activations an expert may have, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Activation(NamedTuple):
    """An activation, and its derivative: (gradient of the output, input) to that of the input.

    The gradient may be overwritten. ReLU's derivative may be given ReLU's output for its input:
    both are positive or neither is.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


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
