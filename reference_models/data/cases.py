"""Defines what every data set gives: cases, and a sample at native resolution for each.

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
IGNORED = 255  # in a mask: what is there is not known, so no loss and no score count it
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Attribute:
    """A property of a sample that the router may know, with its values in the order of indices."""

    name: str
    values: tuple[str, ...]

    def label(self, index: int) -> str:
        """Names the value of an index, "unknown" for `UNKNOWN`."""
        return "unknown" if index == UNKNOWN else self.values[index]


@dataclass(frozen=True)
class Case:
    """One image to be segmented, as the data set lists it; nothing of it has been decoded yet.

    Args:
        case_id: unique in the data set, and usable as a file name.
        subject: patient or lesion; all cases of one lie in the same split.
        attributes: one index for each of the data set's attributes, -1 where it is unknown.
        split: where the data set itself puts the case, None where it leaves that open.
        files: what the case is read from, empty where it is made rather than read.
        stratum: its value of the data set's default attribute, by which splits are stratified
            whichever attributes were named, so that all runs share one split; -1 is unknown.
        labelled: whether it has a mask; without one it can be predicted, and nothing else.
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
        case_id: its case's.
        image_CS: float32, intensities as the network is to see them, before any resizing.
        mask_S: uint8, indices into the data set's classes, or `IGNORED`; None of an unlabelled
            case.
        attributes: its case's.
        spacing: size of a pixel along each spatial axis, in the data set's unit.
        header: of a volume, as NIfTI has it: where its voxels lie, and how a mask of them is to be
            written.
        remarks: what is odd about its files, but leaves them readable; `check` shows them.

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
                f"{self.case_id}: image of {self.native_size} but mask of {self.mask_S.shape}"
            )

    @property
    def truth_S(self) -> np.ndarray:
        """The mask, for whoever cannot do without.

        Raises:
            DataError: it has none.
        """
        if self.mask_S is None:
            raise DataError(f"{self.case_id}: has no mask; it can be predicted, and nothing else.")
        return self.mask_S

    @property
    def affine(self) -> np.ndarray | None:
        """The map from indices of a volume to mm (RAS+), (4, 4); None of images."""
        return None if self.header is None else self.header.get_best_affine()

    @property
    def native_size(self) -> tuple[int, ...]:
        """Pixels or voxels along each spatial axis."""
        return self.image_CS.shape[1:]


def highest_label(mask_S: np.ndarray) -> int:
    """The highest label of a mask but `IGNORED`; 0 where there is none."""
    highest = int(mask_S.max())
    if highest == IGNORED:  # which takes longer
        highest = int(mask_S.max(where=mask_S != IGNORED, initial=0))
    return highest


class Dataset(ABC):
    """Cases of one kind, and how to read one.

    Attributes:
        name: as the command line calls it.
        former_name: what it was called before, if that was otherwise: splits are drawn by that
            name, and files of splits that say it are this data set's.
        classes: names by label; 0 is the background.
        regions: what is scored: a name, and the labels that make it up together.
        attributes: in the order of `Case.attributes`.
        cases: every case, in a fixed order.
        channels: of an image.
        channel_names: where the files name them, and intensities are scaled by their names.
        axes: of an image: 2, or 3 of a volume.
        spacing: of volumes, the median voxel in mm along left-right, back-front and below-above.
        size: of volumes, the median number of voxels along these axes.
        about: what the files say of the data, such as where they come from; empty if nothing.
        ignores: whether parts of masks may be `IGNORED`.
        left_out: ids of the cases that are damaged, where opening left such cases out.
        folds: nnU-Net's file of folds, where it lies beside the cases.
        foldable: whether subjects can be held out from each other, as folds do.
        made_with: whatever else decides what `load` gives, so that cached frames are made anew
            when it changes.
        unit: of distances and spacings, "mm", or "px" where the files do not say.
        population: by attribute name, the share of each value in the population that "overall"
            stands for; an attribute that is missing here takes the shares of the cases scored.
        notes: what was found out about the files or decided for them, a sentence each, such as
            the unit of ages.
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
