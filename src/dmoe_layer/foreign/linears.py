"""The linear layers of a block, whatever their class: their weights, biases and widths."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear layer for every token by itself.

    That is ``nn.Linear``, a 1x1 convolution, and the ``Conv1D`` of Hugging Face's GPT-2 family.
    """
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return is_conv1d or isinstance(module, nn.Linear) or is_1x1_convolution(module)


def is_1x1_convolution(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS) and _is_1x1(module) and module.groups == 1


def is_spatial_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution that mixes tokens or makes new ones."""
    return isinstance(module, _CONVOLUTIONS + _TRANSPOSED) and not _is_1x1(module)


def _is_1x1(convolution: Any) -> bool:
    """Whether a convolution computes every token by itself, and neither moves nor adds any."""
    unpadded = isinstance(convolution.padding, str) or not any(convolution.padding)
    return unpadded and {*convolution.kernel_size, *convolution.stride} == {1}


def describe_convolution(convolution: Any) -> str:
    """Describes a convolution for an error, such as "depthwise 3x3 convolution"."""
    depthwise = 1 < convolution.groups == convolution.in_channels
    size = "x".join(map(str, convolution.kernel_size))
    return f"{'depthwise ' * depthwise}{size} convolution"


def shown_linears(block: nn.Module) -> str:
    """Describes the linear layers of a block, such as "'fc1' 8 -> 32, 'fc2' 32 -> 8"."""
    found = [(name, module) for name, module in block.named_modules() if is_linear(module)]
    texts = [f"{name or 'itself'!r} {' -> '.join(map(str, widths_of(m)))}" for name, m in found]
    return ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")


def widths_of(linear: Any) -> tuple[int, int]:
    """The widths (in, out), without reading a weight that is computed when it is read."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    if isinstance(linear, _CONVOLUTIONS):
        return linear.in_channels, linear.out_channels
    width_in, width_out = linear.weight.shape
    return width_in, width_out


def weight_shape_of(linear: Any) -> tuple[int, ...]:
    """The shape that the weight of a linear layer should have."""
    width_in, width_out = widths_of(linear)
    if isinstance(linear, _CONVOLUTIONS):
        return (width_out, width_in, *linear.kernel_size)
    return (width_out, width_in) if isinstance(linear, nn.Linear) else (width_in, width_out)


def weight_of(linear: Any) -> Tensor:
    """The weight as (out, in), like that of ``nn.Linear``; ``Conv1D`` stores it transposed."""
    weight: Tensor = linear.weight
    if isinstance(linear, _CONVOLUTIONS):
        return weight.flatten(1)
    return weight if isinstance(linear, nn.Linear) else weight.mT


def bias_of(linear: Any) -> Tensor | None:
    """The bias, (out,), or None, also if the layer has no such attribute."""
    bias: Tensor | None = getattr(linear, "bias", None)
    return bias


def apply_linear(linear: Any, x: Tensor) -> Tensor:
    """Computes a linear layer from its weight and bias, whatever its own forward does."""
    if isinstance(linear, _CONVOLUTIONS):
        return F.linear(x.movedim(1, -1), weight_of(linear), bias_of(linear)).movedim(-1, 1)
    return F.linear(x, weight_of(linear), bias_of(linear))
