"""Pairs images and masks by their names without the ending.

A mask has the name of its image. Words that tools put before or after the name are ignored: mask,
seg, segmentation, label, gt or annotation (or their plurals) in a mask's name, image or img in an
image's name, separated by _, -, a dot or a blank. So p1.png or p1_img.png is paired with
p1_mask.png, and image_01.png with mask_01.png. Names are compared as text, whichever way accents
are encoded.

`p1_mask_1`, `p1_mask_2` and so on are masks of one image, with `p1_mask` or without.

`_0000` to `_9999` at the end of an image's name is a channel only if its mask's name has no such
end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.endings import ENDINGS, IMAGES, NIFTI, split_ending
from ..data.table import alike, nfc
from ..errors import DataError, shown

_MASK = r"(?:masks?|segs?|segmentations?|labels?|gt|annotations?)"
_IMAGE = r"(?:images?|imgs?)"
_SHORT = {".tiff": ".tif", ".jpeg": ".jpg"}  # one ending for formats that have two


@dataclass(frozen=True)
class File:
    """A file: its name without the ending, in NFC, and the ending of a link to it."""

    path: Path
    stem: str
    ending: str


@dataclass
class Pair:
    """The files of a case.

    Args:
        case_id: the name that image and mask share.
        masks: the masks of the image; several are joined into one.
        channels: the images by the number of their channel.
    """

    case_id: str
    masks: tuple[File, ...]
    channels: dict[int, File] = field(default_factory=dict)


@dataclass
class Pairing:
    """The pairs, and the images and masks without a partner, sorted by name."""

    pairs: dict[str, Pair]
    lone_images: list[File]
    lone_masks: list[File]

    def remarks(self) -> list[str]:
        """Gives sentences on files that could not be paired, and on masks that are joined."""
        several = [name for name, case in self.pairs.items() if case.masks[1:]]
        said = []
        if several:
            said.append(
                f"{len(several)} of {len(self.pairs)} cases have several masks, which are joined "
                f"into one; where they overlap, the higher label counts: {shown(several, 10)}."
            )
        for what, other, files in (
            ("image", "mask", self.lone_images),
            ("mask", "image", self.lone_masks),
        ):
            if files:
                have = "has" if len(files) == 1 else "have"
                them = f"{len(files)} {what}{'s' * (len(files) > 1)}"
                left = "is" if len(files) == 1 else "are"
                names = shown([file.path.name for file in files], 10)
                said.append(f"{them} {have} no {other} and {left} left out: {names}.")
        likes = {alike(_mask_name(file.stem)[0]): file for file in self.lone_masks}
        meant = [
            f"{image.path.name} and {likes[alike(stem)].path.name}"
            for image in self.lone_images
            if alike(stem := _bare(image.stem, _IMAGE)) in likes
        ]
        if meant:
            said.append(
                "These names differ slightly; if they belong together, rename one of each: "
                f"{shown(meant, 10)}."
            )
        return said


def list_files(images: Sequence[Path], masks: Sequence[Path]) -> tuple[list[File], list[File]]:
    """Lists the images and the masks in folders.

    If a folder is named for both, files with names of masks are masks, and the others are images.

    Raises:
        DataError: a folder does not exist, or has no such file.
    """
    both = {folder.resolve() for folder in images} & {folder.resolve() for folder in masks}
    listed = []
    for flag, folders, are_masks in (("--images", images, False), ("--masks", masks, True)):
        files = []
        for folder in folders:
            found = [
                file
                for file in _files(flag, folder)
                if folder.resolve() not in both
                or (_mask_name(file.stem)[0] != file.stem) == are_masks
            ]
            if not found:
                raise DataError(
                    f"{folder}: this folder is named for images and for masks, but no file in it "
                    f"has a name of {'a mask: p1_mask.png' if are_masks else 'an image: p1.png'}"
                )
            files += found
        listed.append(files)
    return listed[0], listed[1]


def _files(flag: str, folder: Path) -> list[File]:
    """Lists the files of a folder that may be images or masks, without hidden ones."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; correct {flag}")
    files, others = [], []
    for path in sorted(folder.iterdir()):
        stem, ending = split_ending(path.name)
        if path.name.startswith("."):
            continue
        if path.is_dir():
            others.append(f"{path.name}/")
        elif ending is None:
            others.append(path.name)
        else:
            files.append(File(path, nfc(stem), _SHORT.get(ending, ending)))
    if not files:
        raise DataError(
            f"{folder}: this folder ({flag}) has no file that ends in {', '.join(ENDINGS)}; it has "
            f"{shown(others, 5) or 'nothing'}"
        )
    return files


