"""Files of weights in half precision: what is loaded is what was saved, to the bit."""

import copy

import pytest
import torch

from dmoe_layer import DMoE
from dmoe_layer.surgery import add_attribute_value

halves = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])


def make(**options):
    options = {"n_experts": 4, "attribute_sizes": (3, 2), "unknown": "learned", **options}
    return DMoE(options.pop("dim", 6), **options).eval()


def saved(layer, half, path):
    """The state_dict as it comes back from a file of half precision."""
    torch.save({name: value.to(half) for name, value in layer.state_dict().items()}, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("file_type", ["torch", "safetensors"])
@halves
def test_a_layer_in_fp32_computes_with_the_rounded_weights(half, file_type, tmp_path):
    layer, x = make(), torch.randn(3, 5, 6)
    attributes = torch.tensor([[2, 1], [-1, 0], [0, -1]])
    state = saved(layer, half, tmp_path / "layer.pt")
    if file_type == "safetensors":
        files = pytest.importorskip("safetensors.torch")
        files.save_file(state, tmp_path / "layer.safetensors")
        state = files.load_file(tmp_path / "layer.safetensors")
    rounded = copy.deepcopy(layer).to(half).float()
    for found in (make(), make(dim=None)):
        found.load_state_dict(state)
        assert {p.dtype for p in found.parameters()} == {torch.float32}
        assert torch.equal(found(x, attributes), rounded(x, attributes))
    # A second time through a file changes nothing more.
    again = saved(found, half, tmp_path / "again.pt")
    assert all(torch.equal(again[name], state[name]) for name in state)


@halves
def test_a_layer_in_half_precision_is_what_was_saved(half, tmp_path):
    layer, x = make().to(half), torch.randn(3, 5, 6, dtype=half)
    attributes = torch.tensor([[2, 1], [-1, 0], [0, -1]])
    state = saved(layer, half, tmp_path / "layer.pt")
    assigned = make()
    assigned.load_state_dict(state, assign=True)
    copied, lazy = make(dtype=half), make(dim=None, dtype=half)
    copied.load_state_dict(state)
    lazy.load_state_dict(state)
    for found in (assigned, copied, lazy):
        assert {p.dtype for p in found.parameters()} == {half}
        assert torch.equal(found(x, attributes), layer(x, attributes))


@halves
def test_a_file_of_before_surgery_gives_its_values_to_the_layer_of_after(half, tmp_path):
    layer, x = make(), torch.randn(3, 5, 6)
    state = saved(layer, half, tmp_path / "before.pt")
    layer.load_state_dict(state)
    attributes = torch.tensor([[2, 1], [-1, 0], [0, -1]])
    before = layer(x, attributes)
    new = add_attribute_value(layer, attribute=1, start=-1)
    state_after = saved(layer, half, tmp_path / "after.pt")
    for options in ({}, {"dim": None}):
        found = make(attribute_sizes=(3, 3), **options)
        found.load_state_dict(state_after)
        assert torch.equal(found(x, attributes), before)
        told = torch.tensor([[2, 1], [-1, 0], [0, new]])
        assert torch.equal(found(x, told), before)
        # A file of the other size is refused, by the parameters' names and shapes.
        with pytest.raises(RuntimeError, match=r"router\.w_A2ED.*\[7, 2, 4, 6\]"):
            make(attribute_sizes=(3, 3)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"router\.w_A2ED: found \(8, 2, 4, 6\), expected \(7"):
        make(dim=None).load_state_dict(state_after)
