"""Defines what every data set gives: cases, and for each case a sample at native resolution.

Shapes: C channels, S the spatial axes (rows, columns; in 3D axes as stored), N attributes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header

from ..errors import DataError

UNKNOWN = -1
IGNORED = 255  # in a mask: the label of this pixel is not known; losses and scores ignore it
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Attribute:
    """A property of a sample, such as its site, that the router may receive.

    Args:
        name: the attribute's name.
        values: the names of its values, in the order of their indices.
    """

    name: str
    values: tuple[str, ...]

    def label(self, index: int) -> str:
        """Gives the name of the value with this index, or "unknown" for `UNKNOWN`."""
        return "unknown" if index == UNKNOWN else self.values[index]


@dataclass(frozen=True)
class Case:
    """One image to be segmented, as the data set lists it; its files have not been decoded yet.

    Args:
        case_id: an id that is unique in the data set and can be a file name.
        subject: the patient or lesion; all cases of a subject lie in the same split.
        attributes: one index for each of the data set's attributes; -1 means unknown.
        split: the split that the data set itself gives to the case; None if it leaves that open.
        files: the files of the case; empty if its image is made up.
        stratum: the index of its value of the data set's default attribute; -1 means unknown.
            Splits are stratified by it, whichever attributes a run uses, so that all runs share one
            split.
        labelled: whether the case has a mask. Without a mask it can only be predicted.
    """

    case_id: str
    subject: str
    attributes: tuple[int, ...]
    split: str | None = None
    files: tuple[str, ...] = ()
    stratum: int = UNKNOWN
    labelled: bool = True


@dataclass(frozen=True)
class Sample:
    """A decoded case at native resolution.

    Args:
        case_id: the id of its case.
        image_CS: float32, intensities scaled as the network receives them, before any resizing.
        mask_S: uint8, indices into the data set's classes, or `IGNORED`; None if the case has no
            mask.
        attributes: the attributes of its case.
        spacing: the size of a pixel along each spatial axis, in the data set's unit.
        header: the NIfTI header of a volume, which says where its voxels lie; predicted masks are
            written with it. None for images.
        remarks: oddities of its files, which can be read nevertheless; `check` prints them.

    Raises:
        ValueError: image and mask differ in size.
    """

    case_id: str
    image_CS: np.ndarray
    mask_S: np.ndarray | None
    attributes: tuple[int, ...]
    spacing: tuple[float, ...]
    header: Nifti1Header | None = None
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mask_S is not None and self.mask_S.shape != self.native_size:
            raise ValueError(
                f"{self.case_id}: the image has size {self.native_size}, but the mask "
                f"{self.mask_S.shape}"
            )

    @property
    def truth_S(self) -> np.ndarray:
        """The mask, for callers that need one.

        Raises:
            DataError: the sample has no mask.
        """
        if self.mask_S is None:
            raise DataError(f"{self.case_id}: this case has no mask; it can only be predicted.")
        return self.mask_S

    @property
    def affine(self) -> np.ndarray | None:
        """The affine (4, 4) from a volume's indices to mm (RAS+); None for images."""
        return None if self.header is None else self.header.get_best_affine()

    @property
    def native_size(self) -> tuple[int, ...]:
        """The number of pixels or voxels along each spatial axis."""
        return self.image_CS.shape[1:]


def highest_label(mask_S: np.ndarray) -> int:
    """Gives the highest label of a mask except `IGNORED`; 0 if there is none."""
    highest = int(mask_S.max())
    if highest == IGNORED:  # the second search takes longer
        highest = int(mask_S.max(where=mask_S != IGNORED, initial=0))
    return highest


class Dataset(ABC):
    """The cases of a data set; `load` reads one of them.

    Attributes:
        name: the data set's name on the command line.
        former_name: an earlier name, empty if there is none. Splits are drawn by the earlier name,
            and splits files that have it belong to this data set.
        classes: the names of the labels, in their order; label 0 is the background.
        regions: what is scored: the name of each region, and the labels that it consists of.
        attributes: the attributes, in the order of `Case.attributes`.
        cases: every case, in a fixed order.
        channels: the number of channels of an image.
        channel_names: the names of the channels if the files name them; intensities are scaled by
            these names.
        axes: the number of spatial axes: 2 for images, 3 for volumes.
        spacing: the median size in mm of a volume's voxels, along left to right, back to front and
            below to above; None for images.
        size: the median number of a volume's voxels along these axes; None for images.
        about: what the files say about the data, such as where they come from; may be empty.
        ignores: whether masks may have pixels that are `IGNORED`.
        left_out: the ids of damaged cases that were left out when the data set was opened.
        folds: the path of nnU-Net's splits_final.json if it lies beside the cases.
        foldable: whether the subjects are independent enough to be divided into folds.
        made_with: further settings that decide what `load` gives; if they change, cached frames
            are made again.
        unit: the unit of distances and spacings: "mm", or "px" if the files do not say.
        population: by attribute name, the share of each value in the population for which the
            overall score stands. A missing attribute takes the shares of the scored cases.
        notes: sentences on what was found in the files or decided about them, such as the unit of
            ages.
    """

    name: str
    former_name: str = ""
    classes: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    attributes: tuple[Attribute, ...]
    cases: Sequence[Case]
    channels: int
    channel_names: tuple[str, ...] = ()
    axes: int = 2
    spacing: tuple[float, float, float] | None = None
    size: tuple[float, float, float] | None = None
    about: str = ""
    ignores: bool = False
    left_out: Collection[str] = frozenset()
    folds: Path | None = None
    foldable: bool = True
    made_with: tuple[float | str, ...] = ()
    unit: str = "px"
    population: Mapping[str, tuple[float, ...]] = {}
    notes: Sequence[str] = ()

    @abstractmethod
    def load(self, case: Case) -> Sample:
        """Reads one case.

        Raises:
            DataError: a file is missing or damaged, or its content is not what it should be.
        """