def pair(images: Sequence[File], masks: Sequence[File]) -> Pairing:
    """Pairs images and masks by their names.

    Raises:
        DataError: two files have the same name, no file has a partner, a case lacks a channel that
            others have, or files have different endings.
    """
    faults: list[str] = []
    whole: dict[str, dict[str, File]] = {}
    bare: dict[str, dict[str, File]] = {}
    for mask in masks:
        _take(whole.setdefault(mask.stem, {}), "", mask, faults)
    for mask in masks:
        name, number = _mask_name(mask.stem)
        if name not in whole:
            _take(bare.setdefault(name, {}), number, mask, faults)
    by_name = bare | whole
    pairs: dict[str, Pair] = {}
    lone: list[File] = []
    for image in images:
        for case_id, channel in _names(image.stem):
            if case_id in by_name:
                of_case = tuple(by_name[case_id].values())
                case = pairs.setdefault(case_id, Pair(case_id, of_case))
                _take(case.channels, channel, image, faults)
                break
        else:
            lone.append(image)
    used = {mask.path for case in pairs.values() for mask in case.masks}
    if faults:
        raise DataError("\n".join(faults))
    if not pairs:
        raise DataError(
            f"masks: no image and mask have the same name: images are {_few(images)}, masks are "
            f"{_few(masks)}; a mask must have the name of its image, either exactly or followed by "
            "_mask, _seg, _segmentation or _label"
        )
    pairs = dict(sorted(pairs.items()))
    _require_channels(pairs)
    _require_endings(pairs)
    return Pairing(pairs, lone, [mask for mask in masks if mask.path not in used])


def _names(stem: str) -> Iterator[tuple[str, int]]:
    """Gives the names that an image's case may have, and the channel that the image then is."""
    yield stem, 0
    yield _bare(stem, _IMAGE), 0
    if numbered := re.fullmatch(r"(.+)_(\d{4})", stem):
        yield numbered[1], int(numbered[2])


def _mask_name(stem: str) -> tuple[str, str]:
    """Gives the name of a mask's image, and the mask's number among several: p1 and 2 for
    p1_mask_2."""
    if several := re.fullmatch(r"(.+)[ _.-]masks?[ _-](\d{1,2})", stem, re.IGNORECASE):
        return several[1], several[2]
    return _bare(stem, _MASK), ""


def _bare(stem: str, word: str) -> str:
    """Removes such a word from the end of a name or, if it is not there, from its beginning."""
    for pattern in (rf"(.+)[ _.-]{word}", rf"{word}[ _.-](.+)"):
        if found := re.fullmatch(pattern, stem, re.IGNORECASE):
            return found[1]
    return stem


def _take(taken: dict, key: str | int, file: File, faults: list[str]) -> None:
    """Adds a file under a key, or adds a fault if another file has that key."""
    if taken.setdefault(key, file) is not file:
        faults.append(
            f"{taken[key].path} and {file.path} have the same name; remove one of them, or join "
            "both into one file"
        )


def _few(files: Sequence[File]) -> str:
    return shown([file.path.name for file in files], 3)


def _require_channels(pairs: dict[str, Pair]) -> None:
    """Raises a DataError unless all cases have the same channels, from 0 on."""
    channels = {number for case in pairs.values() for number in case.channels}
    if channels != {*range(len(channels))}:
        raise DataError(
            "images: the channels in their names are "
            f"{', '.join(f'_{number:04}' for number in sorted(channels))}, expected all from _0000 "
            "on; rename the images"
        )
    if lacking := [name for name, case in pairs.items() if len(case.channels) < len(channels)]:
        raise DataError(
            f"images: {len(lacking)} of {len(pairs)} cases lack one of the {len(channels)} "
            f"channels; add the missing images: {shown(lacking, 10)}"
        )


def _require_endings(pairs: dict[str, Pair]) -> None:
    """Raises a DataError unless all images have one ending, and masks are of the same kind."""
    images = [file for case in pairs.values() for file in case.channels.values()]
    endings = sorted({file.ending for file in images})
    if len(endings) > 1:
        first = [next(file.path for file in images if file.ending == ending) for ending in endings]
        raise DataError(
            f"images: they end in {' and '.join(endings)}, such as "
            f"{' and '.join(map(str, first))}, but all images of a folder must have one ending; "
            "save them in one format, or convert them into several folders"
        )
    several = next((case for case in pairs.values() if case.masks[1:]), None)
    if several and endings[0] not in (*NIFTI, *IMAGES):
        raise DataError(
            f"{several.masks[1].path}: this is a second mask of {several.case_id}, but "
            f"{endings[0]} files cannot be joined here; join them into one file, or save all files "
            "as .nii.gz"
        )
    alike_enough = next((kind for kind in (NIFTI, IMAGES) if endings[0] in kind), endings)
    for mask in (mask for case in pairs.values() for mask in case.masks):
        if mask.ending not in alike_enough:
            raise DataError(
                f"{mask.path}: this mask ends in {mask.ending}, but its image ends in "
                f"{endings[0]}; save masks as {' or '.join(alike_enough)}"
            )
