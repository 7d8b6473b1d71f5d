"""The command `convert`: a folder in nnU-Net's layout of images, masks and a csv."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

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
    """A folder in nnU-Net's layout, of images and masks that lie otherwise.

    Images are linked, not moved and not changed; where the system allows no links they are copied.
    Masks are linked too if they hold labels as they are, and written anew if not: 0 and 255 become
    0 and 1.
    """

    images: tuple[Path, ...]
    """Folders of the images: .png, .tif, .bmp or .jpg, or volumes: .nii.gz, .nii, .mha or .nrrd."""
    masks: tuple[Path, ...]
    """Folders of the masks, which are called as their images are, with nothing or a word such as
    _mask, _seg, _segmentation or _label behind it; may be those of the images."""
    attributes: Path
    """A csv with a row for each image, and its groups: sex, scanner, hospital."""
    to: Path
    """The folder to write, which must not be there yet."""
    labels: tuple[str, ...] = ()
    """Names of the labels, the background first: background cyst tumour. Where masks hold other
    numbers or colours than 0, 1, 2, each with its own: background=0 cyst=128 tumour=#ff0000. What
    is called ignore counts in no loss and no score."""
    channels: tuple[str, ...] = ()
    """Names of the channels, by which intensities are scaled: CT is one, anything else is not."""
    case: str | None = None
    """Column of the csv that names the images; by default the one that names most of them."""
    subject: str | None = None
    """Column of the csv that names the patients, where one has several images; by default the
    column subject, if there is one."""


def convert(settings: ConvertSettings) -> list[str]:
    """Writes the folder, whole or not at all.

    Returns:
        What was done and what could not be, in sentences; the next command comes last.

    Raises:
        DataError: `to` is there already, or the files do not say what is to be written.
    """
    to = settings.to
    if to.is_symlink() or (to.exists() and not (to.is_dir() and not any(to.iterdir()))):
        raise DataError(f"{to}: is there already (--to); take it away, or name another folder")
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
    return [
        f"{len(pairs)} images and masks are called alike.",
        *pairing.remarks(),
        *rows.remarks,
        labels.said,
        *([scaling] if scaling else []),
        f"{copied} files are copied, since the system allows no links here."
        if copied
        else "Files are links to yours: leave those where they are, or copy the folder by cp -rL.",
        f"Written: {to}. Next: python -m reference_models check --data folder --root "
        f"{shlex.quote(str(to))}",
    ]


def _ending(pairs: Mapping[str, Pair]) -> str:
    """How all images end."""
    return next(iter(pairs.values())).channels[0].ending


def _mask_ending(ending: str) -> str:
    """How masks end beside images that end so: alike, where that packs without loss."""
    return ending if ending in (*LOSSLESS, *VOLUMES) else ".png"


def _channels(pairs: Mapping[str, Pair], names: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The channels' names, and a sentence on how that makes intensities be scaled.

    Raises:
        DataError: there are not as many channels as names, or an image cannot be read.
    """
    count = len(next(iter(pairs.values())).channels)
    images = [image.path for case in pairs.values() for image in case.channels.values()]
    usual: tuple[str, ...] = ("image",)
    if count > 1:
        usual = tuple(f"channel {number}" for number in range(count))
    elif _ending(pairs) not in VOLUMES and not all(map(_is_grey, images)):
        usual = _RGB  # grey images among them count as three channels alike
    # Of one file of colours a case, three alike may be one channel.
    if names and len(names) not in {len(usual), count}:
        raise DataError(f"channels: got {', '.join(names)}, but images have {len(usual)} of them")
    said = (
        f"Channels are called {', '.join(usual)}, so that each is brought to mean 0 and variance 1 "
        "in every image; name them by --channels, such as CT of a CT in Hounsfield units."
    )
    return (names, "") if names else (usual, said)


def _is_grey(path: Path) -> bool:
    with reading(path, "cannot be read as an image", "export it again"), Image.open(path) as image:
        return image.mode in _GREY


def _link(source: Path, target: Path) -> bool:
    """Links a file, or copies it where the system allows no link; returns whether it did that."""
    try:
        target.symlink_to(source.resolve())
    except OSError:  # as on Windows without a privilege, or on a stick
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
