"""Settings of a framing: which part of an image or volume the network sees, at which size."""

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

# The longest side of the central crop in the paper's code, by data set; the paper does not know the
# images of a folder.
_PAPER_CROPS: dict[str, int | Literal["whole"]] = {
    "fairseg": 512,
    "ham10000": 1024,
    "folder": "whole",
}
PAPER_PATCH = (384, 384, 128)


class FramingSettings(ABC):
    """Says which part of a sample the network sees; subclasses are frozen dataclasses."""

    augment: Augment
    body: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """How many pixels (rows, columns) or voxels the network sees at once."""

    @abstractmethod
    def resolve(self: _Self, data: str) -> _Self:
        """Replaces "paper" by the paper's numbers for the data set `data`, and checks the settings.

        Raises:
            RunError: a setting is out of range, or the paper does not use this data set.
        """

    def resolve_grid(
        self: _Self,
        median_mm: tuple[float, float, float] | None,
        median_size: tuple[float, float, float] | None,
    ) -> _Self:
        """Replaces the settings that depend on the data's volumes by numbers; images have none.

        Args:
            median_mm: the median size of the data's voxels; None for images.
            median_size: the median number of voxels along each axis; None for images.
        """
        return self

    @abstractmethod
    def build(self) -> Framing:
        """Makes the framing, which maps samples to frames and predictions back; settings must be
        resolved."""

    def training_patches(self) -> Patches | None:
        """Says which patches training draws from a frame; None if it sees whole frames."""
        return None

    def windows(self, at_once: int) -> Windows | None:
        """Says how inference cuts a frame into windows, `at_once` of them in a batch; None if it
        predicts whole frames."""
        return None


@dataclass(frozen=True)
class ImageFramingSettings(FramingSettings):
    """Which part of an image a 2D network sees."""

    size: int = 224
    """Rows and columns, in pixels, of the square image
    that the network sees. 224 is the paper's; the
    TransUNet needs a multiple of 16."""
    crop: int | Literal["paper", "whole"] = "paper"
    """Side, in the image's own pixels, of the central
    square that is cut out before resizing to --size.
    - whole: the whole image, padded to a square.
    - paper: 512 for fairseg, 1024 for ham10000, and
      whole for a folder."""
    augment: Literal["paper", "shift", "none"] = "paper"
    """How training images are varied at random.
    - paper: quarter turns with flips and small
      rotations, as in the paper's code.
    - shift: moved by up to a twelfth of their size,
      for images in which everything lies in one pose.
    - none: not at all."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size, self.size

    def resolve(self, data: str) -> ImageFramingSettings:
        crop = self.crop
        if crop == "paper":
            if data not in _PAPER_CROPS:
                raise RunError(
                    f"crop: got 'paper', but the paper does not use {data}; give a number of "
                    "pixels, or whole."
                )
            crop = _PAPER_CROPS[data]
        require(self, "size", self.size >= 1, "1 or more")
        require(self, "crop", crop == "whole" or crop >= 1, "1 or more, or whole")
        return dataclasses.replace(self, crop=crop)

    def build(self) -> Framing:
        return ImageFraming(self.size, None if self.crop == "whole" else int(self.crop))


@dataclass(frozen=True)
class VolumeFramingSettings(FramingSettings):
    """Which patches of a volume a 3D network sees, at which size of voxels."""

    spacing: tuple[float, float, float] | Literal["median"] = "median"
    """Size in mm of the voxels to which all volumes are
    resampled, along three axes: left to right, back
    to front, below to above.
    - median: the median of the data along each axis."""
    patch: tuple[int, int, int] | Literal["paper"] = "paper"
    """Number of voxels that the network sees at once,
    along the axes of --spacing. Each must be a
    multiple of 32. Choose a smaller patch if the
    memory does not suffice.
    - paper: 384 384 128, but along each axis no more
      than the median volume needs."""
    patches: int = 1
    """Number of patches that training draws from each
    volume in an epoch."""
    foreground: float = 1 / 3
    """Share of the training patches, 0 to 1, that
    contain a voxel of a labelled structure, so that
    small structures are not missed. The other patches
    lie anywhere. A third is nnU-Net's share."""
    overlap: float = 0.5
    """Overlap of neighbouring windows in validation and
    prediction, as a share of the patch: 0 to below 1.
    More overlap takes longer and gives smoother
    masks."""
    body: bool = False
    """Send only the voxels of the patient's body to the
    experts, not those of the air around it."""
    augment: Literal["paper", "none"] = "paper"
    """How training patches are varied at random.
    - paper: flips and changes of intensity. The paper
      names none; these are usual.
    - none: not at all."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return PAPER_PATCH if self.patch == "paper" else self.patch

    def resolve(self, data: str) -> VolumeFramingSettings:
        # Five stages halve the patch, and the instance norm of the last needs more than one voxel.
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
            # An instance norm needs more than one voxel, so one axis must be longer than 32.
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
                "spacing: got median, expected three sizes in mm; call resolve_grid first"
            )
        return VolumeFraming(self.spacing, self.shape, self.body)

    def training_patches(self) -> Patches | None:
        return Patches(self.shape, self.patches, self.foreground)

    def windows(self, at_once: int) -> Windows | None:
        return Windows(self.shape, self.overlap, at_once)


def require(settings: object, setting: str, holds: bool, expected: str) -> None:
    """Raises unless `holds`, which says whether a setting is in its range.

    Raises:
        RunError: it is not; the error quotes the setting's value and what was expected.
    """
    if not holds:
        raise RunError(f"{setting}: got {getattr(settings, setting)}, expected {expected}.")
