"""Finds what the numbers and colours in masks mean, and writes masks with labels instead.

The first of these rules that fits is used. Masks of 0, 1, 2 and so on hold labels already. In masks
of 0 and 255, or of black and one colour, the latter is label 1. For all other masks `--labels` must
say what each number or colour is.

Shapes: S spatial axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from ..data.endings import NIFTI, VOLUMES
from ..data.folder import INTEGRAL
from ..data.images import read_image, read_labels
from ..data.nnunet import IGNORE, MOST_LABELS
from ..data.readers import open_volume
from ..errors import DataError, reading, shown
from .pairing import File

COLOUR = 1 << 24  # it is added to 0xRRGGBB, so that no colour equals a grey level
WHITE = 255
BACKGROUND = "background"
_MANY = 30  # so many values come from smoothing or lossy compression, not from a choice


@dataclass(frozen=True)
class Labels:
    """The labels of masks.

    Args:
        names: the names of the labels, in their order; the background is first, ignore is last.
        of_value: the label of each value, such as 255 or a colour.
        said: a sentence on what the masks hold.
    """

    names: tuple[str, ...]
    of_value: Mapping[int, int]
    said: str


@dataclass(frozen=True)
class Values:
    """The values in a mask.

    Args:
        values: each value once.
        plain: whether each pixel is one number, so that the file can be read as labels.
    """

    values: frozenset[int]
    plain: bool = True

    def hold(self, labels: Labels) -> bool:
        """Whether the mask holds these labels already."""
        return self.plain and all(labels.of_value[value] == value for value in self.values)


def look_at_masks(files: Sequence[File]) -> dict[File, Values]:
    """Reads the values in all masks, except .mha and .nrrd files, which must hold labels already.

    Raises:
        DataError: `read_values` raises it, or palettes give one number different colours.
    """
    masks: dict[File, Values] = {}
    colours: dict[int, tuple[tuple[int, ...], Path]] = {}
    console = Console(stderr=True)
    for file in track(files, "reading masks", console=console, transient=True):
        if file.ending in VOLUMES and file.ending not in NIFTI:
            masks[file] = Values(frozenset())
            continue
        values_S = read_values(file)
        values = frozenset(np.unique(values_S).tolist())
        palette = {} if file.ending in VOLUMES else _palette(file.path)
        for value in palette.keys() & values:
            colour, other = colours.setdefault(value, (palette[value], file.path))
            if colour != palette[value]:
                raise DataError(
                    f"{file.path}: in its palette {value} is the colour {palette[value]}, but in "
                    f"that of {other} it is {colour}, so that the numbers are no labels; save all "
                    "masks as RGB"
                )
        masks[file] = Values(values, file.ending in VOLUMES or _single(file.path))
    return masks


def _single(path: Path) -> bool:
    """Whether an image has one number for each pixel; 1 bit is read as black and white instead."""
    with Image.open(path) as image:
        return image.mode in ("L", "P")


def _palette(path: Path) -> dict[int, tuple[int, ...]]:
    """Gives the colours of an image's palette by index; none if it is grey or has no palette."""
    with Image.open(path) as image:
        colours = np.array(image.getpalette() or [], int).reshape(-1, 3)
    if (colours == colours[:, :1]).all():
        return {}
    return {place: tuple(colour) for place, colour in enumerate(colours.tolist())}


def read_values(file: File) -> np.ndarray:
    """Reads the value of each pixel of a mask: a number, also for grey in RGB, or a colour as
    `COLOUR` + 0xRRGGBB.

    Raises:
        DataError: the mask cannot be read, is compressed with loss, or holds fractions.
    """
    path = str(file.path)
    if file.ending in VOLUMES:
        voxels_S = open_volume(path).read()
        values_S = np.rint(voxels_S)
        if np.abs(voxels_S - values_S).max() > INTEGRAL:
            raise DataError(
                f"{path}: this mask holds fractions, expected whole numbers; resample masks by the "
                "nearest neighbour"
            )
        return values_S.astype(np.int32)
    with reading(path, "cannot be read", "write it again"):
        single = _single(file.path)
    if single or file.ending == ".jpg":  # read_labels refuses the latter
        return read_labels(path)
    image_S3 = read_image(path).astype(np.int32)
    colour_S = COLOUR + image_S3 @ np.array([1 << 16, 1 << 8, 1])
    grey_S = image_S3[..., 0]
    return np.where((image_S3 == grey_S[..., None]).all(-1), grey_S, colour_S)


def find_labels(masks: Mapping[File, Values], given: Sequence[str]) -> Labels:
    """Decides which label each value is.

    Args:
        masks: what `look_at_masks` returned.
        given: the names of the labels, either all with the value that masks hold, as in
            background=0 lesion=255, or all without. Empty if the masks leave no doubt.

    Raises:
        DataError: the masks leave it open, or `given` does not fit their values.
    """
    found = {value: mask.path for mask, held in masks.items() for value in held.values}
    names, values = _parsed(given)
    if not names:
        names, values = _guessed(found)
    elif not values:
        values = [*range(len(names))]
        if len(names) == 2:
            values = _binary(found) or values
    places = {BACKGROUND: -1, IGNORE: 1}  # the others stay in their order
    pairs = sorted(zip(names, values, strict=True), key=lambda pair: places.get(pair[0], 0))
    names, values = [name for name, _ in pairs], [value for _, value in pairs]
    if strange := sorted({*found} - {*values}):
        raise DataError(
            f"{found[strange[0]]}: this mask holds {_written(strange[0])}, which --labels does not "
            f"name ({', '.join(map(_written, values))}); the masks hold {_list(found)}: name each "
            f"of these, as in --labels {_example(found)}"
        )
    of_value = {value: label for label, value in enumerate(values)}
    if all(value == label for value, label in of_value.items()):
        said = f"The masks hold labels already: {_table(names, values)}."
    else:
        said = f"The masks were written again with labels: {_table(names, values)}."
    return Labels(tuple(names), of_value, said)


