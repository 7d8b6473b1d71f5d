"""The kernels' operators return contiguous tensors, and read those that are not as they are."""

import pytest
import torch
from harness.kernels import HERE
from harness.layouts import check_operator

from dmoe_layer.fused import experts, router
from dmoe_layer.fused.call import draw_kept

SAMPLES, TOKENS, EXPERTS, HIDDEN = 2, 5, 2, 6
NARROW, WIDE = 3, 129


def routed(dim, ragged=False):
    """Inputs of the router, and what it makes of them."""
    shape = (SAMPLES * TOKENS, dim) if ragged else (SAMPLES, TOKENS, dim)
    x, w, b = (
        torch.randn(s, device=HERE, requires_grad=True)
        for s in (shape, (4, 2, EXPERTS, dim), (4, 2, EXPERTS))
    )
    rows = torch.tensor([[0, 3], [2, 3]], device=HERE)
    counts = torch.tensor([7, 3], device=HERE) if ragged else None
    inputs = (x, w, b, rows, counts, 2, torch.tensor(2**50), True)
    with torch.no_grad():
        return inputs, router._fused_route(*inputs)


def route_backward(ragged=False):
    (x, w, b, rows, counts, *_), (_, _, gates, *_, chosen, slopes) = routed(NARROW, ragged)
    tokens = SAMPLES * TOKENS
    grads = torch.randn(tokens, EXPERTS, device=HERE), torch.randn(tokens, 2, device=HERE)
    given = (t.detach() for t in (x, w, b))
    others = torch.randn(x.shape, device=HERE)
    inputs = (*grads, chosen, gates, slopes, *given, rows, counts, others)
    return router.fused_route_backward, inputs


def experts_inputs(dim, activation="gelu"):
    wide = HIDDEN * (2 if activation == "swiglu" else 1)
    _, (_, _, gates, *pairs, _, _) = routed(dim)
    shapes = ((EXPERTS, wide, dim), (EXPERTS, wide), (EXPERTS, dim, HIDDEN), (EXPERTS, dim))
    dtypes = (torch.float32, torch.bfloat16) * 2  # biases in another, as their gradients are not
    weights = [
        torch.randn(s, device=HERE, dtype=dtype, requires_grad=True)
        for s, dtype in zip(shapes, dtypes, strict=True)
    ]
    x = torch.randn(SAMPLES * TOKENS, dim, device=HERE, requires_grad=True)
    kept = draw_kept(pairs[0], dim, 0.1, torch.tensor(2**50))
    options = (activation, 0.1, kept, torch.float32)
    return (x, *pairs, gates.requires_grad_(), *weights), options


def experts_forward(*sizes):
    inputs, options = experts_inputs(*sizes)
    return experts._fused_experts, (*inputs, *options, True)


def experts_backward(dim, of_rows=True, of_weights=True):
    inputs, options = experts_inputs(dim)
    inputs = tuple(t.detach() for t in inputs)
    _, hidden = experts._fused_experts(*inputs, *options, True)
    dy = torch.randn(SAMPLES * TOKENS, dim, device=HERE)
    return experts.fused_experts_backward, (dy, hidden, *inputs, *options, of_rows, of_weights)


CALLS = {
    "route": lambda: (router._fused_route, routed(NARROW)[0]),
    "route, ragged": lambda: (router._fused_route, routed(NARROW, ragged=True)[0]),
    "route's backward": route_backward,
    "route's backward, ragged": lambda: route_backward(ragged=True),
    "narrow": lambda: experts_forward(NARROW),
    "wide": lambda: experts_forward(WIDE),
    "narrow, gated": lambda: experts_forward(NARROW, "swiglu"),
    # Of gated experts in fp32 the wide kernels take these.
    "wide, gated": lambda: experts_forward(65, "swiglu"),
    "narrow, backward": lambda: experts_backward(NARROW),
    "narrow, backward of rows": lambda: experts_backward(NARROW, of_weights=False),
    "narrow, backward of weights": lambda: experts_backward(NARROW, of_rows=False),
    "wide, backward": lambda: experts_backward(WIDE),
}


# Contiguous ones are seen to in test_kernels_exact, and convolutions have four axes, as a router.
@pytest.mark.parametrize(
    ("call", "layout"),
    [
        *[(call, layout) for call in CALLS for layout in ("transposed", "expanded")],
        ("route", "channels last"),
        ("route's backward", "channels last"),
    ],
)
def test_a_kernels_operator_returns_contiguous_tensors_as_its_fake_promises(call, layout):
    op, args = CALLS[call]()
    check_operator(op, args, layout)
