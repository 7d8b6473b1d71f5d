"""From native resolution to the network's square and back, keeping the aspect ratio.

Shapes: C channels, K classes, S spatial axes (rows, columns), both of length `size` in a frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Framing:
    """A central crop, padded with zeros to a square and resized.

    Args:
        size: rows and columns of the frame.
        crop: longest side of the crop in native pixels; None, or more than the image has, keeps
            all of it.

    Raises:
        ValueError: a size or crop below 1.

    Example:
        >>> frame_CS, mask_S = Framing(224, crop=512).apply(
        ...     np.zeros((3, 512, 664), np.float32), np.zeros((512, 664), np.uint8)
        ... )
        >>> frame_CS.shape, mask_S.shape
        ((3, 224, 224), (224, 224))
    """

    size: int
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or (self.crop is not None and self.crop < 1):
            raise ValueError(
                f"size and crop must be 1 or more, got size={self.size}, crop={self.crop}"
            )

    def apply(self, image_CS: np.ndarray, mask_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image as float32 (C, size, size) and the mask as uint8 (size, size).

        Images are resized bilinearly, with antialiasing where they shrink; a mask takes the label
        at each pixel's middle, so that no label is invented and none is shifted.

        Raises:
            ValueError: image and mask differ in size.
        """
        if image_CS.shape[1:] != mask_S.shape:
            raise ValueError(f"image of {image_CS.shape[1:]} but mask of {mask_S.shape} pixels")
        window, side = self._window(mask_S.shape)
        padding = _padding(window, side)
        image_1CHW = torch.from_numpy(image_CS[:, window[0], window[1]].astype(np.float32))[None]
        mask_11HW = torch.from_numpy(mask_S[window].astype(np.uint8))[None, None]
        size = (self.size, self.size)
        framed_1CHW = F.interpolate(
            F.pad(image_1CHW, padding), size, mode="bilinear", align_corners=False, antialias=True
        )
        labels_11HW = F.interpolate(F.pad(mask_11HW, padding), size, mode="nearest-exact")
        return framed_1CHW[0].numpy(), labels_11HW[0, 0].numpy()

    def restore(self, logits_KHW: Tensor, native_size: tuple[int, ...]) -> np.ndarray:
        """The labels (uint8, `native_size`) that a frame's logits stand for; 0 outside the crop.

        Raises:
            ValueError: the logits are not of this framing's size.
        """
        if logits_KHW.shape[1:] != (self.size, self.size):
            raise ValueError(
                f"logits must be (K, {self.size}, {self.size}), got {tuple(logits_KHW.shape)}"
            )
        window, side = self._window(native_size)
        left, right, top, bottom = _padding(window, side)
        native_KHW = F.interpolate(
            logits_KHW[None].float(), (side, side), mode="bilinear", align_corners=False
        )[0]
        inside_KHW = native_KHW[:, top : side - bottom, left : side - right]
        mask_S = np.zeros(native_size, np.uint8)
        mask_S[window] = inside_KHW.argmax(0).to(torch.uint8).cpu().numpy()
        return mask_S

    def _window(self, native_size: tuple[int, ...]) -> tuple[tuple[slice, ...], int]:
        """Rows and columns that are kept, and the side of the square around them."""
        kept = [min(length, self.crop or length) for length in native_size]
        starts = [(length - k) // 2 for length, k in zip(native_size, kept, strict=True)]
        window = tuple(slice(start, start + k) for start, k in zip(starts, kept, strict=True))
        return window, max(kept)


def _padding(window: tuple[slice, ...], side: int) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, as `F.pad` takes them."""
    rows, columns = (side - (axis.stop - axis.start) for axis in window)
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
