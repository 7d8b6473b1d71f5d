"""Prediction keeps a record of what was routed only where somebody looks at it."""

import weakref

import pytest
import torch
from harness.volumes import CPU, FRAME
from torch import nn

from dmoe_layer import DMoE
from reference_models.models.inference import infer

pytestmark = pytest.mark.usefixtures("one_thread")


class Twice(nn.Module):
    """Calls its layer twice, and sees whether the first call's routing is there at the second."""

    def __init__(self):
        super().__init__()
        self.layer = DMoE(1, n_experts=2, k=1, channel_dim=1, attribute_sizes=3).eval()
        self.kept = []

    def forward(self, image):
        first, routed = self.layer(image, return_routing=True)
        logits = weakref.ref(routed.logits)
        del routed
        self.kept.append(logits() is not None)
        return torch.cat([first, self.layer(image)], 1)


@pytest.mark.parametrize("windows", [None, FRAME.windows(2)], ids=["images", "volumes"])
def test_a_prediction_that_nobody_observes_keeps_no_routing(windows):
    model, image, told, calls = Twice(), torch.randn(2, 1, 32, 32, 32), torch.tensor([[0], [2]]), []
    for observe in (None, lambda scope: calls.append(len(scope.routings))):
        with torch.no_grad():
            infer(model, [image], told, windows=windows, device=CPU, observe=observe)
    assert model.kept == [False, True]
    assert calls == [2]
