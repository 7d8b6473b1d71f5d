"""Reads what the files of a case hold: images of one size, or volumes on one grid.

Shapes: C channels, S spatial axes (rows, columns; in 3D axes as stored).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Header

from ..errors import DataError
from .endings import IMAGES, NIFTI, split_ending
from .images import image_size, read_image, read_labels
from .nifti_files import NiftiVolume
from .simpleitk_files import SimpleItkVolume, import_simpleitk
from .volumes import Volume, canonical_grid, require_one_grid


class Grid(NamedTuple):
    """How far a case's pixels lie apart, and how many there are, along each axis of its kind.

    Args:
        sizes: of volumes in mm; 1 of images.
        counts: of volumes from left to right, back to front and below to above; of images rows and
            columns.
    """

    sizes: np.ndarray
    counts: np.ndarray


class Content(NamedTuple):
    """What a case's files hold, as stored.

    Args:
        channels: float32 (S) of each channel, to be changed by whoever has read them.
        paths: the file of each.
        mask_S: float32, None where there is no mask.
        spacing: as of `Sample`.
        header: as of `Sample`.
        remarks: as of `Sample`.
    """

    channels: list[np.ndarray]
    paths: list[str]
    mask_S: np.ndarray | None
    spacing: tuple[float, ...]
    header: Nifti1Header | None = None
    remarks: tuple[str, ...] = ()


class Reader(ABC):
    """Reads the files of cases of one kind; its attributes are those of a `Dataset`."""

    axes: ClassVar[int]
    unit: ClassVar[str]

    @abstractmethod
    def inspect(self, images: Sequence[str], mask: str | None) -> Grid:
        """Reads a case's headers.

        Raises:
            DataError: one cannot be read, or they do not fit together.
        """

    @abstractmethod
    def read(self, images: Sequence[str], mask: str | None) -> Content:
        """Reads a case.

        Raises:
            DataError: as of `inspect`, or a file is damaged or not of such numbers as it should be.
        """


class ImageReader(Reader):
    """Images of 8 bits a channel.

    Args:
        channels: how many an image has. A single file for three of them is one of colours, in which
            grey has three channels alike; else each file is grey, whether as one channel or as
            three alike.
    """

    axes: ClassVar[int] = 2
    unit: ClassVar[str] = "px"

    def __init__(self, channels: int) -> None:
        self._channels = channels

    def inspect(self, images: Sequence[str], mask: str | None) -> Grid:
        sizes = [(path, image_size(path)) for path in (*images, *([mask] if mask else []))]
        _require_one_size(sizes)
        return Grid(np.ones(2), np.array(sizes[0][1]))

    def read(self, images: Sequence[str], mask: str | None) -> Content:
        channels: list[np.ndarray] = []
        for path in images:
            pixels_HW3 = read_image(path)
            colours = pixels_HW3.transpose(2, 0, 1).astype(np.float32)
            if len(images) < self._channels:
                channels += [*colours]
            elif (colours == colours[0]).all():
                channels.append(colours[0])
            else:
                raise DataError(
                    f"{path}: has colours, but dataset.json names a channel for each file; name "
                    'three, as {"0": "R", "1": "G", "2": "B"}, for one file of colours a case, or '
                    "save it in grey"
                )
        paths = [*images] if len(images) == len(channels) else [images[0]] * len(channels)
        labels_S = None if mask is None else read_labels(mask).astype(np.float32)
        found = [*zip(paths, channels, strict=True)]
        found += [] if mask is None or labels_S is None else [(mask, labels_S)]
        _require_one_size([(path, (array.shape[0], array.shape[1])) for path, array in found])
        return Content(channels, paths, labels_S, (1.0, 1.0))


class VolumeReader(Reader):
    """Volumes on straight grids in mm."""

    axes: ClassVar[int] = 3
    unit: ClassVar[str] = "mm"

    def inspect(self, images: Sequence[str], mask: str | None) -> Grid:
        return Grid(*canonical_grid(_opened(images, mask)[0]))

    def read(self, images: Sequence[str], mask: str | None) -> Content:
        volumes = _opened(images, mask)
        remarks = [oddity for volume in volumes for oddity in volume.oddities()]
        voxels = [volume.read() for volume in volumes]
        spacing = tuple(voxel_sizes(volumes[0].affine).tolist())
        mask_S = None if mask is None else voxels.pop()
        return Content(voxels, [*images], mask_S, spacing, volumes[0].header, tuple(remarks))


def open_volume(path: str) -> Volume:
    """Reads the header of a volume's file, by the file's ending.

    Raises:
        DataError: it cannot be read, or is no volume on a grid of right angles in mm.
    """
    return (NiftiVolume if split_ending(path)[1] in NIFTI else SimpleItkVolume)(path)


def reader_of(ending: str, channels: int) -> Reader:
    """Chooses what reads files of an ending, `channels` of a case.

    Raises:
        DataError: a package that is needed for them is not installed.
    """
    if ending in IMAGES:
        return ImageReader(channels)
    if ending not in NIFTI:
        import_simpleitk(ending)
    return VolumeReader()


def _opened(images: Sequence[str], mask: str | None) -> list[Volume]:
    volumes = [open_volume(path) for path in (*images, *([mask] if mask else []))]
    require_one_grid(volumes)
    return volumes


def _require_one_size(sizes: Sequence[tuple[str, tuple[int, int]]]) -> None:
    """Raises unless files have as many rows and columns as the first."""
    first, expected = sizes[0]
    for path, found in sizes[1:]:
        if found != expected:
            turned = found == expected[::-1]
            raise DataError(
                f"{path}: has {found[0]} rows and {found[1]} columns, but {first} has "
                f"{expected[0]} and {expected[1]}; "
                + ("turn one of them, as EXIF may have done" if turned else "save it at that size")
            )
