"""Reads NIfTI files to their end, and refuses what is no volume: 3D, real, on a straight grid.

Shapes: S the three axes as stored.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import IOBase
from typing import cast

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.fileholders import FileHolder
from nibabel.nifti1 import Nifti1Image
from nibabel.orientations import io_orientation

from ..errors import DataError, reading

ASTRAY = 0.1  # voxels that two files' corners may lie apart: text and float32 round affines
SHEAR = 0.01  # of the cosine of two axes: less than 1 % of any distance
# A deflated byte stands for at most this many: a header that claims more voxels lies.
DEFLATED = 1032
# nibabel logs what it finds odd in a header, without the file's name; `oddities` has it too. Its
# own suppressor swaps the logger's handlers, which threads of `check` would do at the same time.
nib.imageglobals.logger.addFilter(lambda _: False)
_MM = (2, 0)  # NIfTI's codes of mm and of a unit left open
_KINDS = {"c": "complex", "V": "colours"}  # numpy's letters
# What files begin with: those that gzip has packed, and NIfTI-1 and -2.
_GZIP = b"\x1f\x8b"
_HEADER_SIZES = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))


def open_volume(path: str) -> Nifti1Image:
    """Reads a file's header, and where its voxels are, but none of them.

    Raises:
        DataError: it cannot be read, or is no volume on a grid of right angles in mm.
    """
    with _reading(path):
        image = nib.load(path, mmap=False)
        if not isinstance(image, Nifti1Image):  # or Nifti2Image, which is one
            raise ValueError(f"{type(image).__name__}, expected NIfTI")
        header, affine = image.header, image.affine
        shape, dtype = image.shape, header.get_data_dtype()
        unit = int(header["xyzt_units"]) & 7
    if len(shape) != 3:
        raise DataError(
            f"{path}: has {len(shape)} dimensions {shape}, expected 3; split time points or "
            "channels up, one file each (channels as _0000, _0001 ...), and drop dimensions of one"
        )
    if min(shape) < 1:
        raise DataError(f"{path}: has no voxel, its shape is {shape}; export it again")
    if dtype.kind not in "iuf":
        raise DataError(
            f"{path}: voxels are {_KINDS.get(dtype.kind, dtype)}, expected real numbers; save "
            "each component as a channel of its own"
        )
    if unit not in _MM:
        named = {1: "meter", 3: "micron"}.get(unit, f"unit {unit}")
        raise DataError(f"{path}: lengths are in {named}, expected mm; convert its affine")
    claimed = int(np.prod(shape, dtype=object)) * dtype.itemsize
    there = os.stat(path).st_size
    if claimed > there * (DEFLATED if _deflated(path) else 1):
        raise DataError(
            f"{path}: cut off: its header claims {claimed} bytes of voxels, and the file has "
            f"{there}; copy it again"
        )
    _require_sizes(path, image)
    _require_right_angles(path, affine)
    return image


def _reading(path: str) -> AbstractContextManager[None]:
    """Names the file of whatever nibabel, gzip and the like raise."""
    return reading(path, "not a readable NIfTI file", "copy or export it again")


def misnamed(path: str) -> bool:
    """Finds whether a file is packed by gzip and not called .gz, or NIfTI and called .gz.

    What is neither, or cannot be opened, is left to whoever reads it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return False
    return start in _HEADER_SIZES if _deflated(path) else start.startswith(_GZIP)


def _deflated(path: str) -> bool:
    return path.lower().endswith(".gz")


def _stream(path: str) -> IOBase:
    """Opens a file to be read as bytes, inflated where it is deflated."""
    return cast(IOBase, (gzip.open if _deflated(path) else open)(path, "rb"))


