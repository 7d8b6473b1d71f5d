"""What the layer's registered operators share: seeds, and the derivatives that they refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._torch_private import in_functional_derivative


def draw_seed() -> Tensor:
    """A seed from PyTorch's global CPU generator, so that manual_seed and checkpointing rule it.

    On the CPU whatever the device of the data: an operator reads it without waiting for the GPU.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def seeded_generator(device: torch.device, seed: Tensor) -> torch.Generator:
    """A generator of its own for one operator call, so that its backward can draw again."""
    return torch.Generator(device).manual_seed(int(seed))


def refuse_functional_derivatives(x: Tensor) -> None:
    """Raises inside torch.func's and forward-mode derivatives, which would silently be zero."""
    if torch.compiler.is_compiling():
        return
    if in_functional_derivative(x) or forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            "DMoE: torch.func's derivatives (grad, vjp, jvp, jacrev, hessian) and forward mode do "
            "not pass through its operators. Use torch.autograd.grad or .backward()."
        )


def refuse_double_backward(backward_operator: Any) -> None:
    """Makes second derivatives through a backward operator an error that says so."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            "DMoE: has no second derivatives (gradient penalties, Hessians). Take them with "
            "respect to inputs that do not pass through the layer, or detach its output there."
        )

    backward_operator.register_autograd(refuse)
