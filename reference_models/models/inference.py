"""Computes a network's logits for whole frames: images in one call, volumes window by window.

Shapes: B samples, W windows at a time, C channels, K classes, S spatial axes, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from dmoe_layer import routing, window_attributes

from ..data.patches import Windows


def forward_with_attributes(
    model: nn.Module, inputs: Sequence[Tensor], attributes_BA: Tensor, *, record: bool = True
) -> tuple[Tensor, routing]:
    """Computes a network's logits (B, K, S), and returns them with the closed scope.

    A network receives its attributes only from the scope: experts read it by themselves, other
    modules by `routing.attribute_values`. With `record`, the scope holds the routings afterwards.
    """
    with routing(attributes_BA, record=record) as scope:
        logits: Tensor = model(*inputs)
    return logits, scope


def infer(
    model: nn.Module,
    inputs: Sequence[Tensor],
    attributes_BA: Tensor,
    *,
    windows: Windows | None,
    device: torch.device,
    observe: Callable[[routing], object] | None = None,
) -> Tensor:
    """Computes logits (B, K, S) of framed samples, without gradients.

    Images take one call on the device. Volumes are divided into windows, which overlap and are
    blended with Gaussian weights, highest in the middle of a window, into logits on the CPU. The
    device holds at most `windows.at_once` windows at a time. The CPU holds, besides the inputs, 4
    bytes for each class and voxel, and 4 bytes for the weight of each voxel. Every window receives
    the attributes of its sample, and its routings are released before those of the next window.

    If a network's logit for a voxel depends only on a neighbourhood, it is the same as for the
    whole volume wherever no window cuts the neighbourhood off. With instance norm it depends on the
    whole window, so that it is the same only if a window holds the whole volume.

    Args:
        model: the network, in eval mode on `device`.
        inputs: `Batch.inputs`: image (B, C, S) and, if there is one, body (B, S). For volumes both
            are on the CPU.
        attributes_BA: the attributes that the network receives for each sample.
        windows: the windows of volumes; None for images.
        device: the device that computes.
        observe: receives the closed scope of each call, such as `ExpertLoads.add`. A voxel that
            lies in several windows is in the scopes of all of them.

    Raises:
        ValueError: a volume is smaller than a window.
    """

    def answer(parts: Sequence[Tensor], attributes_WA: Tensor) -> Tensor:
        moved = [part.to(device) for part in parts]
        logits, scope = forward_with_attributes(
            model, moved, attributes_WA.to(device), record=observe is not None
        )
        if observe is not None:
            observe(scope)
        return logits

    def answer_windows(image_WCS: Tensor, places: Sequence[Sequence[slice]]) -> Tensor:
        cuts = [(sample, *axes) for sample, _, *axes in places]
        bodies = (torch.cat([body_BS[cut] for cut in cuts]) for body_BS in inputs[1:])
        return answer((image_WCS, *bodies), window_attributes(attributes_BA, places))

    if windows is None:
        return answer(inputs, attributes_BA)
    size = tuple(inputs[0].shape[2:])
    if any(length < side for length, side in zip(size, windows.size, strict=True)):
        # They would be padded with zeros, which do not mean air in a CT.
        raise ValueError(
            f"inputs: got volumes of {size} voxels, expected at least the patch {windows.size}."
        )
    answer_BKS = sliding_window_inference(
        inputs[0],
        windows.size,
        windows.at_once,
        answer_windows,
        overlap=windows.overlap,
        mode="gaussian",
        sw_device=device,
        device=torch.device("cpu"),
        with_coord=True,
    )
    return cast(Tensor, answer_BKS)  # a tensor, since `answer_windows` returns one
