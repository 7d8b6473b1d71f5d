"""Reads volumes from NIfTI files, to their end.

Shapes: S the three axes as stored.
"""

from __future__ import annotations

import gzip
from contextlib import AbstractContextManager
from io import IOBase
from typing import cast

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.fileholders import FileHolder
from nibabel.nifti1 import Nifti1Image

from ..errors import DataError, reading
from .volumes import (
    ASTRAY,
    SHEAR,
    Volume,
    apart,
    not_real,
    require_length,
    require_three_axes,
)

# nibabel logs what it finds odd in a header, without the file's name; `oddities` has it too. Its
# own suppressor swaps the logger's handlers, which threads of `check` would do at the same time.
nib.imageglobals.logger.addFilter(lambda _: False)
_MM = (2, 0)  # NIfTI's codes of mm and of a unit left open
_KINDS = {"c": "complex", "V": "colours"}  # numpy's letters
# What files begin with: those that gzip has packed, and NIfTI-1 and -2.
_GZIP = b"\x1f\x8b"
_HEADER_SIZES = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))


class NiftiVolume(Volume):
    """A NIfTI file, whose axes, units and numbers are as they should be.

    Args:
        path: of the file.

    Raises:
        DataError: it cannot be read, or is no volume on a grid of right angles in mm.
    """

    def __init__(self, path: str) -> None:
        with _reading(path):
            image = nib.load(path, mmap=False)
            if not isinstance(image, Nifti1Image):  # or Nifti2Image, which is one
                raise ValueError(f"{type(image).__name__}, expected NIfTI")
            shape, dtype = image.shape, image.header.get_data_dtype()
            unit = int(image.header["xyzt_units"]) & 7
        require_three_axes(path, shape)
        if dtype.kind not in "iuf":
            raise not_real(path, _KINDS.get(dtype.kind, str(dtype)))
        if unit not in _MM:
            named = {1: "meter", 3: "micron"}.get(unit, f"unit {unit}")
            raise DataError(f"{path}: lengths are in {named}, expected mm; convert its affine")
        require_length(path, shape, dtype.itemsize, deflated=_deflated(path))
        _require_sizes(path, image)
        super().__init__(path, image.header)
        self._kind = type(image)

    def stored(self) -> np.ndarray:
        with _reading(self.path), _stream(self.path) as file:
            image = self._kind.from_file_map({"image": FileHolder(self.path, file)}, mmap=False)
            voxels_S = np.require(
                image.get_fdata(caching="unchanged", dtype=np.float32), requirements="W"
            )
            behind = 0
            while part := file.read(2**20):  # the checksum stands at the end
                behind += len(part)
            if behind:
                raise ValueError(
                    f"{behind} bytes more than the voxels of its header, {self.shape} of "
                    f"{image.get_data_dtype()}, so that these cannot be right"
                )
        return voxels_S

    def oddities(self) -> list[str]:
        with _reading(self.path):
            return self._oddities()

    def _oddities(self) -> list[str]:
        header = self.header
        with _stream(self.path) as file:
            report = type(header).diagnose_binaryblock(file.read(header.sizeof_hdr))
        remarks = [f"header: {line}" for line in report.splitlines()]
        if not header["sform_code"] and not header["qform_code"]:
            remarks.append(
                "neither sform nor qform, so which side is left is not known; taken from right to "
                "left"
            )
        elif header["sform_code"]:
            try:
                qform = header.get_qform() if header["qform_code"] else None
            except ValueError:
                qform = np.full((4, 4), np.inf)
            if qform is not None and not apart(self.affine, qform, self.shape) <= ASTRAY:
                remarks.append("sform and qform disagree; the sform is used")
            elif not np.allclose(header.get_zooms(), voxel_sizes(self.affine), rtol=SHEAR):
                remarks.append("pixdim and sform disagree on the voxels' size; the sform's is used")
        return remarks


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


def _reading(path: str) -> AbstractContextManager[None]:
    """Names the file of whatever nibabel, gzip and the like raise."""
    return reading(path, "not a readable NIfTI file", "copy or export it again")


def _deflated(path: str) -> bool:
    return path.lower().endswith(".gz")


def _stream(path: str) -> IOBase:
    """Opens a file to be read as bytes, inflated where it is deflated."""
    return cast(IOBase, (gzip.open if _deflated(path) else open)(path, "rb"))


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
