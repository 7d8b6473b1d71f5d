"""Reads volumes from NIfTI files, to the end of the file.

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

# nibabel logs oddities of a header without the file's name; `oddities` reports them with it.
# nibabel's own suppressor replaces the logger's handlers, which is not safe in threads of `check`.
nib.imageglobals.logger.addFilter(lambda _: False)
_MM = (2, 0)  # NIfTI's codes for mm and for an unknown unit
_KINDS = {"c": "complex", "V": "colours"}  # numpy's letters
# The first bytes of files packed by gzip, and of NIfTI-1 and NIfTI-2 files.
_GZIP = b"\x1f\x8b"
_HEADER_SIZES = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))


class NiftiVolume(Volume):
    """A NIfTI file whose axes, units and numbers are valid.

    Args:
        path: the file.

    Raises:
        DataError: the file cannot be read, or is not a volume on a grid with right angles in mm.
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
            raise DataError(
                f"{path}: its lengths are in {named}, expected mm; convert its affine to mm"
            )
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
            while part := file.read(2**20):  # the checksum is at the end
                behind += len(part)
            if behind:
                raise ValueError(
                    f"it has {behind} bytes more than its header says, {self.shape} voxels of "
                    f"{image.get_data_dtype()}, so that the header cannot be right"
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
                "the header has neither sform nor qform, so that it is not known which side is "
                "left; the first axis is assumed to run from right to left"
            )
        elif header["sform_code"]:
            try:
                qform = header.get_qform() if header["qform_code"] else None
            except ValueError:
                qform = np.full((4, 4), np.inf)
            if qform is not None and not apart(self.affine, qform, self.shape) <= ASTRAY:
                remarks.append("sform and qform disagree; the sform is used")
            elif not np.allclose(header.get_zooms(), voxel_sizes(self.affine), rtol=SHEAR):
                remarks.append("pixdim and sform disagree on the voxels' size; the sform is used")
        return remarks


def misnamed(path: str) -> bool:
    """Finds whether a file is packed by gzip without the ending .gz, or not packed but ends in .gz.

    A file that is neither NIfTI nor packed, or cannot be opened, gives False: its reader reports
    it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError:
        return False
    return start in _HEADER_SIZES if _deflated(path) else start.startswith(_GZIP)


def _reading(path: str) -> AbstractContextManager[None]:
    """Turns whatever nibabel or gzip raises into a DataError that names the file."""
    return reading(path, "not a readable NIfTI file", "copy or export it again")


def _deflated(path: str) -> bool:
    return path.lower().endswith(".gz")


def _stream(path: str) -> IOBase:
    """Opens a file to read its bytes, which are unpacked if the file is packed by gzip."""
    return cast(IOBase, (gzip.open if _deflated(path) else open)(path, "rb"))


def _require_sizes(path: str, image: Nifti1Image) -> None:
    """Checks the voxels' sizes in the file if there is no sform; nibabel would turn a 0 into 1."""
    header = image.header
    if header["sform_code"]:
        return
    with _reading(path), _stream(path) as file:
        block = file.read(header.sizeof_hdr)
        stored = type(header)(block, header.endianness, check=False)["pixdim"][1:4]
    if not (np.isfinite(stored) & (stored != 0)).all():
        raise DataError(
            f"{path}: the size of its voxels is not known: pixdim is "
            f"{' x '.join(f'{size:g}' for size in stored)} mm, and there is no sform; export it "
            "again, or write the right sizes into its header"
        )
