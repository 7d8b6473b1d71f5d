"""Which mask is whose: images and masks are paired by their names without the ending.

A mask is called as its image is. What tools put behind a name or before it does not count: mask,
seg, segmentation, label, gt or annotation (or their plurals) of a mask, image or img of an image,
set off by _, -, a dot or a blank. So p1.png or p1_img.png go with p1_mask.png, and image_01.png
with mask_01.png. Names count as text, accents however the system writes them.

`p1_mask_1`, `p1_mask_2` and so on are masks of one image, with `p1_mask` or without.

`_0000` to `_9999` behind an image's name is a channel only where its mask is called without it.
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
_SHORT = {".tiff": ".tif", ".jpeg": ".jpg"}  # one ending for what may be written in two ways


@dataclass(frozen=True)
class File:
    """A file: its name without the ending, in NFC, and the ending that a link to it has."""

    path: Path
    stem: str
    ending: str


@dataclass
class Pair:
    """The files of a case.

    Args:
        case_id: what they are called alike.
        masks: of one image, to be put together where there are several.
        channels: images by number.
    """

    case_id: str
    masks: tuple[File, ...]
    channels: dict[int, File] = field(default_factory=dict)


@dataclass
class Pairing:
    """What has been paired and what has not, each in the order of names."""

    pairs: dict[str, Pair]
    lone_images: list[File]
    lone_masks: list[File]

    def remarks(self) -> list[str]:
        """Says in sentences what could not be paired, and what was put together."""
        several = [name for name, case in self.pairs.items() if case.masks[1:]]
        said = []
        if several:
            said.append(
                f"{len(several)} of {len(self.pairs)} cases have several masks, which are put "
                f"together; where they overlap, the higher label counts: {shown(several, 10)}."
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
                "Names count letter by letter, so rename one of each if these belong together: "
                f"{shown(meant, 10)}."
            )
        return said


def list_files(images: Sequence[Path], masks: Sequence[Path]) -> tuple[list[File], list[File]]:
    """Lists the images and the masks in the folders given.

    Of a folder that is given as both, files called like masks are masks, and the others images.

    Raises:
        DataError: a folder is none, or has no such file.
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
                    f"{folder}: holds images and masks, but no file is called like "
                    f"{'a mask, such as p1_mask.png' if are_masks else 'an image, such as p1.png'}"
                )
            files += found
        listed.append(files)
    return listed[0], listed[1]


def _files(flag: str, folder: Path) -> list[File]:
    """Lists a folder's files that may be images or masks, without hidden ones."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder ({flag})")
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
            f"{folder}: has no file that ends in {', '.join(ENDINGS)} ({flag}); it has "
            f"{shown(others, 5) or 'nothing'}"
        )
    return files


def pair(images: Sequence[File], masks: Sequence[File]) -> Pairing:
    """Pairs images and masks by their names.

    Raises:
        DataError: two files are called alike, none has a partner, a case lacks a channel that
            others have, or files end in different ways.
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
            f"no image and no mask are called alike: images are {_few(images)}, masks "
            f"{_few(masks)}; a mask has its image's name, with _mask, _seg, _segmentation or "
            "_label behind it or nothing"
        )
    pairs = dict(sorted(pairs.items()))
    _require_channels(pairs)
    _require_endings(pairs)
    return Pairing(pairs, lone, [mask for mask in masks if mask.path not in used])


def _names(stem: str) -> Iterator[tuple[str, int]]:
    """What an image's case may be called, and which channel it then is."""
    yield stem, 0
    yield _bare(stem, _IMAGE), 0
    if numbered := re.fullmatch(r"(.+)_(\d{4})", stem):
        yield numbered[1], int(numbered[2])


def _mask_name(stem: str) -> tuple[str, str]:
    """What a mask's image may be called, and the mask's number among several: p1 and 2 of
    p1_mask_2."""
    if several := re.fullmatch(r"(.+)[ _.-]masks?[ _-](\d{1,2})", stem, re.IGNORECASE):
        return several[1], several[2]
    return _bare(stem, _MASK), ""


def _bare(stem: str, word: str) -> str:
    """A name without such a word behind it or, where there is none, before it."""
    for pattern in (rf"(.+)[ _.-]{word}", rf"{word}[ _.-](.+)"):
        if found := re.fullmatch(pattern, stem, re.IGNORECASE):
            return found[1]
    return stem


def _take(taken: dict, key: str | int, file: File, faults: list[str]) -> None:
    """Puts a file in its place, or says that another one has it."""
    if taken.setdefault(key, file) is not file:
        faults.append(
            f"{taken[key].path} and {file.path} are called alike; keep one of them, or put both "
            "into one"
        )


def _few(files: Sequence[File]) -> str:
    return shown([file.path.name for file in files], 3)


def _require_channels(pairs: dict[str, Pair]) -> None:
    """Raises unless all cases have the same channels, from 0 on."""
    channels = {number for case in pairs.values() for number in case.channels}
    if channels != {*range(len(channels))}:
        raise DataError(
            f"channels are {', '.join(f'_{number:04}' for number in sorted(channels))}, expected "
            "all from _0000 on; rename the images"
        )
    if lacking := [name for name, case in pairs.items() if len(case.channels) < len(channels)]:
        raise DataError(
            f"{len(lacking)} of {len(pairs)} cases lack one of the {len(channels)} channels: "
            f"{shown(lacking, 10)}"
        )


def _require_endings(pairs: dict[str, Pair]) -> None:
    """Raises unless all images end alike, and masks are images or volumes as they are."""
    images = [file for case in pairs.values() for file in case.channels.values()]
    endings = sorted({file.ending for file in images})
    if len(endings) > 1:
        first = [next(file.path for file in images if file.ending == ending) for ending in endings]
        raise DataError(
            f"images end in {' and '.join(endings)}, such as {' and '.join(map(str, first))}; a "
            "folder of nnU-Net's has one ending: save them alike, or convert them one by one"
        )
    several = next((case for case in pairs.values() if case.masks[1:]), None)
    if several and endings[0] not in (*NIFTI, *IMAGES):
        raise DataError(
            f"{several.masks[1].path}: another mask of {several.case_id}, and {endings[0]} files "
            "are not looked into; put them together, or save all files as .nii.gz"
        )
    alike_enough = next((kind for kind in (NIFTI, IMAGES) if endings[0] in kind), endings)
    for mask in (mask for case in pairs.values() for mask in case.masks):
        if mask.ending not in alike_enough:
            raise DataError(
                f"{mask.path}: ends in {mask.ending}, but its image in {endings[0]}; save masks as "
                f"{' or '.join(alike_enough)}"
            )
