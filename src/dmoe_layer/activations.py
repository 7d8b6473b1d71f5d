"""The activations that an expert may have, by name.

To add one, write a row in ``ACTIVATIONS``, its formula in ``tests/naive.py``, and its name in the
docstring of ``DMoE``. The Triton kernels have theirs in the functions ``activate`` and ``slope`` of
``fused/kernels/activations.py``. If you add no branch there, set ``fused=False``. The eager backend
then computes every layer with that activation.
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
        forward: Computes the output, a new tensor, from the input z.
        backward: Computes the gradient of z from the output's gradient, which it may overwrite,
            and from z. ReLU's may get its output in the place of z, since both have the same sign.
        fused: Whether the Triton kernels have it too.
        gated: Whether z is twice as wide as the output. The output is then act(gate) · linear: the
            first half of z is the gate, the second the linear half (Shazeer, arXiv:2002.05202).
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    fused: bool = True
    gated: bool = False


def _quick_gelu(z: Tensor) -> Tensor:
    """z · sigmoid(1.702 · z), as in OpenAI's CLIP."""
    return (
        1.702 * z
    ).sigmoid_() * z  # Not in place, since autograd in an exported program needs both.


def _quick_gelu_backward(dh: Tensor, z: Tensor) -> Tensor:
    s = (1.702 * z).sigmoid_()
    # 1.702 comes last, because in fp16 1.702·z may overflow although z does not.
    return dh.mul_((1 - s).mul_(s).mul_(z).mul_(1.702).add_(s))


def _gated(gate: Activation) -> Activation:
    def forward(z: Tensor) -> Tensor:
        z_gate, z_linear = z.chunk(2, dim=-1)
        return gate.forward(z_gate).mul_(z_linear)

    def backward(dh: Tensor, z: Tensor) -> Tensor:
        z_gate, z_linear = z.chunk(2, dim=-1)
        dz = torch.empty_like(z)
        dz_gate, dz_linear = dz.chunk(2, dim=-1)
        torch.mul(dh, gate.forward(z_gate), out=dz_linear)
        dz_gate.copy_(gate.backward(dh.mul_(z_linear), z_gate))
        return dz

    return Activation(forward, backward, gate.fused, gated=True)


_GELU = Activation(F.gelu, lambda dh, z: aten.gelu_backward(dh, z))
_GELU_TANH = Activation(
    lambda z: F.gelu(z, approximate="tanh"),
    lambda dh, z: aten.gelu_backward(dh, z, approximate="tanh"),
)
_SILU = Activation(F.silu, aten.silu_backward)

ACTIVATIONS = {
    "relu": Activation(
        F.relu, lambda dh, z: aten.threshold_backward.grad_input(dh, z, 0, grad_input=dh)
    ),
    "gelu": _GELU,
    "gelu_tanh": _GELU_TANH,
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward),
    "silu": _SILU,
    "swiglu": _gated(_SILU),
    "geglu": _gated(_GELU),
    "geglu_tanh": _gated(_GELU_TANH),
}
