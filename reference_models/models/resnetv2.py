"""The convolutional stem of TransUNet: the first three stages of a ResNet-50, with three skips.

The network is TransUNet's. It takes Google's weights, although Google's network differs: there the
pooling and the strided convolutions pad at the end ("SAME"), the shortcuts' norms have 32 groups
and an epsilon of 1e-6, and the epsilon of the weights is outside the root.

Shapes: B samples, C channels, H rows, W columns, O and I output and input channels of a
convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StdConv2d(nn.Conv2d):
    """A convolution without bias, whose kernels are normalised to mean 0 and variance 1."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, stride, size // 2, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight_OIHW = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x_BCHW, weight_OIHW, None, self.stride, self.padding)


class Bottleneck(nn.Module):
    """A residual unit of 1×1, 3×3 (with the stride) and 1×1 convolutions, each with a group "
    "norm."""

    def __init__(self, cin: int, cmid: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        cout = 4 * cmid
        self.conv1, self.gn1 = StdConv2d(cin, cmid, 1), nn.GroupNorm(groups, cmid, 1e-6)
        self.conv2, self.gn2 = StdConv2d(cmid, cmid, 3, stride), nn.GroupNorm(groups, cmid, 1e-6)
        self.conv3, self.gn3 = StdConv2d(cmid, cout, 1), nn.GroupNorm(groups, cout, 1e-6)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential()
            self.shortcut.add_module("conv", StdConv2d(cin, cout, 1, stride))
            self.shortcut.add_module("gn", nn.GroupNorm(cout, cout, 1e-5))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.gn1(self.conv1(x_BCHW)))
        y_BCHW = F.relu(self.gn2(self.conv2(y_BCHW)))
        return F.relu(self.shortcut(x_BCHW) + self.gn3(self.conv3(y_BCHW)))


class ResNetV2(nn.Module):
    """A root and three stages, at 1/2, 1/4, 1/8 and 1/16 of the image's size.

    Args:
        in_channels: number of channels of an image.
        width: number of channels of the root; the stages have 4, 8 and 16 times as many.
        units: number of residual units of each stage.
        groups: number of groups of the group norms.
    """

    def __init__(
        self, in_channels: int, width: int, units: tuple[int, int, int], groups: int
    ) -> None:
        super().__init__()
        self.root = nn.Sequential()
        self.root.add_module("conv", StdConv2d(in_channels, width, 7, 2))
        self.root.add_module("gn", nn.GroupNorm(groups, width, 1e-6))
        self.root.add_module("relu", nn.ReLU())
        self.stages = nn.ModuleList()
        cin = width
        for stage, n_units in enumerate(units):
            cmid = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (n_units - 1)
            self.stages.append(
                nn.Sequential(
                    *(
                        Bottleneck(cin if unit == 0 else 4 * cmid, cmid, groups, stride)
                        for unit, stride in enumerate(strides)
                    )
                )
            )
            cin = 4 * cmid

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Computes the map at 1/16, and the maps at 1/8, 1/4 and 1/2 for the decoder."""
        root = self.root(image_BCHW)
        quarter = self.stages[0](F.max_pool2d(root, 3, stride=2))
        eighth = self.stages[1](quarter)
        # The pooling does not pad, so that its map lacks the last row and column. The next stage
        # uses the map as it is; the skip is padded with zeros.
        skips = [eighth, F.pad(quarter, (0, 1, 0, 1)), root]
        return self.stages[2](eighth), skips
