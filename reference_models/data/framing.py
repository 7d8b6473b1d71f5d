"""From native resolution to what a network sees, and back; for 2D images, to a square.

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
    """A sample as a network sees it.

    Args:
        image_CS: float32.
        mask_S: uint8, None where the sample has none.
        body_S: bool, what of it the experts are to see; None where that is everything.
    """

    image_CS: np.ndarray
    mask_S: np.ndarray | None = None
    body_S: np.ndarray | None = None


class Framing(ABC):
    """How samples become frames; a frozen dataclass, whose fields are part of a cached frame's
    name."""

    one_size: ClassVar[bool]
    """Whether all frames have one size, so that whole ones go into a batch together."""

    @property
    @abstractmethod
    def affine(self) -> np.ndarray | None:
        """From a frame's voxels to mm (4, 4); None of images."""

    @abstractmethod
    def augmentation(self, kind: Augment) -> Augmentation:
        """How such frames, or patches of them, are changed in training.

        Raises:
            ValueError: such frames cannot be changed so.
        """

    @abstractmethod
    def apply(self, sample: Sample) -> Frame:
        """What the network sees of a sample."""

    @abstractmethod
    def restore(self, logits_KS: Tensor, sample: Sample) -> np.ndarray:
        """The labels (uint8, the sample's native size) that a frame's logits stand for.

        Raises:
            ValueError: the logits are not of this framing's size.
        """


@dataclass(frozen=True)
class ImageFraming(Framing):
    """A central crop, padded with zeros to a square and resized.

    Args:
        size: rows and columns of the frame.
        crop: longest side of the crop in native pixels; None, or more than the image has, keeps
            all of it.

    Raises:
        ValueError: a size or crop below 1.

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
            raise ValueError(
                f"size and crop must be 1 or more, got size={self.size}, crop={self.crop}"
            )

    @property
    def affine(self) -> None:
        return None

    def augmentation(self, kind: Augment) -> Augmentation:
        return augment_images(kind, self.size)

    def apply(self, sample: Sample) -> Frame:
        """The image as float32 (C, size, size) and the mask as uint8 (size, size).

        Images are resized bilinearly, with antialiasing where they shrink; a mask as of
        `resampled_labels`.
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
        """As of `Framing`: resized bilinearly; 0 outside the crop."""
        if logits_KS.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"logits must be (K, {self.size}, {self.size}), got {tuple(logits_KS.shape)}"
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
        """Rows and columns that are kept, and the side of the square around them."""
        kept = [min(length, self.crop or length) for length in native_size]
        starts = [(length - k) // 2 for length, k in zip(native_size, kept, strict=True)]
        window = tuple(slice(start, start + k) for start, k in zip(starts, kept, strict=True))
        return window, max(kept)


def resampled_labels(mask_S: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A mask of 2 or 3 axes resized to `size`: uint8, by its labels' linearly interpolated shares.

    The nearest pixel's label would shift a mask by half a pixel wherever an even number of them
    becomes one, since middles then lie between two. Of equal shares the highest label wins, so that
    the background does not gain; `IGNORED` is the highest.
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
    """Left, right, top and bottom, as `F.pad` takes them."""
    rows, columns = (side - (axis.stop - axis.start) for axis in window)
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
