"""Blocks shaped like those of today's models, and how a layer made of one is held against it."""

import torch
import torch.nn.functional as F
from torch import nn

from dmoe_layer import DMoE

from .mlps import D, H, assert_close, strong


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class StarRelu(nn.Module):
    """CAFormer's, which learns a scale and a shift."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale * F.relu(x) ** 2 + self.shift


class Chunked(nn.Module):
    """One linear layer gives both halves: DINOv2-giant's, timm's GluMlp, MONAI's GEGLU."""

    def __init__(self, act=F.silu, gate=0, biases=(True, True), linear=nn.Linear, between=None):
        super().__init__()
        self.act, self.gate, self.axis = act, gate, -1 if linear is nn.Linear else 1
        self.weights_in = linear(D, 2 * H, bias=biases[0])
        self.between = between or nn.Identity()
        self.weights_out = linear(H, D, bias=biases[1])

    def forward(self, x):
        halves = self.weights_in(x).chunk(2, self.axis)
        h = self.act(halves[self.gate]) * halves[1 - self.gate]
        return self.weights_out(self.between(h))


class Paired(nn.Module):
    """A linear layer for each half, made in any order: Llama's, T5 v1.1's, DINOv3's, timm's."""

    def __init__(self, act=F.silu, order=("gate", "up", "down"), biases=(), hidden=H, between=None):
        super().__init__()
        for name in order:
            widths = (hidden, D) if name == "down" else (D, hidden)
            setattr(self, name, nn.Linear(*widths, bias=name in biases))
        self.act, self.between = act, between or nn.Identity()

    def forward(self, x):
        return self.down(self.between(self.act(self.gate(x)) * self.up(x)))


def pointwise(axes):
    """A convolution of size 1."""
    return lambda n_in, n_out, bias=True: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        n_in, n_out, 1, bias=bias
    )


def convolutional_mlp(act=None, axes=2, biases=(True, True)):
    """As in PoolFormer, and in ConvNeXt and CoAtNet of timm with conv_mlp."""
    conv, act = pointwise(axes), act or nn.GELU()
    return nn.Sequential(conv(D, H, biases[0]), act, conv(H, D, biases[1]))


def maps(*size):
    return torch.randn(2, D, *(size or (3, 5)))


def assert_upcycles(block, activation, x, hidden=H, backend="auto", experts=8):
    """In eval every layer made of the block computes what the block does, whatever k is."""
    block = strong(block).eval()
    for each in block.modules():  # strong() knows linear layers
        if isinstance(each, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            nn.init.normal_(each.weight, std=min(each.weight.shape[:2]) ** -0.5)
            if each.bias is not None:
                nn.init.normal_(each.bias)
    for k in {1, 2, experts}:
        layer = DMoE.from_mlp(block, experts, k, attribute_sizes=3, backend=backend)
        assert (layer.activation, layer.dim, layer.hidden_dim) == (activation, D, hidden)
        with torch.no_grad():
            assert_close(layer(x, torch.tensor([0, 2])), block(x.clone()))
