"""Checks that a provider's layer computes the right answer, before it is timed."""

from __future__ import annotations

import torch

from .problem import Problem
from .provider import Layer, Provider

# Of the norm, and wider than the tests of this package allow: others sum in another order, and
# round before they add the bias, which in low precision moves hidden units across ReLU's kink and
# changes single gradients by any amount. The check finds wrong maths, not the last bit.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class WrongResult(Exception):
    """How far a layer is from the truth."""


def check(layer: Layer, provider: Provider, problem: Problem) -> float | None:
    """The layer's relative error; None for other maths, which only has to run.

    Raises:
        WrongResult: the error is larger than ``TOLERANCE``, or numbers are not finite.
    """
    if not provider.exact:
        check_that_it_runs(layer, problem)
        return None
    error = relative_error(layer, problem, bias=provider.bias)
    if not error <= TOLERANCE[problem.dtype]:
        raise WrongResult(f"relative error {error:.1e}")
    return error


def relative_error(layer: Layer, problem: Problem, *, bias: bool = True) -> float:
    """The largest relative error, in norm, of y and of x's and w1's gradient.

    ``bias=False``: beside the truth of experts without biases.
    """
    tokens_T = problem.checked_tokens()
    truth = problem.answer(bias)
    dy_TD = torch.zeros_like(problem.dy_BTD).flatten(0, 1)
    dy_TD[tokens_T] = problem.dy_BTD.flatten(0, 1)[tokens_T]
    x_BTD = problem.x_BTD.detach().requires_grad_()
    y_BTD = layer.eval()(x_BTD, problem.attributes_B)
    y_BTD.backward(dy_TD.view_as(y_BTD))
    assert x_BTD.grad is not None
    pairs = (
        (y_BTD.detach().flatten(0, 1)[tokens_T], truth.y_TD),
        (x_BTD.grad.flatten(0, 1)[tokens_T], truth.dx_TD),
        (layer.w1_grad(), truth.dw1_EHD),
    )
    layer.zero_grad()
    errors = [(got.double() - true).norm() / true.norm() for got, true in pairs]
    return float(torch.stack(errors).max().nan_to_num(nan=float("inf")))


def check_that_it_runs(layer: Layer, problem: Problem) -> None:
    """A training step must give the right shape and finite numbers."""
    x_BTD = problem.x_BTD.detach().requires_grad_()
    y_BTD = layer.train()(x_BTD, problem.attributes_B)
    y_BTD.backward(problem.dy_BTD)
    if y_BTD.shape != x_BTD.shape or not y_BTD.isfinite().all():
        raise ValueError(f"gave a shape of {tuple(y_BTD.shape)} or numbers that are not finite")
