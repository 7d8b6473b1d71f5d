"""How training images are changed, by a seed, so that no two epochs see the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from monai import transforms
from monai.data import get_track_meta, set_track_meta
from torch import Tensor

Augment = Literal["paper", "shift", "none"]


class Augmentation:
    """Changes an image and its mask together; made by `augment_images` or `augment_volumes`.

    Args:
        transform: of a dictionary of tensors; None leaves them alone.
    """

    def __init__(self, transform: transforms.Compose | None) -> None:
        self._transform = transform

    def __call__(self, parts: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The image (C, S), mask (1, S) and, where there is one, body (1, S), changed alike."""
        if self._transform is None:
            return parts
        self._transform.set_random_state(seed)
        with _untracked():
            changed: dict[str, Tensor] = self._transform(parts)
        return changed


def augment_images(kind: Augment, size: int) -> Augmentation:
    """How square images of `size` pixels a side are changed.

    It acts on the frame, where the paper's code acts on the crop, and rotates images bilinearly.

    Args:
        kind: "paper": half of them turned by a multiple of 90° and then flipped, a quarter rotated
            by up to 20°, a quarter left alone. "shift", of images in one pose: moved by up to a
            twelfth of the size along each axis, the border repeated. "none": left alone.
        size: rows and columns.
    """
    keys = ("image", "mask")
    if kind == "none":
        return Augmentation(None)
    if kind == "shift":
        shifts = [
            transforms.BorderPadd(keys, size // 12, mode="edge"),
            transforms.RandSpatialCropd(keys, (size, size), random_size=False),
        ]
        return Augmentation(transforms.Compose(shifts))
    turns = transforms.OneOf(
        [
            transforms.Compose(
                [
                    transforms.RandRotate90d(keys, prob=1, max_k=4),  # 1 to 4 quarter turns
                    transforms.RandAxisFlipd(keys, prob=1),
                ]
            ),
            transforms.RandRotated(
                keys,
                range_x=math.radians(20),
                prob=1,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
            transforms.Identityd(keys),
        ],
        weights=(0.5, 0.25, 0.25),
    )
    return Augmentation(turns)


def augment_volumes(kind: Augment) -> Augmentation:
    """How patches of volumes are changed.

    The paper names no augmentation; this one, with these numbers, is what MONAI's own 3D tutorials
    use.

    Args:
        kind: "paper": flipped along each axis or not, intensities scaled by up to a tenth and
            shifted by up to 0.1. "none": left alone.

    Raises:
        ValueError: `kind` is "shift".
    """
    if kind == "none":
        return Augmentation(None)
    if kind != "paper":
        raise ValueError(f"augment must be paper or none for volumes, got {kind}")
    keys = ("image", "mask", "body")
    flips = [
        transforms.RandFlipd(keys, prob=0.5, spatial_axis=axis, allow_missing_keys=True)
        for axis in range(3)
    ]
    intensities = [
        transforms.RandScaleIntensityd("image", factors=0.1, prob=1),
        transforms.RandShiftIntensityd("image", offsets=0.1, prob=1),
    ]
    return Augmentation(transforms.Compose([*flips, *intensities]))


@contextmanager
def _untracked() -> Iterator[None]:
    """Lets MONAI compute on plain tensors.

    Its own tensors, which remember what was done to them, take up to three times as long, and
    experts cannot take them.
    """
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
