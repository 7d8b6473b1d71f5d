"""The networks of the recipes leave Python."""

import pytest
import torch
from harness import resunets3d, transunets
from harness.exports import exported, operators

from dmoe_layer.export import export_onnx

FEW = {"n_experts": 2, "k": 1}  # each expert is some operators that an exporter takes its time for


def test_a_transunet_is_one_program():
    model, attributes = transunets.make(**FEW).eval(), torch.tensor([2, 0])
    program = exported(model, transunets.images(batch=2), attributes)
    assert not any("dmoe_layer" in each for each in operators(program))
    with torch.no_grad():
        x = transunets.images()
        found, expected = program.module()(x, transunets.ATTRIBUTES), transunets.run(model, x)
    torch.testing.assert_close(found, expected)


def test_a_hybrid_transunet_is_one_file(tmp_path):
    model, x = transunets.make(transunets.TINY_HYBRID, **FEW).eval(), transunets.images(batch=2)
    found = export_onnx(model, tmp_path / "m.onnx", x, torch.tensor([2, 0]))
    assert found.largest_difference < 1e-5


@pytest.mark.slow
def test_a_resunet3d_is_one_file_for_volumes_of_open_size(tmp_path):
    # With 64 voxels two are left at the last stage: torch.export fixes what is one.
    model, x = resunets3d.make(stages=(5,), **FEW).eval(), torch.randn(1, 1, 32, 32, 64)
    found = export_onnx(model, tmp_path / "m.onnx", x, 2, dynamic_axes=(0, 4))
    assert found.runs == 4
    assert found.largest_difference < 1e-5
