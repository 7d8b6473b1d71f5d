"""Settings of what a network sees, which build the framing: of images and of volumes."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..data.augmentation import Augment
from ..data.framing import Framing, ImageFraming
from ..data.grid import VolumeFraming
from ..data.patches import Patches, Windows
from ..errors import RunError

_Self = TypeVar("_Self", bound="FramingSettings")

# The longest side of the central crop in the paper's code, by data set.
_PAPER_CROPS: dict[str, int | Literal["whole"]] = {
    "fairseg": 512,
    "ham10000": 1024,
    "folder": "whole",  # whose images the paper does not know
}
PAPER_PATCH = (384, 384, 128)


class FramingSettings(ABC):
    """What a network sees of a sample, whichever kind it is; a frozen dataclass."""

    augment: Augment
    body: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Pixels (rows, columns) or voxels that the network sees at once."""

    @abstractmethod
    def resolve(self: _Self, data: str) -> _Self:
        """These settings with "paper" as numbers, those of the data set of that name.

        Raises:
            RunError: a setting is out of range, or the paper says nothing about these data.
        """

    def resolve_grid(
        self: _Self,
        median_mm: tuple[float, float, float] | None,
        median_size: tuple[float, float, float] | None,
    ) -> _Self:
        """These settings with what the data's volumes decide as numbers, if they decide anything.

        Args:
            median_mm: the median of the data's voxels; None of images.
            median_size: the median number of them along the axes; None of images.
        """
        return self

    @abstractmethod
    def build(self) -> Framing:
        """From native resolution to the network's and back, of resolved settings."""

    def training_patches(self) -> Patches | None:
        """Which parts of a frame training sees; None: all of it."""
        return None

    def windows(self, at_once: int) -> Windows | None:
        """How a frame is answered, so many windows at a time; None: in one call."""
        return None


@dataclass(frozen=True)
class ImageFramingSettings(FramingSettings):
    """What a 2D network sees of an image."""

    size: int = 224
    """Pixels a side that the network sees."""
    crop: int | Literal["paper", "whole"] = "paper"
    """Native pixels a side of the central crop, or whole; paper: 512 for FairSeg, 1024 for
    HAM10000, whole for a folder."""
    augment: Literal["paper", "shift", "none"] = "paper"
    """How training images are varied. paper: turned, flipped and rotated as in the paper's code;
    shift: moved by up to a twelfth of the size, where all are in one pose."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    def resolve(self, data: str) -> ImageFramingSettings:
        crop = self.crop
        if crop == "paper":
            if data not in _PAPER_CROPS:
                raise RunError(
                    f"crop: got 'paper', which says nothing about {data}; give a number or whole."
                )
            crop = _PAPER_CROPS[data]
        require(self, "size", self.size >= 1, "1 or more")
        require(self, "crop", crop == "whole" or crop >= 1, "1 or more, or whole")
        return dataclasses.replace(self, crop=crop)

    def build(self) -> Framing:
        return ImageFraming(self.size, None if self.crop == "whole" else int(self.crop))


@dataclass(frozen=True)
class VolumeFramingSettings(FramingSettings):
    """What a 3D network sees of a volume: patches, on one grid of voxels for all volumes."""

    spacing: tuple[float, float, float] | Literal["median"] = "median"
    """Size of the voxels to resample to: mm from left to right, back to front and below to above;
    median: that of the data, axis by axis."""
    patch: tuple[int, int, int] | Literal["paper"] = "paper"
    """Number of such voxels that the network sees at once, multiples of 32, in the same order of
    axes. paper: 384 384 128, along each axis no more than hold the median volume."""
    patches: int = 1
    """Number of training patches of each volume in an epoch."""
    foreground: float = 1 / 3
    """Share of the training patches that are laid around a voxel of the foreground."""
    overlap: float = 0.5
    """Overlap of neighbouring windows in validation and prediction, as a share of the patch."""
    body: bool = False
    """Route only the voxels of the patient's body to the experts, none of the air around it."""
    augment: Literal["paper", "none"] = "paper"
    """How training patches are varied. paper: flips and shifts of intensity; the paper names none,
    and these are usual."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return PAPER_PATCH if self.patch == "paper" else self.patch

    def resolve(self, data: str) -> VolumeFramingSettings:
        # Five stages halve it, and the last one's instance norm needs more than one voxel.
        sides = all(side >= 1 and not side % 32 for side in self.shape) and max(self.shape) > 32
        require(self, "patch", sides, "three multiples of 32, not all of them 32")
        spacing = self.spacing == "median" or all(0 < size < math.inf for size in self.spacing)
        require(self, "spacing", spacing, "three sizes in mm above 0, or median")
        require(self, "patches", self.patches >= 1, "1 or more")
        require(self, "foreground", 0 <= self.foreground <= 1, "a share from 0 to 1")
        require(self, "overlap", 0 <= self.overlap < 1, "0 or more and less than 1")
        return self

    def resolve_grid(
        self,
        median_mm: tuple[float, float, float] | None,
        median_size: tuple[float, float, float] | None,
    ) -> VolumeFramingSettings:
        if median_mm is None or median_size is None:
            return self
        spacing = self.spacing
        if spacing == "median":
            x, y, z = (float(f"{size:.6g}") for size in median_mm)
            spacing = (x, y, z)
        patch = self.patch
        if patch == "paper":
            voxels = [
                round(n * size / wanted)
                for n, size, wanted in zip(median_size, median_mm, spacing, strict=True)
            ]
            # An instance norm needs more than one voxel, so that one axis is longer than 32.
            longest = voxels.index(max(voxels))
            x, y, z = (
                min(most, max(32 * math.ceil(n / 32), 64 if axis == longest else 32))
                for axis, (most, n) in enumerate(zip(PAPER_PATCH, voxels, strict=True))
            )
            patch = (x, y, z)
        return dataclasses.replace(self, spacing=spacing, patch=patch)

    def build(self) -> Framing:
        if self.spacing == "median":
            raise ValueError(
                "spacing: got median, expected sizes in mm, to be taken from the data first"
            )
        return VolumeFraming(self.spacing, self.shape, self.body)

    def training_patches(self) -> Patches | None:
        return Patches(self.shape, self.patches, self.foreground)

    def windows(self, at_once: int) -> Windows | None:
        return Windows(self.shape, self.overlap, at_once)


def require(settings: object, setting: str, holds: bool, expected: str) -> None:
    """Whether a setting is in its range.

    Raises:
        RunError: it is not.
    """
    if not holds:
        raise RunError(f"{setting}: got {getattr(settings, setting)}, expected {expected}.")
