"""What the layer's registered operators share: seeds, how they are called, what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._torch_private import (
    function_of_operator,
    in_functional_derivative,
    is_batched,
    operators_are_seen,
)

PLAIN_TENSORS = (Tensor, nn.Parameter)


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


def undispatched(operator: Any) -> Callable[..., Any]:
    """A registered operator without a derivative, to be called: its own function where it may be.

    PyTorch's dispatcher costs an operator written in Python about 100 µs a call, the time that a
    small kernel takes. Eager PyTorch does without; whoever looks at operators is shown them, see
    :func:`_is_eager`.
    """
    function = function_of_operator(operator)

    def call(*inputs: Any) -> Any:
        return function(*inputs) if _is_eager(inputs) else operator(*inputs)

    return call


def differentiable(
    operator: Any, save_for_backward: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers an operator's derivative; returns the operator to be called, as ``undispatched``.

    Eager PyTorch calls an ``autograd.Function`` of the same three functions.
    """
    operator.register_autograd(backward, setup_context=save_for_backward)
    function = function_of_operator(operator)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
        save_for_backward(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    name = getattr(function, "__name__", "operator")
    eager: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        return eager.apply(*inputs) if _is_eager(inputs) else operator(*inputs)

    return call


def refuse_double_backward(backward_operator: Any) -> Callable[..., Any]:
    """Makes second derivatives through a backward operator an error that says so.

    Returns the operator to be called, as ``undispatched``. With ``create_graph=True`` somebody may
    want a second derivative: that is the registered operator's to refuse.
    """

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            "DMoE: has no second derivatives (gradient penalties, Hessians). Take them with "
            "respect to inputs that do not pass through the layer, or detach its output there."
        )

    backward_operator.register_autograd(refuse)
    first_only = undispatched(backward_operator)

    def call(*inputs: Any) -> Any:
        return backward_operator(*inputs) if torch.is_grad_enabled() else first_only(*inputs)

    return call


def _is_eager(inputs: tuple[Any, ...]) -> bool:
    """Whether a call is plain eager PyTorch's, which nobody sees who must be shown an operator.

    torch.compile, torch.export, torch.jit.trace and make_fx must; so must every dispatch mode, as
    of FLOP counters, fake tensors and selective checkpointing, torch.func, and subclasses of
    Tensor, which are told what is done with them. On the meta device an operator is its fake.
    """
    return (
        not torch.compiler.is_compiling()
        and not operators_are_seen()
        and all(map(_is_plain, (i for i in inputs if isinstance(i, Tensor))))
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN_TENSORS and not tensor.is_meta and not is_batched(tensor)