def _parsed(given: Sequence[str]) -> tuple[list[str], list[int]]:
    """Splits texts such as name=value into names and values; there are values for all or none.

    Raises:
        DataError: a value is neither a number nor a colour, or a name or value occurs twice.
    """
    names, values = [], []
    for text in given:
        name, equals, value = text.rpartition("=")
        names.append((name if equals else text).strip())
        if equals:
            if re.fullmatch(r"#[0-9a-fA-F]{6}", value):
                number = int(value[1:], 16)
                red, green, blue = number >> 16, number >> 8 & 255, number & 255
                values.append(red if red == green == blue else COLOUR + number)
            elif re.fullmatch(r"-?[0-9]+", value):
                values.append(int(value))
            else:
                raise DataError(
                    f"labels: got {text}, expected a name, or a name and the value that masks "
                    "hold, such as lesion=255 or lesion=#ff0000"
                )
    if given and (
        "" in names
        or not 2 <= len(names) <= MOST_LABELS
        or len({*names}) < len(names)
        or len({*values}) < len(values)
        or len(values) not in (0, len(names))
        or (BACKGROUND in names[1:] and not values)
    ):
        raise DataError(
            f"labels: got {' '.join(given)}, expected two or more different names, the background "
            "first, and a value for all or for none, such as background=0 lesion=255"
        )
    return names, values


def _guessed(found: Mapping[int, Path]) -> tuple[list[str], list[int]]:
    """Makes up names for the values in masks, if they leave no doubt.

    Raises:
        DataError: the values may mean several things.
    """
    values = sorted(found)
    if not values:
        raise DataError(
            "labels: the masks end in .mha or .nrrd and are not read; name their labels, as in "
            "--labels background tumour"
        )
    if values == [0]:
        raise DataError("masks: all masks are only background (0); check what --masks names")
    top = values[-1]
    if top < MOST_LABELS and values in ([1], [*range(top + 1)]):
        names = ["foreground"] if top == 1 else [f"label {label}" for label in range(1, top + 1)]
        return [BACKGROUND, *names], [*range(top + 1)]
    if binary := _binary(found):
        return [BACKGROUND, "foreground"], binary
    if len(values) > _MANY:
        raise DataError(
            f"{found[values[1]]}: the masks hold {len(values)} values, {_list(found)}, as if they "
            "were smoothed, compressed as JPEG, or no masks; export them again with one number for "
            "each label"
        )
    same = ""
    if values == [0, 1, WHITE]:
        same = f"; if 1 and {WHITE} mean the same, write the masks that hold {WHITE} again with 1"
    raise DataError(
        f"{found[top]}: the masks hold {_list(found)}, and it is not known which is which; name "
        f"them, as in --labels {_example(found)}{same}"
    )


def _binary(found: Mapping[int, Path]) -> list[int]:
    """Gives the two values of masks that are black and white, or black and one colour; else "
    "none."""
    top = max(found, default=0)
    return [0, top] if {*found} <= {0, top} and (top == WHITE or top >= COLOUR) else []


def _written(value: int) -> str:
    return f"#{value - COLOUR:06x}" if value >= COLOUR else str(value)


def _list(found: Mapping[int, Path]) -> str:
    return shown([_written(value) for value in sorted(found)], 8)


def _example(found: Mapping[int, Path]) -> str:
    """Gives an example of --labels for the values found, in which only names are missing."""
    others = [_written(value) for value in sorted({*found} - {0})]
    named = [f"'label{place}={value}'" for place, value in enumerate(others[:8], 1)]
    return " ".join(["background=0", *named])


def _table(names: Sequence[str], values: Sequence[int]) -> str:
    return ", ".join(
        f"{label} {name}" + (f" (was {_written(value)})" if value != label else "")
        for label, (name, value) in enumerate(zip(names, values, strict=True))
    )


def write_labels(files: Sequence[File], target: Path, labels: Labels) -> None:
    """Writes the masks of an image as one mask of labels, with 8 bits for each pixel.

    Where several masks overlap, the higher label counts. The ending of `target` decides the format.

    Raises:
        DataError: `read_values` raises it, or masks of one image differ in size.
    """
    first = files[0]
    together_S = _labels_in(first, labels)
    for other in files[1:]:
        labels_S = _labels_in(other, labels)
        if labels_S.shape != together_S.shape:
            raise DataError(
                f"{other.path}: this mask has size {labels_S.shape}, but {first.path}, a mask of "
                f"the same image, has {together_S.shape}"
            )
        np.maximum(together_S, labels_S, out=together_S)
    if first.ending not in NIFTI:
        Image.fromarray(together_S).save(target)
        return
    header = open_volume(str(first.path)).header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    nibabel.save(nibabel.Nifti1Image(together_S, None, header), target)


def _labels_in(file: File, labels: Labels) -> np.ndarray:
    """Reads a mask and turns its values into labels (uint8)."""
    values_S = read_values(file)
    labels_S = np.zeros(values_S.shape, np.uint8)
    for value, label in labels.of_value.items():
        labels_S[values_S == value] = label
    return labels_S
