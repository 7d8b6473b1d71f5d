"""What the layer's registered operators share: seeds, padding, and the derivatives they refuse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# BLAS rounds otherwise in GEMMs of a few rows. A sample's output shall not depend on how many rows
# of its batch-mates stand beside its own, and where that can be had not even in the last bit, so
# shorter ones are padded: from 8 rows on, MKL gives most products' rows the same bits whatever
# their number. Measured with torch 2.13 on an AMD EPYC: all of the router's with 4 or 8 experts
# and widths from 16 to 192; with 2, 16 or 40 experts one in ten differs by its last bit.
MIN_GEMM_ROWS = 8


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
    transforms = torch._C._functorch
    kinds = [level.key() for level in transforms.get_interpreter_stack() or ()]
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    wanted = torch.is_grad_enabled() and transforms.TransformType.Grad in kinds
    if dual or wanted or transforms.TransformType.Jvp in kinds:
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
