"""Reads images and masks of 2D data sets: upright, with 8 bits for each channel, to the file's end.

Shapes: H rows, W columns.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile

from ..errors import reading

# The transposition that turns an image upright, by the orientation in its EXIF.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)  # the orientations in which rows are columns

_SHORT = 3  # EXIF's code for a number of 16 bits
_LOSSLESS = ("PNG", "TIFF", "BMP")
_FORMATS = (*_LOSSLESS, "JPEG")  # and MPO, a phone's JPEG with further pictures behind it


def read_image(path: Path | str) -> np.ndarray:
    """Reads an image as rows x columns x RGB, uint8, upright as its EXIF says.

    The checksums of a PNG show any damage. A JPEG has none: a JPEG that is cut off is refused, but
    a changed byte may give another picture, which cannot be noticed.

    Raises:
        DataError: the image is damaged, partly transparent, or not of 8 bits for each channel.
    """
    with _reading(path), _opened(path) as image:
        # Pillow would clip these at 255, or take the upper 8 of 16 bits.
        if image.mode[0] in "IF" or ";16" in str(image.tile):
            bits = f"mode {image.mode}" if image.mode[0] in "IF" else "16 bits for each channel"
            raise ValueError(
                f"{bits}, expected 8 bits for each channel; bring its intensities to 0..255"
            )
        upright = _upright(image)
        see_through = "A" in upright.mode or "transparency" in upright.info
        if see_through and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("parts of it are transparent; save it without transparency")
        return np.asarray(upright.convert("RGB"))


def read_labels(path: Path | str) -> np.ndarray:
    """Reads a mask as rows x columns, uint8: each pixel's number, or its index in the palette.

    Raises:
        DataError: the mask is damaged, compressed with loss, or its pixels are not one number of up
            to 8 bits each.
    """
    with reading(path, "cannot be read", "write it again"), _opened(path) as image:
        if image.format not in _LOSSLESS or image.info.get("compression") == "jpeg":
            raise ValueError(
                "it is compressed as JPEG, which changes labels; save it as PNG or TIFF"
            )
        if image.mode not in ("1", "L", "P"):
            raise ValueError(
                f"a {image.format} of mode {image.mode}, expected one label for each pixel: 8 "
                "bits, grey or palette"
            )
        upright = _upright(image)
        labels_HW = np.asarray(upright).astype(np.uint8)
        palette = np.array(upright.getpalette() or [], np.int64).reshape(-1, 3)
        colours = palette[: int(labels_HW.max()) + 1]
        # In a palette of colours the indices are the labels. In a palette of greys that do not rise
        # with the index they may not be, since tools that shrink files put greys into any order.
        if (colours == colours[:, :1]).all() and (np.diff(colours[:, 0]) < 0).any():
            raise ValueError(
                f"the greys in its palette are {', '.join(map(str, colours[:5, 0]))}, so that "
                "index and grey level would be different labels; save it as 8-bit grey"
            )
        return labels_HW


def image_size(path: Path | str) -> tuple[int, int]:
    """Reads from a file's header the number of rows and columns of the upright image.

    Raises:
        DataError: the file is not an image of a format that is read here.
    """
    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        columns, rows = image.size
        # In a PNG, Pillow would decode all pixels to look for EXIF behind them.
        has_exif = image.format != "PNG" or {"exif", "XML:com.adobe.xmp"} & image.info.keys()
        lying = bool(has_exif) and _orientation(image) in _ON_ITS_SIDE
        return (columns, rows) if lying else (rows, columns)


def _reading(path: Path | str) -> AbstractContextManager[None]:
    """Turns whatever Pillow raises into a DataError that names the file."""
    return reading(path, "cannot be read as an image", "copy or export it again")


@contextmanager
def _opened(path: Path | str) -> Iterator[ImageFile.ImageFile]:
    """Opens a file that must hold a single image, without decoding it."""
    with Image.open(path, formats=_FORMATS) as image:
        image.verify()  # checks all checksums of a PNG; decoding does not
    with Image.open(path, formats=_FORMATS) as image:
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"{frames} images in one file, expected one; save them one by one")
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an image and turns it as its EXIF says."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Reads an image's orientation from its EXIF, and no other tag.

    Pillow's functions are not used: `exif_transpose` writes all tags again, which fails for odd
    ones, and `getexif` treats an EXIF block that it cannot read as an empty one.

    Raises:
        ValueError: the EXIF block is damaged; or the image is a TIFF that is not upright, which
        some
            versions of Pillow turn by themselves, and some uncompressed ones wrongly.
        struct.error: the EXIF directory is cut off.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    if not tiff:  # XMP and TIFF store it elsewhere
        side = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        if image.format == "TIFF" and side in _TURNS:
            raise ValueError(
                f"this TIFF has orientation {side}; save it upright, with orientation 1"
            )
        return side
    if (order := {b"II": "<", b"MM": ">"}.get(tiff[:2])) is None:
        raise ValueError("its EXIF is damaged, so that it is not known which side is up")
    (start,) = struct.unpack_from(f"{order}L", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, _, value = struct.unpack_from(f"{order}HHLH", tiff, entry)
        if tag == ExifTags.Base.Orientation and kind == _SHORT:
            return int(value)
    return 1


def find_file(root: Path, name: str) -> Path | None:
    """Finds a file below `root`, whichever way the accents in its name are encoded.

    macOS writes accents as letters of their own and most other systems do not, so that a csv and
    files from different systems may differ.
    """
    for form in (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))):
        if (path := root / form).is_file():
            return path
    return None
