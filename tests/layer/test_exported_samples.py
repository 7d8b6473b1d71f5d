"""Files know every sample: one that is masked whole, and the attributes beside a plain layer."""

import numpy as np
import onnxruntime
import pytest
import torch
from harness.exports import exported
from torch import nn

from dmoe_layer import DMoE, routing
from dmoe_layer.export import export_onnx

TWO = {"n_experts": 2, "k": 1, "noise": "never"}


class Masked(nn.Module):
    """A layer that sees the tokens whose first feature is positive."""

    def __init__(self):
        super().__init__()
        self.layer = DMoE(4, attribute_sizes=3, **TWO)

    def forward(self, x):
        return self.layer(x, mask=x[..., 0] > 0)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """(a masked model, its file opened)"""
    path, model = tmp_path_factory.mktemp("masked") / "m.onnx", Masked().eval()
    x = torch.randn(2, 5, 4).abs()
    export_onnx(model, path, x, torch.tensor([2, 0]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # of the runs that shall fail
    return model, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def whole_third():
    """Images of which the third is masked whole."""
    x = torch.randn(3, 5, 4).abs()
    x[2, :, 0] = -1
    return x


def test_a_sample_that_is_masked_whole_comes_out_as_it_does(masked):
    model, session = masked
    x, attributes = whole_third(), torch.tensor([2, 0, 1])
    (found,) = session.run(None, {"image": x.numpy(), "attribute": attributes.numpy()})
    with routing(attributes), torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-5, atol=1e-5)


def test_one_row_of_attributes_is_every_samples(masked):
    model, session = masked
    x = whole_third()
    (found,) = session.run(None, {"image": x.numpy(), "attribute": np.array([1])})
    with routing(1), torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attributes", [[2, 0], [2, 0, 9], [2, 0, -1]])
def test_a_sample_that_is_masked_whole_needs_its_attribute(masked, attributes):
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        masked[1].run(None, {"image": whole_third().numpy(), "attribute": np.array(attributes)})


class BesidePlain(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.told = DMoE(4, **TWO), DMoE(4, attribute_sizes=3, **TWO)

    def forward(self, x):
        return self.told(self.plain(x))


def test_a_plain_layer_beside_is_exported_too(tmp_path):
    model, x, attributes = BesidePlain().eval(), torch.randn(2, 5, 4), torch.tensor([2, 0])
    program = exported(model, x, attributes)
    with routing(attributes), torch.no_grad():
        torch.testing.assert_close(program.module()(x, attributes), model(x))
    assert export_onnx(model, tmp_path / "m.onnx", x, attributes).largest_difference < 1e-5


def test_attributes_handed_to_a_plain_layer_are_refused_in_an_export_too():
    class Hands(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = DMoE(4, **TWO)

        def forward(self, x, attributes):
            return self.plain(x, attributes)

    with pytest.raises(Exception, match="attribute_sizes=None"):
        torch.export.export(Hands().eval(), (torch.randn(2, 5, 4), torch.tensor([0, 1])))
