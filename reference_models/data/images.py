"""Reads images of 2D data sets from files: upright, 8 bits a channel, to their end."""

from __future__ import annotations

import struct
import unicodedata
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..errors import reading

# What brings an image upright whose EXIF says that it lies otherwise.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_SHORT = 3  # EXIF's code of a number of 16 bits


def read_image(path: Path | str) -> np.ndarray:
    """Reads an image as rows x columns x RGB, uint8, upright as its EXIF says.

    Damage of a PNG is found by its checksums. A JPEG has none: one that is cut off is refused, but
    a byte that is another one may give another picture, and nobody can tell.

    Raises:
        DataError: it is damaged, or not of 8 opaque bits a channel.
    """
    with reading(path, "cannot be read as an image", "copy or export it again"):
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums, which decoding alone does not look at to the end
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # which Pillow would cut off at 255
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            turn = _TURNS.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            see_through = "A" in image.mode or "transparency" in image.info
            if see_through and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("parts of it are transparent, and what lies behind is not known")
            return np.asarray(upright.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    """Reads from an image's EXIF which side is up, and none of the other tags.

    By hand, since Pillow's `exif_transpose` writes all tags anew, which fails on odd ones, and its
    `getexif` takes an EXIF block that it cannot read for an empty one.

    Raises:
        ValueError: it is no EXIF block.
        struct.error: its directory is cut off.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    if not tiff:  # XMP and TIFF have it elsewhere
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    if (order := {b"II": "<", b"MM": ">"}.get(tiff[:2])) is None:
        raise ValueError("its EXIF is damaged, so that which side is up is not known")
    (start,) = struct.unpack_from(f"{order}L", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, _, value = struct.unpack_from(f"{order}HHLH", tiff, entry)
        if tag == ExifTags.Base.Orientation and kind == _SHORT:
            return int(value)
    return 1


def find_file(root: Path, name: str) -> Path | None:
    """Finds a file below `root`, however the accents in its name are written there.

    macOS takes accents apart and most others do not, so that a csv of the one names files of the
    other.
    """
    for form in (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))):
        if (path := root / form).is_file():
            return path
    return None
