"""How operators are called does not show: batched gradients, the meta device, an older PyTorch."""

import pytest
import torch
from harness.layers import A3

from dmoe_layer import DMoE, operators


def test_batched_gradients_are_those_taken_one_by_one():
    layer, x = DMoE(8, attribute_sizes=3).eval(), torch.randn(3, 5, 8, requires_grad=True)
    y, dy = layer(x, A3), torch.randn(3, 5, 8)
    inputs = [x, *layer.parameters()]
    both = torch.stack([dy, 2 * dy])
    batched = torch.autograd.grad(y, inputs, both, is_grads_batched=True, retain_graph=True)
    for i, weight in enumerate((1, 2)):
        for found, true in zip(
            batched, torch.autograd.grad(y, inputs, weight * dy, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(found[i], true)


def test_an_empty_batch_passes_where_meta_is_the_default_device():
    layer, x = DMoE(8, attribute_sizes=3), torch.randn(0, 5, 8)
    attributes = torch.empty(0, dtype=torch.int64)
    with torch.device("meta"):
        y = layer(x, attributes)
    assert y.shape == (0, 5, 8)
    assert y.device == x.device


@pytest.mark.parametrize("wanted", [False, True])
def test_where_pytorch_hides_an_operators_function_the_operator_is_called(wanted, monkeypatch):
    monkeypatch.setattr(operators, "function_of_operator", lambda operator: operator)

    @torch.library.custom_op("dmoe_layer_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    call = operators.differentiable(twice, lambda ctx, inputs, output: None, lambda ctx, dy: 2 * dy)
    x = torch.ones(3, requires_grad=wanted)
    y = call(x)
    assert torch.equal(y, torch.full((3,), 2.0))
    if wanted:
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))
