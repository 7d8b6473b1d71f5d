"""Reads the files of a case: images of one size, or volumes on one grid.

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
    """The size and the number of a case's pixels or voxels along each axis.

    The axes of volumes are left to right, back to front and below to above; those of images are
    rows and columns.

    Args:
        sizes: the size of a voxel in mm; 1 for images.
        counts: the number of pixels or voxels.
    """

    sizes: np.ndarray
    counts: np.ndarray


class Content(NamedTuple):
    """The content of a case's files.

    Args:
        channels: each channel, float32 (S); the caller may change it.
        paths: the file of each channel.
        mask_S: the mask, float32; None if there is none.
        spacing, header, remarks: as in `Sample`.
    """

    channels: list[np.ndarray]
    paths: list[str]
    mask_S: np.ndarray | None
    spacing: tuple[float, ...]
    header: Nifti1Header | None = None
    remarks: tuple[str, ...] = ()


class Reader(ABC):
    """Reads the files of images or of volumes; `axes` and `unit` are those of a `Dataset`."""

    axes: ClassVar[int]
    unit: ClassVar[str]

    @abstractmethod
    def inspect(self, images: Sequence[str], mask: str | None) -> Grid:
        """Reads the headers of a case's files.

        Raises:
            DataError: a header cannot be read, or the files differ in size or grid.
        """

    @abstractmethod
    def read(self, images: Sequence[str], mask: str | None) -> Content:
        """Reads a case.

        Raises:
            DataError: `inspect` would raise it, or a file is damaged or has pixels of a wrong kind.
        """


class ImageReader(Reader):
    """Reads images with 8 bits for each channel.

    Args:
        channels: number of channels of an image. A single file for three channels is read as
            colours; a grey file then has three equal channels. Otherwise each file must be grey, as
            one channel or as three equal ones.
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
                    f"{path}: this image has colours, but dataset.json names a channel for each "
                    "file; "
                    'name three channels, as {"0": "R", "1": "G", "2": "B"}, if each case has one '
                    "colour file, or save the image in grey"
                )
        paths = [*images] if len(images) == len(channels) else [images[0]] * len(channels)
        labels_S = None if mask is None else read_labels(mask).astype(np.float32)
        found = [*zip(paths, channels, strict=True)]
        found += [] if mask is None or labels_S is None else [(mask, labels_S)]
        _require_one_size([(path, (array.shape[0], array.shape[1])) for path, array in found])
        return Content(channels, paths, labels_S, (1.0, 1.0))


class VolumeReader(Reader):
    """Reads volumes on grids with right angles in mm."""

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
    """Reads the header of a volume's file; the file's ending decides how.

    Raises:
        DataError: the file cannot be read, or is not a volume on a grid with right angles in mm.
    """
    return (NiftiVolume if split_ending(path)[1] in NIFTI else SimpleItkVolume)(path)


def reader_of(ending: str, channels: int) -> Reader:
    """Gives the reader for files with this ending, of cases with so many channels.

    Raises:
        DataError: a package that such files need is not installed.
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
    """Raises a DataError unless all files have as many rows and columns as the first."""
    first, expected = sizes[0]
    for path, found in sizes[1:]:
        if found != expected:
            turned = found == expected[::-1]
            raise DataError(
                f"{path}: this file has {found[0]} rows and {found[1]} columns, but {first} has "
                f"{expected[0]} and {expected[1]}; "
                + (
                    "turn one of them, since a program may have turned it by its EXIF"
                    if turned
                    else "save it at that size"
                )
            )
