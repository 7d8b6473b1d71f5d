"""A network's answer for whole frames: in one call, or window by window where they are volumes.

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
    model: nn.Module, inputs: Sequence[Tensor], told_BA: Tensor, *, record: bool = True
) -> tuple[Tensor, routing]:
    """A network's logits (B, K, S), and the closed scope with what it routed, unless not recorded.

    The scope is the one way in which a network is told the attributes: experts read it by
    themselves, other modules by `routing.attribute_values`.
    """
    with routing(told_BA, record=record) as scope:
        logits: Tensor = model(*inputs)
    return logits, scope


def infer(
    model: nn.Module,
    inputs: Sequence[Tensor],
    told_BA: Tensor,
    *,
    windows: Windows | None,
    device: torch.device,
    observe: Callable[[routing], object] | None = None,
) -> Tensor:
    """Logits (B, K, S) of framed samples; without gradients.

    Images are answered in one call, on the device. A volume is answered in windows, which overlap
    and are blended with Gaussian weights, highest in a window's middle, into logits on the CPU: the
    device holds no more than `windows.at_once` windows at once, and the CPU, beside the inputs, 4
    bytes a voxel for each class and 4 for the weights. Every window is told its sample's
    attributes, and its routings are let go of before the next one's.

    A network whose answer for a voxel depends on a neighbourhood alone gives, wherever no window
    cuts that off, what it gives for the whole volume. One with instance norm depends on all of a
    window, so that it does so only where a window holds the whole volume.

    Args:
        model: in eval mode on `device`.
        inputs: `Batch.inputs`, image (B, C, S) and, where there is one, body (B, S); of volumes
            on the CPU.
        told_BA: the attributes that each sample's router is told.
        windows: of volumes; None of images.
        device: where the network computes.
        observe: is handed each call's closed scope, such as `ExpertLoads.add`. A voxel that lies in
            several windows is in the scopes of all of them.

    Raises:
        ValueError: a volume is smaller than a window.
    """

    def answer(parts: Sequence[Tensor], told_WA: Tensor) -> Tensor:
        moved = [part.to(device) for part in parts]
        logits, scope = forward_with_attributes(
            model, moved, told_WA.to(device), record=observe is not None
        )
        if observe is not None:
            observe(scope)
        return logits

    def answer_windows(image_WCS: Tensor, places: Sequence[Sequence[slice]]) -> Tensor:
        cuts = [(sample, *axes) for sample, _, *axes in places]
        bodies = (torch.cat([body_BS[cut] for cut in cuts]) for body_BS in inputs[1:])
        return answer((image_WCS, *bodies), window_attributes(told_BA, places))

    if windows is None:
        return answer(inputs, told_BA)
    size = tuple(inputs[0].shape[2:])
    if any(length < side for length, side in zip(size, windows.size, strict=True)):
        # They would be padded with zeros, which are no air in a CT.
        raise ValueError(
            f"inputs: got volumes of {size}, expected at least the patch {windows.size}."
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
    return cast(Tensor, answer_BKS)  # as that of `answer_windows` is one
