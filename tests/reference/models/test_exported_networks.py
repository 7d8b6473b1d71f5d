"""The networks of the recipes as ONNX files."""

import pytest
import torch
from harness import resunets3d, transunets

from dmoe_layer.export import export_onnx

NETWORKS = {
    "vit": lambda: transunets.make(transunets.TINY_VIT, n_experts=2, k=1),
    "hybrid": lambda: transunets.make(transunets.TINY_HYBRID, n_experts=2, k=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_transunet_is_one_file(name, tmp_path):
    model, x = NETWORKS[name]().eval(), transunets.images(batch=2)
    found = export_onnx(model, tmp_path / "m.onnx", x, torch.tensor([2, 0]))
    assert found.largest_difference < 1e-5


def test_a_resunet3d_is_one_file_for_volumes_of_open_size(tmp_path):
    # With 64 voxels two are left at the last stage: torch.export fixes what is one.
    model, x = (
        resunets3d.make(n_experts=2, k=1, stages=(2, 5)).eval(),
        torch.randn(1, 1, 32, 32, 64),
    )
    found = export_onnx(model, tmp_path / "m.onnx", x, 2, dynamic_axes=(0, 4))
    assert found.runs == 4
    assert found.largest_difference < 1e-5