def read_voxels(path: str, image: Nifti1Image) -> np.ndarray:
    """Reads voxels as float32, scaled as the header says, and the file to its end.

    Raises:
        DataError: it is cut off or damaged, or a voxel is not finite.
    """
    with _reading(path), _stream(path) as file:
        holder = {"image": FileHolder(path, file)}
        again = type(image).from_file_map(holder, mmap=False)
        voxels_S = np.require(
            again.get_fdata(caching="unchanged", dtype=np.float32), requirements="W"
        )
        behind = 0
        while part := file.read(2**20):  # the checksum stands at the end
            behind += len(part)
        if behind:
            raise ValueError(
                f"{behind} bytes more than the voxels of its header, {image.shape} of "
                f"{image.get_data_dtype()}, so that these cannot be right"
            )
    if not (finite_S := np.isfinite(voxels_S)).all():
        wrong = np.argwhere(~finite_S)
        raise DataError(
            f"{path}: {len(wrong)} voxels are NaN or infinite, the first at index "
            f"{tuple(wrong[0].tolist())}; replace them by what they stand for, such as air"
        )
    return voxels_S


def _require_sizes(path: str, image: Nifti1Image) -> None:
    """Checks the voxels' sizes as the file has them, where they decide; nibabel makes 1 of a 0."""
    header = image.header
    if header["sform_code"]:
        return
    with _reading(path), _stream(path) as file:
        block = file.read(header.sizeof_hdr)
        stored = type(header)(block, header.endianness, check=False)["pixdim"][1:4]
    if not (np.isfinite(stored) & (stored != 0)).all():
        raise DataError(
            f"{path}: its voxels' size is not known: pixdim is "
            f"{' x '.join(f'{size:g}' for size in stored)} mm, and there is no sform; export it "
            "again, or write the right sizes into its header"
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


def require_one_grid(paths: Sequence[str], images: Sequence[Nifti1Image]) -> None:
    """Checks that all images have the voxels of the first, in the same places.

    Raises:
        DataError: one has not.
    """
    first = images[0]
    for path, image in zip(paths[1:], images[1:], strict=True):
        if image.shape != first.shape:
            raise DataError(
                f"{path}: has {image.shape} voxels, but {paths[0]} has {first.shape}; "
                "resample it onto that image's grid"
            )
        astray = apart(first.affine, image.affine, first.shape)
        if astray > ASTRAY:
            raise DataError(
                f"{path}: lies elsewhere than {paths[0]}: its corners are up to {astray:.1f} "
                "voxels away; resample it onto that image's grid, or give it that affine if its "
                "voxels do match"
            )


def apart(affine: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Measures how far the corners of two grids lie apart, in voxels of the first."""
    corners = np.stack(np.meshgrid(*[(0, side - 1) for side in shape]), -1).reshape(-1, 3)
    there = apply_affine(np.linalg.inv(affine) @ other, corners)
    return float(np.abs(there - corners).max())


def oddities(path: str, image: Nifti1Image) -> list[str]:
    """Lists what is odd in a file's header, but leaves it readable."""
    with _reading(path):
        return _oddities(path, image)


def _oddities(path: str, image: Nifti1Image) -> list[str]:
    header = image.header
    with _stream(path) as file:
        report = type(header).diagnose_binaryblock(file.read(header.sizeof_hdr))
    remarks = [f"header: {line}" for line in report.splitlines()]
    if not header["sform_code"] and not header["qform_code"]:
        remarks.append(
            "neither sform nor qform, so which side is left is not known; taken from right to left"
        )
    elif header["sform_code"]:
        try:
            qform = header.get_qform() if header["qform_code"] else None
        except ValueError:
            qform = np.full((4, 4), np.inf)
        if qform is not None and not apart(image.affine, qform, image.shape) <= ASTRAY:
            remarks.append("sform and qform disagree; the sform is used")
        elif not np.allclose(header.get_zooms(), voxel_sizes(image.affine), rtol=SHEAR):
            remarks.append("pixdim and sform disagree on the voxels' size; the sform's is used")
    return remarks


def canonical_grid(image: Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Gives voxels' sizes and counts along left-right, back-front and below-above."""
    order = np.argsort(io_orientation(image.affine)[:, 0])
    return voxel_sizes(image.affine)[order], np.array(image.shape)[order]
