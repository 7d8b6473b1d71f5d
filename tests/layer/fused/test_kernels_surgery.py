"""The kernels route all other values as before, to the bit, once a value has come or gone."""

import pytest
import torch
from harness.kernels import HERE

from dmoe_layer import DMoE
from dmoe_layer.surgery import add_attribute_value, remove_attribute_value


@pytest.mark.parametrize("noise", ["never", "train"])
def test_the_other_values_keep_their_bits(noise):
    layer = DMoE(16, n_experts=4, attribute_sizes=(2, 3), backend="triton", noise=noise).to(HERE)
    x = torch.randn(2, 16, 16, device=HERE)

    def run(*attributes):
        torch.manual_seed(1)
        y, routed = layer(x, torch.tensor(attributes), return_routing=True)
        return torch.cat([y.flatten(), routed.logits.flatten()])

    before = run([0, 2], [1, 0])
    new = add_attribute_value(layer, 0, start=1)
    assert torch.equal(run([0, 2], [1, 0]), before)
    assert torch.equal(run([0, 2], [new, 0]), before)
    moved = remove_attribute_value(layer, 1, attribute=1)
    assert torch.equal(run([0, moved[2]], [new, moved[0]]), before)
