"""What a volume is, whatever file holds it: 3D, of real and finite numbers, on a straight grid.

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

ASTRAY = 0.1  # voxels that two files' corners may lie apart: text and float32 round affines
SHEAR = 0.01  # of the cosine of two axes: less than 1 % of any distance
DEFLATED = 1032  # a deflated byte stands for at most this many


class Volume(ABC):
    """A file whose header has been read, and none of its voxels.

    Args:
        path: of the file.
        header: where its voxels lie, and how a mask of them is to be written.

    Raises:
        DataError: its axes are not three at right angles.
    """

    def __init__(self, path: str, header: Nifti1Header) -> None:
        self.path, self.header = path, header
        self.shape: tuple[int, ...] = header.get_data_shape()
        self.affine: np.ndarray = header.get_best_affine()
        _require_right_angles(path, self.affine)

    @abstractmethod
    def stored(self) -> np.ndarray:
        """Reads voxels as float32 that may be written to, scaled as the header says, and the file
        to its end.

        Raises:
            DataError: it is cut off or damaged.
        """

    def oddities(self) -> list[str]:
        """Lists what is odd in the header, but leaves it readable."""
        return []

    def read(self) -> np.ndarray:
        """Reads voxels as of `stored`.

        Raises:
            DataError: as there, or a voxel is not finite.
        """
        voxels_S = self.stored()
        if not (finite_S := np.isfinite(voxels_S)).all():
            wrong = np.argwhere(~finite_S)
            raise DataError(
                f"{self.path}: {len(wrong)} voxels are NaN or infinite, the first at index "
                f"{tuple(wrong[0].tolist())}; replace them by what they stand for, such as air"
            )
        return voxels_S


def require_three_axes(path: str, shape: tuple[int, ...]) -> None:
    """Raises unless a file's shape is a volume's.

    Raises:
        DataError: it is not.
    """
    if len(shape) != 3:
        raise DataError(
            f"{path}: has {len(shape)} dimensions {shape}, expected 3; split time points or "
            "channels up, one file each (channels as _0000, _0001 ...), and drop dimensions of one"
        )
    if min(shape) < 1:
        raise DataError(f"{path}: has no voxel, its shape is {shape}; export it again")


def not_real(path: str, kind: str) -> DataError:
    """Says that a file's voxels are of a kind that is no real number."""
    return DataError(
        f"{path}: voxels are {kind}, expected real numbers; save each component as a channel of "
        "its own"
    )


def require_length(
    path: str, shape: tuple[int, ...], voxel: int, *, deflated: bool, start: int = 0
) -> None:
    """Raises if a file is too short for the voxels that its header claims.

    Args:
        path: of the file.
        shape: that it claims.
        voxel: bytes of one.
        deflated: whether they may be packed.
        start: where in the file they start.

    Raises:
        DataError: it is cut off.
    """
    claimed = int(np.prod(shape, dtype=object)) * voxel
    there = os.stat(path).st_size - start
    if claimed > there * (DEFLATED if deflated else 1):
        raise DataError(
            f"{path}: cut off: its header claims {claimed} bytes of voxels, and the file has "
            f"{there}; copy it again"
        )


def _require_right_angles(path: str, affine: np.ndarray) -> None:
    """Checks that an affine gives voxels a place, on three axes at right angles."""
    directions = affine[:3, :3]
    sizes = voxel_sizes(affine)
    if (
        not np.isfinite(affine).all()
        or not sizes.all()
        or abs(np.linalg.det(directions / sizes)) < SHEAR
    ):
        raise DataError(
            f"{path}: its affine is singular or not finite, so that voxels have no place: "
            f"{affine[:3].tolist()}; export it again, or write the right one"
        )
    cosines = np.abs((directions / sizes).T @ (directions / sizes) - np.eye(3))
    if cosines.max() > SHEAR:
        off = np.degrees(np.arcsin(min(cosines.max(), 1)))
        raise DataError(
            f"{path}: its axes are {off:.1f}° off right angles, as of a tilted gantry; resample "
            "image and label onto a straight grid"
        )


def require_one_grid(volumes: Sequence[Volume]) -> None:
    """Checks that all volumes have the voxels of the first, in the same places.

    Raises:
        DataError: one has not.
    """
    first = volumes[0]
    for volume in volumes[1:]:
        if volume.shape != first.shape:
            raise DataError(
                f"{volume.path}: has {volume.shape} voxels, but {first.path} has {first.shape}; "
                "resample it onto that image's grid"
            )
        astray = apart(first.affine, volume.affine, first.shape)
        if astray > ASTRAY:
            raise DataError(
                f"{volume.path}: lies elsewhere than {first.path}: its corners are up to "
                f"{astray:.1f} voxels away; resample it onto that image's grid, or give it that "
                "affine if its voxels do match"
            )


def apart(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Measures how far the corners of two grids lie apart, in voxels of the first."""
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in shape]), -1).reshape(-1, 3)
    there = apply_affine(np.linalg.inv(affine) @ other, corners)
    return float(np.abs(there - corners).max())


def canonical_grid(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Gives voxels' sizes and counts along left-right, back-front and below-above."""
    order = np.argsort(io_orientation(volume.affine)[:, 0])
    return voxel_sizes(volume.affine)[order], np.array(volume.shape)[order]
