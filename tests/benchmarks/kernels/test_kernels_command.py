"""``python -m benchmarks.kernels``: its help compiles nothing, and its stages are the network's."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import __main__ as command
from benchmarks.volumes.steps import NETWORKS
from dmoe_layer import DMoE, routing


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--fast"], 2)])
def test_help_and_unknown_words_compile_nothing(words, status, monkeypatch, capsys):
    monkeypatch.setattr(command, "kernel_rows", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as ended:
        command.main(words)
    assert ended.value.code == status
    said = capsys.readouterr()
    assert "usage: python -m benchmarks.kernels" in said.out + said.err


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
