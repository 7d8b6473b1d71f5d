"""No damaged file ends in a traceback; where a format has checksums, none is read wrongly."""

import struct

import numpy as np
import pytest
from harness.checks import checked, errors
from harness.damaged_files import CHECKED, fuzz
from harness.image_folders import ham_folder
from PIL import Image

from reference_models.data import open_dataset
from reference_models.errors import DataError, reading


def test_damaged_files_are_refused_by_name_or_read_as_they_were(tmp_path):
    found = fuzz(tmp_path, 160, seed=0)
    assert sum(found.values()) == 160
    assert sum(n for (_, outcome), n in found.items() if outcome == "refused") > 90
    assert not [kind for kind, outcome in found if outcome == "refused, unnamed"]
    assert not [kind for kind, outcome in found if outcome == "otherwise" and kind in CHECKED]


def with_exif(path, *tags, lying=None):
    """Saves a photograph with the entries of an EXIF directory: (tag, kind, count, bytes)."""
    ifd = struct.pack("<H", len(tags))
    for tag, kind, count, value in tags:
        ifd += struct.pack("<HHL4s", tag, kind, count, value)
    block = b"Exif\0\0II*\0" + struct.pack("<L", 8) + ifd + bytes(4)
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    (pixels if lying is None else pixels.transpose(lying)).save(path, quality=95, exif=block)


ODD = {
    "XResolution as text": (0x11A, 2, 3, b"72\0\0"),
    "a count of everything": (0x10F, 2, 2**32 - 1, b"\0\0\0\1"),
    "a kind that there is not": (0x110, 77, 1, bytes(4)),
    "a pointer to itself": (0x8769, 4, 1, struct.pack("<L", 8)),
}


@pytest.mark.parametrize("tag", ODD)
def test_which_side_is_up_is_read_without_the_other_tags(tmp_path, tag):
    settings, _ = ham_folder(tmp_path)
    path = settings.root / "HAM10000_images/ISIC_0000003.jpg"
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :15] = 255
    Image.fromarray(pixels).save(path, quality=95)
    orientation = (0x112, 3, 1, struct.pack("<HH", 6, 0))
    with_exif(path, *sorted([orientation, ODD[tag]]), lying=Image.Transpose.ROTATE_90)
    code, text = checked(settings)
    assert code == 0, text
    dataset = open_dataset(settings)
    image_CS = dataset.load(dataset.cases[3]).image_CS
    assert image_CS[:, :10, :15].mean() > 0.95
    assert image_CS.mean() < 0.3


def test_exif_that_is_none_is_named(tmp_path):
    settings, _ = ham_folder(tmp_path)
    path = settings.root / "HAM10000_images/ISIC_0000003.jpg"
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    cut = b"II*\0" + struct.pack("<LH", 8, 9) + bytes(20)  # nine entries, of which two are there
    for block in (b"sorry, none here", b"II", cut):
        pixels.save(path, exif=b"Exif\0\0" + block)
        (line,) = errors(checked(settings)[1])
        assert line.startswith(f"error: {path}: cannot be read as an image (")


def test_whatever_a_foreign_reader_raises_becomes_an_error_that_names_the_file():
    for raised, words in (
        (RecursionError("deep"), r"a\.x: no file of ours \(RecursionError: deep\); mend it"),
        (ValueError("one\ntwo"), r"a\.x: no file of ours \(one two\); mend it"),
        (MemoryError("9 TiB"), r"needs more memory than this machine has: 9 TiB\).* else mend it"),
    ):
        with pytest.raises(DataError, match=words), reading("a.x", "no file of ours", "mend it"):
            raise raised
    with pytest.raises(KeyboardInterrupt), reading("a.x", "no file of ours", "mend it"):
        raise KeyboardInterrupt
    ours = DataError("b.x: a channel is missing")
    with pytest.raises(DataError, match=r"^b\.x: a"), reading("a.x", "no file", "mend it"):
        raise ours
