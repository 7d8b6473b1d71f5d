"""The 3D network's layers, whose kernels are compiled before gpu.sh times it."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import __main__ as command
from dmoe_layer import DMoE, routing

pytest.importorskip("monai")  # of whose blocks the network is made
from benchmarks.volumes.steps import NETWORKS


def test_the_stages_that_are_prewarmed_are_those_of_the_network_and_the_patch_of_gpu_sh():
    script = Path(command.__file__).parents[1] / "gpu.sh"
    (patch,) = re.findall(r"--patches (\S+)", script.read_text(encoding="utf-8"))
    batch, *sides = map(int, patch.split("x"))
    network, found = NETWORKS["ours"]().to("meta"), []
    for module in network.modules():
        if isinstance(module, DMoE):
            module.register_forward_pre_hook(
                lambda layer, inputs: found.append((layer.dim, inputs[0][:, 0].numel()))
            )
    with routing(torch.tensor([0])):
        network(torch.empty(batch, 1, *sides, device="meta"))
    assert tuple(found) == command.NETWORK_STAGES
