"""Reads images and masks of 2D data sets from files: upright, 8 bits a channel, to their end.

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
_ON_ITS_SIDE = (5, 6, 7, 8)  # of these, those by which rows become columns

_SHORT = 3  # EXIF's code of a number of 16 bits
_LOSSLESS = ("PNG", "TIFF", "BMP")
_FORMATS = (*_LOSSLESS, "JPEG")  # and MPO, a phone's JPEG with further pictures behind it


def read_image(path: Path | str) -> np.ndarray:
    """Reads an image as rows x columns x RGB, uint8, upright as its EXIF says.

    Damage of a PNG is found by its checksums. A JPEG has none: one that is cut off is refused, but
    a byte that is another one may give another picture, and nobody can tell.

    Raises:
        DataError: it is damaged, or not of 8 opaque bits a channel.
    """
    with _reading(path), _opened(path) as image:
        # Pillow cuts these off at 255, and of 16 bits a colour takes the upper 8.
        if image.mode[0] in "IF" or ";16" in str(image.tile):
            bits = f"mode {image.mode}" if image.mode[0] in "IF" else "16 bits a channel"
            raise ValueError(f"{bits}, expected 8 bits a channel; bring its intensities to 0..255")
        upright = _upright(image)
        see_through = "A" in upright.mode or "transparency" in upright.info
        if see_through and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("parts of it are transparent, and what lies behind is not known")
        return np.asarray(upright.convert("RGB"))


def read_labels(path: Path | str) -> np.ndarray:
    """Reads a mask as rows x columns, uint8: its pixels' numbers, of a palette their places in it.

    Raises:
        DataError: it is damaged, packed with loss, or not of one number of up to 8 bits a pixel.
    """
    with reading(path, "cannot be read", "write it again"), _opened(path) as image:
        if image.format not in _LOSSLESS or image.info.get("compression") == "jpeg":
            raise ValueError("it is packed as JPEG, which changes labels; expected PNG or TIFF")
        if image.mode not in ("1", "L", "P"):
            raise ValueError(
                f"a {image.format} of mode {image.mode}, expected one label a pixel: 8 bits, grey "
                "or palette"
            )
        upright = _upright(image)
        labels_HW = np.asarray(upright).astype(np.uint8)
        palette = np.array(upright.getpalette() or [], np.int64).reshape(-1, 3)
        colours = palette[: int(labels_HW.max()) + 1]
        # Of colours, places in the palette are the labels. Of greys that do not rise with their
        # places they need not be: tools that make files small put greys into any order.
        if (colours == colours[:, :1]).all() and (np.diff(colours[:, 0]) < 0).any():
            raise ValueError(
                f"its palette's greys are {', '.join(map(str, colours[:5, 0]))}, so that place and "
                "grey level are different labels; write it as 8-bit grey"
            )
        return labels_HW


def image_size(path: Path | str) -> tuple[int, int]:
    """Reads from a file's header how many rows and columns it has when it is upright.

    Raises:
        DataError: it is no image that can be read here.
    """
    with _reading(path), Image.open(path, formats=_FORMATS) as image:
        columns, rows = image.size
        # Of a PNG, Pillow would decode all to look for EXIF behind the pixels.
        told = image.format != "PNG" or {"exif", "XML:com.adobe.xmp"} & image.info.keys()
        lying = bool(told) and _orientation(image) in _ON_ITS_SIDE
        return (columns, rows) if lying else (rows, columns)


def _reading(path: Path | str) -> AbstractContextManager[None]:
    """Names the file of whatever Pillow raises."""
    return reading(path, "cannot be read as an image", "copy or export it again")


@contextmanager
def _opened(path: Path | str) -> Iterator[ImageFile.ImageFile]:
    """Opens a file of a single image, of which nothing has been decoded yet."""
    with Image.open(path, formats=_FORMATS) as image:
        image.verify()  # a PNG's checksums, which decoding alone does not look at to the end
    with Image.open(path, formats=_FORMATS) as image:
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"{frames} images in one file, expected one")
        yield image


def _upright(image: Image.Image) -> Image.Image:
    """Decodes an image and turns it as its EXIF says."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """Reads from an image's EXIF which side is up, and none of the other tags.

    By hand, since Pillow's `exif_transpose` writes all tags anew, which fails on odd ones, and its
    `getexif` takes an EXIF block that it cannot read for an empty one.

    Raises:
        ValueError: it is no EXIF block; or it is a TIFF that lies otherwise, which some versions of
            Pillow turn by themselves, and some uncompressed ones wrongly.
        struct.error: its directory is cut off.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    if not tiff:  # XMP and TIFF have it elsewhere
        side = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        if image.format == "TIFF" and side in _TURNS:
            raise ValueError(f"a TIFF of orientation {side}; save it upright, with orientation 1")
        return side
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
