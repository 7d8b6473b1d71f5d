"""What the registered operators share: seeds, how they are called, and what they refuse."""

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
    """Draws a seed from PyTorch's global CPU generator, which ``torch.manual_seed`` controls.

    It is on the CPU whatever the device of the data, so that an operator does not wait for the GPU.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def seeded_generator(device: torch.device, seed: Tensor) -> torch.Generator:
    """Makes a generator for one operator call, so that backward can draw the same numbers."""
    return torch.Generator(device).manual_seed(int(seed))


def refuse_functional_derivatives(x: Tensor) -> None:
    """Raises inside derivatives of torch.func and of forward mode, which would be zero."""
    if torch.compiler.is_compiling():
        return
    if in_functional_derivative(x) or forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            "DMoE: the layer does not support derivatives by torch.func (grad, vjp, jvp, jacrev, "
            "hessian) or by forward mode. Use torch.autograd.grad or .backward()."
        )


def undispatched(operator: Any) -> Callable[..., Any]:
    """Makes a function that calls a registered operator without a derivative as fast as possible.

    PyTorch's dispatcher costs an operator written in Python about 100 µs per call, the time of a
    small kernel. In eager PyTorch the function calls the operator's own function instead. Where
    something looks at operators (see ``_is_eager``), it calls the operator.
    """
    function = function_of_operator(operator)

    def call(*inputs: Any) -> Any:
        return function(*inputs) if _is_eager(inputs) else operator(*inputs)

    return call


def differentiable(
    operator: Any,
    save_for_backward: Callable[..., None],
    backward: Callable[..., Any],
    passes_first: bool = False,
) -> Callable[..., Any]:
    """Registers an operator's derivative; returns the function to call, as ``undispatched`` does.

    In eager PyTorch that function calls an ``autograd.Function`` of the same three functions.

    With ``passes_first`` that function has one more output: its first input, if that needs a
    gradient. Who uses it in place of the input leaves the gradient to ``backward``, which gets it
    as ``passed``, and can add it where it computes its own. Of a registered operator the output is
    None, since none may return what it was given.
    """
    operator.register_autograd(backward, setup_context=save_for_backward)
    function = function_of_operator(operator)

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = function(*inputs)
        save_for_backward(ctx, inputs, output)
        if not passes_first:
            return output
        # Detached, since what is changed in place after it would otherwise be an error of its own.
        return *output, inputs[0].detach() if ctx.needs_input_grad[0] else None

    def backward_of_passed(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads[:-1], passed=grads[-1])

    methods = {
        "forward": staticmethod(forward),
        "backward": staticmethod(backward_of_passed if passes_first else backward),
    }
    name = getattr(function, "__name__", "operator")
    eager: Any = type(name, (torch.autograd.Function,), methods)

    def call(*inputs: Any) -> Any:
        if _is_eager(inputs):
            return eager.apply(*inputs)
        output = operator(*inputs)
        return (*output, None) if passes_first else output

    return call


def refuse_double_backward(backward_operator: Any) -> Callable[..., Any]:
    """Makes a second derivative through a backward operator an error that says so.

    Returns the function to call, as ``undispatched`` does. With ``create_graph=True`` the user may
    want a second derivative, which the registered operator then refuses.
    """

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            "DMoE: the layer has no second derivatives (gradient penalties, Hessians). Take them "
            "only with respect to inputs that do not pass through the layer, or detach its output."
        )

    backward_operator.register_autograd(refuse)
    first_only = undispatched(backward_operator)

    def call(*inputs: Any) -> Any:
        return backward_operator(*inputs) if torch.is_grad_enabled() else first_only(*inputs)

    return call


def _is_eager(inputs: tuple[Any, ...]) -> bool:
    """Whether a call is one of plain eager PyTorch, in which nothing needs to see an operator.

    torch.compile, torch.export, torch.jit.trace and make_fx need to see operators. So do dispatch
    modes (those of FLOP counters, fake tensors and selective checkpointing), torch.func, and
    subclasses of Tensor. On the meta device an operator is its fake.
    """
    if torch.compiler.is_compiling() or operators_are_seen():
        return False
    for given in inputs:  # A loop, since this runs for every operator of every step.
        if type(given) in PLAIN_TENSORS:
            if given.is_meta or is_batched(given):
                return False
        elif given is not None and isinstance(given, Tensor):  # which is slow
            return False
    return True
