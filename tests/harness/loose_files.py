"""Images, masks and a csv as people have them, in no layout, for the tests of `convert`."""

import csv
import dataclasses
import json

import numpy as np
from PIL import Image

from reference_models.convert.command import ConvertSettings, convert

SIZE = (24, 32)


def mask_of(value=255, place=0):
    mask_HW = np.zeros(SIZE, np.uint8)
    mask_HW[4 + place : 12 + place, 6:20] = value
    return mask_HW


def loose(root, n=6, image="us_{:03}.png", mask="us_{:03}_mask.png", value=255, rows=None):
    """`n` grey images in a/, a mask of each in b/, and c.csv with a row for each."""
    rng = np.random.default_rng(0)
    for folder in ("a", "b"):
        (root / folder).mkdir()
    for i in range(n):
        pixels_HW = rng.integers(0, 255, SIZE, dtype=np.uint8)
        Image.fromarray(pixels_HW).save(root / "a" / image.format(i))
        Image.fromarray(mask_of(value, i)).save(root / "b" / mask.format(i))
    rows = rows or ["file,sex", *(f"{image.format(i)},{'MF'[i % 2]}" for i in range(n))]
    (root / "c.csv").write_text("\n".join(rows), encoding="utf-8")
    return ConvertSettings((root / "a",), (root / "b",), root / "c.csv", root / "out")


def converted(settings, **changes):
    """What `convert` said, and dataset.json, the csv's rows and the names of labels' files."""
    said = convert(dataclasses.replace(settings, **changes))
    to = settings.to
    content = json.loads((to / "dataset.json").read_text(encoding="utf-8"))
    with (to / "attributes.csv").open(newline="", encoding="utf-8") as file:
        rows = [*csv.reader(file)]
    return said, content, rows, sorted(path.name for path in (to / "labelsTr").iterdir())


def labels_in(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)
