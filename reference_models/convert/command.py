"""The command `convert`: it makes a folder of nnU-Net's layout from images, masks and a csv."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image
from rich.console import Console
from rich.progress import track

from ..data.datasets import OR_NONE
from ..data.endings import LOSSLESS, VOLUMES
from ..errors import DataError, reading
from ..files import write_results
from .labels import Labels, find_labels, look_at_masks, write_labels
from .pairing import Pair, list_files, pair
from .rows import Rows, read_rows

_RGB = ("R", "G", "B")  # as nnU-Net's own examples name them
_GREY = ("1", "L", "LA")  # of Pillow's modes
_STDERR = Console(stderr=True)


@dataclass(frozen=True)
class ConvertSettings:
    """Settings of `convert`.

    Images are linked, neither moved nor changed; where the system allows no links they are copied.
    Masks that hold labels (0, 1, 2 ...) are linked too. Other masks are written anew: 0 and 255
    become 0 and 1.
    """

    images: tuple[Path, ...]
    """Folders that hold the images (.png, .tif, .bmp,
    .jpg) or volumes (.nii.gz, .nii, .mha, .nrrd)."""
    masks: tuple[Path, ...]
    """Folders that hold the masks; they may be the
    folders of the images. A mask has the name of its
    image, either exactly or followed by a word such
    as mask, seg, segmentation or label: p1.png and
    p1_mask.png."""
    attributes: Path
    """Csv file with a row for each image and a column
    for each attribute, such as sex, scanner or
    hospital."""
    to: Path
    """Folder to write. It must not exist yet, or be
    empty."""
    labels: Annotated[tuple[str, ...], OR_NONE] = ()
    """Names of the labels, the background first. Without
    this flag the labels are named foreground, or
    label 1, label 2 and so on, if the masks leave no
    doubt.
    - background cyst tumour: for masks of 0, 1 and 2.
    - background=0 cyst=128 tumour=#ff0000: for masks
      of other numbers or of colours.
    Pixels of a label named ignore count in no loss
    and no score."""
    channels: Annotated[tuple[str, ...], OR_NONE] = ()
    """Names of the channels. Name CT volumes in
    Hounsfield units CT, so that they are clipped to a
    window; other channels are brought to mean 0 and
    variance 1."""
    case: str | None = None
    """Column of the csv that names the images. None: the
    column that names most of them."""
    subject: str | None = None
    """Column of the csv that names the patients. Give it
    if a patient has several images, so that no
    patient is both trained and tested on. None: the
    column subject, if there is one."""


def convert(settings: ConvertSettings) -> list[str]:
    """Writes the folder, completely or not at all.

    Returns:
        Sentences that say what was done and what was left out; the last two name the next commands.

    Raises:
        DataError: `to` exists already, or the files leave open what to write.
    """
    to = settings.to
    if to.is_symlink() or (to.exists() and not (to.is_dir() and not any(to.iterdir()))):
        raise DataError(
            f"{to}: this folder (--to) exists already; remove it or name another folder."
        )
    pairing = pair(*list_files(settings.images, settings.masks))
    pairs = pairing.pairs
    rows = read_rows(settings.attributes, pairs, settings.case, settings.subject)
    masks = look_at_masks([mask for case in pairs.values() for mask in case.masks])
    labels = find_labels(masks, settings.labels)
    channels, scaling = _channels(pairs, settings.channels)

    def write(folder: Path) -> int:
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir()
        ending = _ending(pairs)
        copied = 0
        for name, case in track(pairs.items(), "writing", console=_STDERR, transient=True):
            for number, image in case.channels.items():
                copied += _link(image.path, folder / f"imagesTr/{name}_{number:04}{ending}")
            target = folder / f"labelsTr/{name}{_mask_ending(ending)}"
            first, *others = case.masks
            if first.ending == _mask_ending(ending) and masks[first].hold(labels) and not others:
                copied += _link(first.path, target)
            else:
                write_labels(case.masks, target, labels)
        _write_texts(folder, rows, labels, channels, ending)
        return copied

    copied = write_results(to, write, contents=())
    root, volumes = f"--data folder --root {shlex.quote(str(to))}", _ending(pairs) in VOLUMES
    return [
        f"{len(pairs)} masks were paired with their images by name.",
        *pairing.remarks(),
        *rows.remarks,
        labels.said,
        *([scaling] if scaling else []),
        f"{copied} files were copied, since the system allows no links here."
        if copied
        else "The files are links to your files: do not move those, or copy the folder by cp -rL.",
        f"Written: {to}. Next: python -m reference_models check {root}",
        f"Then train: python -m reference_models train {'small3d' if volumes else 'small'} {root} "
        f"--attributes {shlex.quote(rows.attribute)}",
    ]


def _ending(pairs: Mapping[str, Pair]) -> str:
    """Gives the ending that all images have."""
    return next(iter(pairs.values())).channels[0].ending


def _mask_ending(ending: str) -> str:
    """Gives the masks' ending: that of the images, or .png if that ending would change labels."""
    return ending if ending in (*LOSSLESS, *VOLUMES) else ".png"


def _channels(pairs: Mapping[str, Pair], names: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Gives the channels' names, and a sentence that says how their intensities are scaled.

    Raises:
        DataError: the number of names is not that of the channels, or an image cannot be read.
    """
    count = len(next(iter(pairs.values())).channels)
    images = [image.path for case in pairs.values() for image in case.channels.values()]
    usual: tuple[str, ...] = ("image",)
    if count > 1:
        usual = tuple(f"channel {number}" for number in range(count))
    elif _ending(pairs) not in VOLUMES and not all(map(_is_grey, images)):
        usual = _RGB  # a grey image among them counts as three equal channels
    # A case of one colour file whose three channels are equal may have one channel instead.
    if names and len(names) not in {len(usual), count}:
        raise DataError(
            f"channels: got {', '.join(names)}, but the images have {len(usual)} channels; give "
            "one name for each."
        )
    said = (
        f"The channels are named {', '.join(usual)}. Each one is brought to mean 0 and variance 1 "
        "in every image. Name them by --channels if that is wrong: CT for Hounsfield units."
    )
    return (names, "") if names else (usual, said)


def _is_grey(path: Path) -> bool:
    with reading(path, "cannot be read as an image", "export it again"), Image.open(path) as image:
        return image.mode in _GREY


def _link(source: Path, target: Path) -> bool:
    """Links a file, or copies it where the system allows no link; True if it copied."""
    try:
        target.symlink_to(source.resolve())
    except OSError:  # such as on Windows without the privilege, or on a USB stick
        shutil.copyfile(source, target)
        return True
    return False


def _write_texts(
    folder: Path, rows: Rows, labels: Labels, channels: tuple[str, ...], ending: str
) -> None:
    """Writes dataset.json and attributes.csv."""
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {name: label for label, name in enumerate(labels.names)},
        "numTraining": len(rows.cells),
        "file_ending": ending,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (folder / "dataset.json").write_text(text, encoding="utf-8")
    with (folder / "attributes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([rows.columns, *rows.cells.values()])
