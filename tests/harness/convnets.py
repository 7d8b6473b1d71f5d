"""Convolutional networks of other people, in little, and the stages that experts follow."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from monai.networks.blocks import Convolution, ResidualUnit
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from torch import nn

from dmoe_layer import insert_after, routing

ATTRIBUTES = torch.tensor([0, 2])


class ConvNet(NamedTuple):
    """How a network is made, its stages' pattern, and their names and widths."""

    build: Callable[[], nn.Module]
    pattern: object
    stages: dict[str, int]
    axes: int = 2
    needs: str = "monai"


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, as in torchvision's ResNet-18."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride > 1 or cin != cout:
            shortcut = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(cout))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return self.relu(y)


class ResNet(nn.Module):
    """Stem, `layer1` to `layer4` and a linear head, by the names of torchvision's."""

    def __init__(self, widths=(4, 8, 8, 16)):
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        cin = widths[0]
        for n, width in enumerate(widths, start=1):
            blocks = BasicBlock(cin, width, 1 if n == 1 else 2), BasicBlock(width, width, 1)
            self.add_module(f"layer{n}", nn.Sequential(*blocks))
            cin = width
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(cin, 3)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _nnunet(name):
    def build():
        from dynamic_network_architectures.architectures import unet

        return getattr(unet, name)(
            1, 3, (4, 8, 8), nn.Conv2d, 3, (1, 2, 2), 1, 2, 1, conv_bias=True,
            norm_op=nn.InstanceNorm2d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True}, deep_supervision=True,
        )  # fmt: skip

    stages = {"encoder.stages.0": 4, "encoder.stages.1": 8, "encoder.stages.2": 8}
    needs = "dynamic_network_architectures"
    return ConvNet(build, "encoder.stages.*", stages, needs=needs)


def _dynunet(**options):
    return ConvNet(
        lambda: DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], **options),
        lambda name, module: name in ("input_block", "downsamples.0", "bottleneck"),
        {"input_block": 4, "downsamples.0": 8, "bottleneck": 16},
    )


_UNET = ("model.0", "model.1.submodule.0", "model.1.submodule.1.submodule")

ZOO = {
    "monai UNet, residual": ConvNet(
        lambda: UNet(2, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1),
        lambda name, module: isinstance(module, ResidualUnit) and ".2." not in name,
        dict(zip(_UNET, (4, 8, 16), strict=True)),
    ),
    "monai UNet, 3D": ConvNet(
        lambda: UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2)),
        lambda module: isinstance(module, Convolution) and not module.is_transposed,
        dict(zip(_UNET, (4, 8, 16), strict=True)),
        axes=3,
    ),
    "monai SegResNet": ConvNet(
        lambda: SegResNet(2, 8, 1, 2, blocks_down=(1, 1, 2), blocks_up=(1, 1)),
        "down_layers.*",
        {f"down_layers.{n}": 8 * 2**n for n in range(3)},
    ),
    "monai DynUNet": _dynunet(deep_supervision=True, deep_supr_num=1),
    "monai DynUNet, residual": _dynunet(res_block=True),
    "monai BasicUNet": ConvNet(
        lambda: BasicUNet(2, 1, 2, (4, 4, 8, 8, 16, 4)),
        "down_*",
        {"down_1": 4, "down_2": 8, "down_3": 8, "down_4": 16},
    ),
    "nnU-Net, plain": _nnunet("PlainConvUNet"),
    "nnU-Net, residual": _nnunet("ResidualEncoderUNet"),
    "ResNet": ConvNet(ResNet, "layer?", {"layer1": 4, "layer2": 8, "layer3": 8, "layer4": 16}),
}
INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(not importlib.util.find_spec(net.needs), reason=net.needs)
    )
    for name, net in ZOO.items()
]


def made(name):
    """A network of the zoo, images for it, and what insert_after has put in it."""
    net = ZOO[name]
    model = net.build()
    inserted = insert_after(model, net.pattern, n_experts=4, k=2, attribute_sizes=3)
    return model, images(name), inserted


def images(name, batch=2):
    return torch.randn(batch, 1, *[32] * ZOO[name].axes)


def outputs(model, x, attributes=ATTRIBUTES):
    """All that the network gives in the scope, in one row a sample."""
    with routing(attributes):
        y = model(x)
    return flat(y)


def flat(y):
    parts = y if isinstance(y, (list, tuple)) else [y]
    return torch.cat([part.flatten(1) for part in parts], dim=1)
