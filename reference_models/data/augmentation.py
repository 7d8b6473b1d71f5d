"""Changes training images at random, by a seed, so that no two epochs see the same images."""

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
    """Changes an image and its mask together; `augment_images` and `augment_volumes` make it.

    Args:
        transform: a transform of a dictionary of tensors; None changes nothing.
    """

    def __init__(self, transform: transforms.Compose | None) -> None:
        self._transform = transform

    def __call__(self, parts: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Changes the image (C, S), mask (1, S) and, if there is one, body (1, S) in the same
        way."""
        if self._transform is None:
            return parts
        self._transform.set_random_state(seed)
        with _untracked():
            changed: dict[str, Tensor] = self._transform(parts)
        return changed


def augment_images(kind: Augment, size: int) -> Augmentation:
    """Makes the augmentation of square images with `size` pixels a side.

    It changes the frame, where the paper's code changes the crop, and rotates images bilinearly.

    Args:
        kind: "paper": half of the images are turned by a multiple of 90° and then flipped, a
            quarter is rotated by up to 20°, and a quarter is not changed. "shift": every image is
            moved by up to a twelfth of the size along each axis, and its border is repeated; for
            images in one pose. "none": no image is changed.
        size: number of rows and columns.
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
    """Makes the augmentation of patches of volumes.

    The paper names no augmentation for volumes. MONAI's 3D tutorials use this one, with these
    numbers.

    Args:
        kind: "paper": each axis is flipped or not, and intensities are scaled by up to a tenth and
            shifted by up to 0.1. "none": no patch is changed.

    Raises:
        ValueError: `kind` is "shift".
    """
    if kind == "none":
        return Augmentation(None)
    if kind != "paper":
        raise ValueError(f"augment: got {kind}, expected paper or none for volumes")
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

    MONAI's own tensors, which record every transform, take up to three times as long, and experts
    do not accept them.
    """
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
