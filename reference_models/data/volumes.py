"""Volumes of any file format: 3D, of real and finite numbers, on a grid with right angles.

Shapes: S the three axes as stored.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import io_orientation

from ..errors import DataError

ASTRAY = 0.1  # most voxels between two files' corners: text and float32 round affines
SHEAR = 0.01  # largest cosine of two axes, which changes a distance by less than 1 %
DEFLATED = 1032  # most bytes that a packed byte can stand for


class Volume(ABC):
    """A file of a volume, of which only the header has been read.

    Args:
        path: the file.
        header: says where the voxels lie; masks of the volume are written with it.

    Raises:
        DataError: the axes are not at right angles.
    """

    def __init__(self, path: str, header: Nifti1Header) -> None:
        self.path, self.header = path, header
        self.shape: tuple[int, ...] = header.get_data_shape()
        self.affine: np.ndarray = header.get_best_affine()
        _require_right_angles(path, self.affine)

    @abstractmethod
    def stored(self) -> np.ndarray:
        """Reads the file to its end, and returns its voxels as writable float32, scaled as the
        header says.

        Raises:
            DataError: the file is cut off or damaged.
        """

    def oddities(self) -> list[str]:
        """Lists oddities of the header, which can be read nevertheless."""
        return []

    def read(self) -> np.ndarray:
        """Reads the voxels as `stored` does, and checks that all are finite.

        Raises:
            DataError: the file is cut off or damaged, or a voxel is not finite.
        """
        voxels_S = self.stored()
        if not (finite_S := np.isfinite(voxels_S)).all():
            wrong = np.argwhere(~finite_S)
            raise DataError(
                f"{self.path}: {len(wrong)} voxels are NaN or infinite, the first at index "
                f"{tuple(wrong[0].tolist())}; replace them by a number, such as that of air"
            )
        return voxels_S


def require_three_axes(path: str, shape: tuple[int, ...]) -> None:
    """Raises unless a file's shape has three axes.

    Raises:
        DataError: it has another number of axes, or no voxels.
    """
    if len(shape) != 3:
        raise DataError(
            f"{path}: this file has {len(shape)} dimensions {shape}, expected 3; save each time "
            "point or channel as a file (channels as _0000, _0001 ...), and remove dimensions of "
            "one"
        )
    if min(shape) < 1:
        raise DataError(f"{path}: this file has no voxels, its shape is {shape}; export it again")


def not_real(path: str, kind: str) -> DataError:
    """Makes the error for a file whose voxels are not real numbers."""
    return DataError(
        f"{path}: its voxels are {kind}, expected real numbers; save each component as a channel"
    )


def require_length(
    path: str, shape: tuple[int, ...], voxel: int, *, deflated: bool, start: int = 0
) -> None:
    """Raises if a file is too short for the voxels that its header claims.

    Args:
        path: the file.
        shape: the shape in its header.
        voxel: number of bytes of a voxel.
        deflated: whether the voxels may be packed.
        start: position in the file at which the voxels start.

    Raises:
        DataError: the file is cut off.
    """
    claimed = int(np.prod(shape, dtype=object)) * voxel
    there = os.stat(path).st_size - start
    if claimed > there * (DEFLATED if deflated else 1):
        raise DataError(
            f"{path}: this file is cut off: its header claims {claimed} bytes of voxels, but the "
            f"file has {there}; copy it again"
        )


def _require_right_angles(path: str, affine: np.ndarray) -> None:
    """Checks that an affine is invertible, with three axes at right angles."""
    directions = affine[:3, :3]
    sizes = voxel_sizes(affine)
    if (
        not np.isfinite(affine).all()
        or not sizes.all()
        or abs(np.linalg.det(directions / sizes)) < SHEAR
    ):
        raise DataError(
            f"{path}: its affine is singular or not finite, so that voxels have no position: "
            f"{affine[:3].tolist()}; export it again, or write the right affine"
        )
    cosines = np.abs((directions / sizes).T @ (directions / sizes) - np.eye(3))
    if cosines.max() > SHEAR:
        off = np.degrees(np.arcsin(min(cosines.max(), 1)))
        raise DataError(
            f"{path}: its axes are {off:.1f}° off right angles, as with a tilted gantry; resample "
            "image and mask onto a grid with right angles"
        )


def require_one_grid(volumes: Sequence[Volume]) -> None:
    """Checks that all volumes have the shape and the position of the first.

    Raises:
        DataError: a volume differs.
    """
    first = volumes[0]
    for volume in volumes[1:]:
        if volume.shape != first.shape:
            raise DataError(
                f"{volume.path}: this file has {volume.shape} voxels, but {first.path} has "
                f"{first.shape}; resample it onto that image's grid"
            )
        astray = apart(first.affine, volume.affine, first.shape)
        if astray > ASTRAY:
            raise DataError(
                f"{volume.path}: this file lies elsewhere than {first.path}: its corners are up to "
                f"{astray:.1f} voxels away; resample it onto that image's grid, or give it that "
                "image's affine if the voxels match"
            )


def apart(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Gives the largest distance between the corners of two grids, in voxels of the first."""
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in shape]), -1).reshape(-1, 3)
    there = apply_affine(np.linalg.inv(affine) @ other, corners)
    return float(np.abs(there - corners).max())


def canonical_grid(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Gives the voxels' sizes and numbers, left to right, back to front and below to above."""
    order = np.argsort(io_orientation(volume.affine)[:, 0])
    return voxel_sizes(volume.affine)[order], np.array(volume.shape)[order]
