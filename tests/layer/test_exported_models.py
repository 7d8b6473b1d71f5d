"""Swapped models of MONAI and Hugging Face leave Python: some by one exporter, some by the other.

Either takes any of them; to have each take all would cost the tests a minute.
"""

import pytest
import torch
from harness.exported_models import HOSTS
from harness.exports import exported, operators
from harness.mlps import flat, tensors

from dmoe_layer.export import export_onnx, with_attributes

ATTRIBUTES = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("monai UNETR", (0,)),
        ("hf ViT", (0,)),
        pytest.param("monai SwinUNETR", (0,), marks=pytest.mark.slow),
        pytest.param("hf SegFormer", (0, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_a_swapped_model_is_one_onnx_file(name, axes, tmp_path):
    host = HOSTS[name]
    found = export_onnx(host.make(), tmp_path / "m.onnx", host.x(), ATTRIBUTES, dynamic_axes=axes)
    # On the example, on other batches with every value, and on other sizes where they are open.
    assert found.runs == 3 + len(axes[1:])
    assert found.largest_difference < 1e-5


@pytest.mark.parametrize(
    ("name", "strict"), [("hf ViT", True), ("hf DINOv2", True), ("monai SwinUNETR", False)]
)
def test_a_swapped_model_is_one_program(name, strict):
    host = HOSTS[name]
    model, x, attributes = host.make(), host.x(3), torch.tensor([1, 0, 2])
    program = exported(model, host.x(), ATTRIBUTES, strict=strict)
    assert not any("dmoe_layer" in each for each in operators(program))
    with torch.no_grad():
        found, expected = program.module()(x, attributes), with_attributes(model)(x, attributes)
    found, expected = flat(tensors(found)), flat(tensors(expected))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
