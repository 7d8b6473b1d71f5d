"""Layers made of gated MLPs, of convolutions and with CLIP's activation, in the Triton backend."""

import pytest
import torch
import torch.nn.functional as F
from harness.kernels import HERE

from dmoe_layer import DMoE

pytest.importorskip("monai")  # of whose models the harness has some
from harness.blocks import (
    Chunked,
    Paired,
    QuickGelu,
    convolutional_mlp,
    maps,
    pointwise,
)
from harness.mlps import D, assert_close, mlp, strong


def tokens():
    return torch.randn(2, 20, D)


def image():
    return maps(4, 5)


BLOCKS = {
    "two halves": (lambda: Chunked(F.gelu, gate=1, biases=(True, False)), tokens),
    "two linear layers": (lambda: Paired(biases=("up", "down")), tokens),
    "convolutions": (convolutional_mlp, image),
    "gated convolutions": (lambda: Chunked(linear=pointwise(2)), image),
    "CLIP's": (lambda: mlp(QuickGelu()), tokens),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_kernels_compute_what_the_upcycled_block_did(name):
    build, given = BLOCKS[name]
    block, x = strong(build()).eval(), given()
    with torch.no_grad():
        expected = block(x)
        layer = DMoE.from_mlp(block, attribute_sizes=3, backend="triton").to(HERE)
        y = layer(x.to(HERE), torch.tensor([0, 2], device=HERE))
    assert_close(y.cpu(), expected)
