"""Reads volumes from .mha and .nrrd files, to the end of the file, by the optional SimpleITK.

ITK assumes values that a header leaves out, and unpacks a damaged .mha without an error. So the
header's text is checked here too, and packed voxels are unpacked once more to check their checksum.

Shapes: S the three axes as stored.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header

from ..errors import DataError, reading
from .volumes import Volume, not_real, require_length, require_three_axes

_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # ITK's axes point left, back and up
_SCANNER = 1  # NIfTI's code for positions in the scanner
_LINE = 4096  # bytes; no line of a header is longer
# By ending, the lines that give the size of voxels, and those that say which side is left.
_SIZES = {".mha": ("elementspacing", "elementsize"), ".nrrd": ("space directions", "spacings")}
_SIDES = {".mha": ("transformmatrix", "rotation", "orientation"), ".nrrd": ("space",)}
_ELSEWHERE = ("data file", "datafile")
_CHUNK = 2**20


class SimpleItkVolume(Volume):
    """A .mha or .nrrd file whose axes, units and numbers are valid.

    Args:
        path: the file.

    Raises:
        DataError: SimpleITK is not installed; or the file cannot be read, or is not a volume on a
            grid with right angles in mm.
    """

    def __init__(self, path: str) -> None:
        sitk = import_simpleitk(_ending(path))
        with _reading(path):
            self._fields, self._start = _header(path)
            reader = sitk.ImageFileReader()
            reader.SetFileName(path)
            _run(reader.ReadImageInformation)
            shape = tuple(int(side) for side in reader.GetSize())
            require_three_axes(path, shape)
            if reader.GetNumberOfComponents() != 1:
                raise not_real(path, sitk.GetPixelIDValueAsString(reader.GetPixelID()))
            _require_whole(path, self._fields)
            one = sitk.GetArrayViewFromImage(sitk.Image(1, 1, 1, reader.GetPixelID()))
            require_length(path, shape, one.itemsize, deflated=self._packed(), start=self._start)
            directions = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
            affine = np.eye(4)
            affine[:3, :3], affine[:3, 3] = _TO_RAS @ directions, _TO_RAS @ reader.GetOrigin()
            header = Nifti1Header()
            header.set_data_dtype(one.dtype)
            header.set_data_shape(shape)
            header.set_xyzt_units("mm")
            header.set_sform(affine, _SCANNER)
        super().__init__(path, header)
        header.set_qform(affine, _SCANNER)

    def stored(self) -> np.ndarray:
        sitk = import_simpleitk(_ending(self.path))
        with _reading(self.path):
            if _ending(self.path) == ".mha" and self._packed():
                self._require_sum()
            image = _run(sitk.ReadImage, self.path)
            # In ITK the first axis varies fastest in memory, in NumPy the last one.
            return np.array(sitk.GetArrayViewFromImage(image).T, np.float32, order="F")

    def oddities(self) -> list[str]:
        sides = [self._fields.get(name) for name in _SIDES[_ending(self.path)]]
        side = next(filter(None, sides), "3d")
        if side.lower().startswith(("scanner", "3d")):
            return [
                "the header does not say which side is left; the first axis is assumed to run from "
                "right to left"
            ]
        return []

    def _packed(self) -> bool:
        """Whether the voxels in the file are packed."""
        fields = self._fields
        return fields.get("compresseddata", "false").lower() == "true" or (
            fields.get("encoding", "raw").lower() != "raw"
        )

    def _require_sum(self) -> None:
        """Raises if the checksum of packed voxels is wrong."""
        stream = zlib.decompressobj()
        with open(self.path, "rb") as file:
            file.seek(self._start)
            while part := file.read(_CHUNK):
                while part and not stream.eof:
                    stream.decompress(part, _CHUNK)
                    part = stream.unconsumed_tail
        if not stream.eof:
            raise ValueError("the file is cut off")


def _header(path: str) -> tuple[dict[str, str], int]:
    """Reads a header's lines, by name in lower case, and the position where the voxels start."""
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        while line := file.readline(_LINE).strip():
            name, _, value = line.decode("latin-1").replace("=", ":", 1).partition(":")
            fields[name.strip().lower()] = value.strip()
            if name.strip() == "ElementDataFile":
                break
        return fields, file.tell()


def _require_whole(path: str, fields: Mapping[str, str]) -> None:
    """Raises a DataError unless the file holds the voxels and their size in mm."""
    if fields.get("elementdatafile", "LOCAL").upper() != "LOCAL" or {*_ELSEWHERE} & fields.keys():
        raise DataError(
            f"{path}: its voxels are in another file; save header and voxels as one file"
        )
    sizes = _SIZES[_ending(path)]
    if not any(name in fields for name in sizes):
        raise DataError(
            f"{path}: the size of its voxels is not known, since its header has no line "
            f"{' or '.join(sizes)}; export it again, or write the right sizes into its header"
        )
    units = {unit.strip() for unit in fields.get("space units", "").split('"')} - {"", "mm"}
    if units:
        raise DataError(
            f"{path}: its lengths are in {', '.join(sorted(units))}, expected mm; save it in mm"
        )


def import_simpleitk(ending: str) -> Any:
    """Imports SimpleITK, to read files with this ending.

    Raises:
        DataError: SimpleITK is not installed.
    """
    try:
        import SimpleITK as sitk
    except ImportError as error:
        raise DataError(
            f"{ending} files need SimpleITK, which cannot be imported here ({error}); "
            "install it by `pip install SimpleITK`, or convert the files to .nii.gz"
        ) from error
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


def _run(read: Any, *arguments: str) -> Any:
    """Calls ITK; its error texts name ITK's source files and no useful reason."""
    try:
        return read(*arguments)
    except RuntimeError as error:
        raise ValueError("SimpleITK cannot read it") from error


def _reading(path: str) -> AbstractContextManager[None]:
    return reading(path, f"not a readable {_ending(path)} file", "copy or export it again")


def _ending(path: str) -> str:
    return Path(path).suffix.lower()
