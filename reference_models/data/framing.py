"""Framing: maps samples at native resolution to a network's input, and predictions back.

`ImageFraming` maps 2D images to squares; `VolumeFraming` in `grid` maps volumes to one grid.

Shapes: C channels, K classes, S spatial axes (rows, columns; in 3D those of the grid).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .augmentation import Augment, Augmentation, augment_images
from .cases import IGNORED, Sample, highest_label


@dataclass(frozen=True)
class Frame:
    """A sample as a network receives it.

    Args:
        image_CS: the image, float32.
        mask_S: the mask, uint8; None if the sample has none.
        body_S: bool, which pixels go to the experts; None if all do.
    """

    image_CS: np.ndarray
    mask_S: np.ndarray | None = None
    body_S: np.ndarray | None = None


class Framing(ABC):
    """Maps samples to frames. Subclasses are frozen dataclasses; their fields are part of the name
    of a cached frame."""

    one_size: ClassVar[bool]
    """Whether all frames have one size, so that whole ones go into a batch together."""

    @property
    @abstractmethod
    def affine(self) -> np.ndarray | None:
        """The affine (4, 4) from a frame's voxels to mm; None for images."""

    @abstractmethod
    def augmentation(self, kind: Augment) -> Augmentation:
        """Makes the augmentation of such frames, or of patches of them.

        Raises:
            ValueError: this kind of augmentation is not for such frames.
        """

    @abstractmethod
    def apply(self, sample: Sample) -> Frame:
        """Makes the frame of a sample."""

    @abstractmethod
    def restore(self, logits_KS: Tensor, sample: Sample) -> np.ndarray:
        """Turns a frame's logits into labels (uint8) at the sample's native size.

        Raises:
            ValueError: the logits do not have the size of the frame.
        """


@dataclass(frozen=True)
class ImageFraming(Framing):
    """Crops the centre of an image, pads it with zeros to a square, and resizes it.

    Args:
        size: number of rows and columns of the frame.
        crop: longest side of the crop in native pixels. None, or more than the image has, crops
            nothing.

    Raises:
        ValueError: the size or the crop is below 1.

    Example:
        >>> image_CS, mask_S = np.zeros((3, 512, 664), np.float32), np.zeros((512, 664), np.uint8)
        >>> sample = Sample("a", image_CS, mask_S, (0,), (1.0, 1.0))
        >>> frame = ImageFraming(224, crop=512).apply(sample)
        >>> frame.image_CS.shape, frame.mask_S.shape
        ((3, 224, 224), (224, 224))
    """

    one_size: ClassVar[bool] = True

    size: int
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.crop is not None and self.crop < 1):
            raise ValueError(f"size, crop: got {self.size} and {self.crop}, expected 1 or more")

    @property
    def affine(self) -> None:
        return None

    def augmentation(self, kind: Augment) -> Augmentation:
        return augment_images(kind, self.size)

    def apply(self, sample: Sample) -> Frame:
        """Makes the image, float32 (C, size, size), and the mask, uint8 (size, size).

        Images are resized bilinearly, with antialiasing if they shrink. `resampled_labels` resizes
        the mask.
        """
        window, side = self._window(sample.native_size)
        padding = _padding(window, side)
        size = (self.size, self.size)
        image_CS = sample.image_CS[:, window[0], window[1]].astype(np.float32)
        framed_1CHW = F.interpolate(
            F.pad(torch.from_numpy(image_CS)[None], padding),
            size,
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        if sample.mask_S is None:
            return Frame(framed_1CHW[0].numpy())
        left, right, top, bottom = padding
        mask_S = np.pad(sample.mask_S[window], ((top, bottom), (left, right)))
        return Frame(framed_1CHW[0].numpy(), resampled_labels(mask_S, size))

    def restore(self, logits_KS: Tensor, sample: Sample) -> np.ndarray:
        """Does as `Framing.restore`: logits are resized bilinearly; labels outside the crop are "
        "0."""
        if logits_KS.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"logits: got shape {tuple(logits_KS.shape)}, expected (K, {self.size}, "
                f"{self.size})"
            )
        window, side = self._window(sample.native_size)
        left, right, top, bottom = _padding(window, side)
        native_KHW = F.interpolate(
            logits_KS[None].float(), (side, side), mode="bilinear", align_corners=False
        )[0]
        inside_KHW = native_KHW[:, top : side - bottom, left : side - right]
        mask_S = np.zeros(sample.native_size, np.uint8)
        mask_S[window] = inside_KHW.argmax(0).to(torch.uint8).cpu().numpy()
        return mask_S

    def _window(self, native_size: tuple[int, ...]) -> tuple[tuple[slice, ...], int]:
        """Gives the rows and columns of the crop, and the side of the square around them."""
        kept = [min(length, self.crop or length) for length in native_size]
        starts = [(length - k) // 2 for length, k in zip(native_size, kept, strict=True)]
        window = tuple(slice(start, start + k) for start, k in zip(starts, kept, strict=True))
        return window, max(kept)


def resampled_labels(mask_S: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resizes a mask (uint8, 2 or 3 axes) to `size` by its labels' linearly interpolated shares.

    Nearest-neighbour resizing would shift a mask by half a pixel whenever an even number of pixels
    becomes one, since the middle then lies between two pixels. If shares are equal, the highest
    label wins, so that the background does not gain; `IGNORED` is the highest.
    """
    mask_S = mask_S.astype(np.uint8, copy=False)
    if mask_S.shape == size:
        return mask_S
    mode = "bilinear" if mask_S.ndim == 2 else "trilinear"
    labels_S, most_S = np.zeros(size, np.uint8), np.zeros(size, np.float32)
    for label in (*range(highest_label(mask_S) + 1), IGNORED):
        own_S = mask_S == label
        if own_S.any():
            share_11S = torch.from_numpy(own_S.astype(np.float32))[None, None]
            share_11S = F.interpolate(share_11S, size, mode=mode, align_corners=False)
            share_S = share_11S[0, 0].numpy()
            labels_S[share_S >= most_S] = label
            np.maximum(most_S, share_S, out=most_S)
    return labels_S


def _padding(window: tuple[slice, ...], side: int) -> tuple[int, int, int, int]:
    """Gives the padding left, right, top and bottom, in the order of `F.pad`."""
    rows, columns = (side - (axis.stop - axis.start) for axis in window)
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
