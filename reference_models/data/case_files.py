"""Finds the files of each case in a folder of nnU-Net's layout.

The layout, as nnU-Net's documentation describes it: each channel has a file
`imagesTr/<case>_0000.nii.gz`, `_0001` and so on, and the mask is `labelsTr/<case>.nii.gz`. Test
cases lie in `imagesTs` and `labelsTs`. An image may hold red, green and blue in one file,
`imagesTr/<case>_0000.png`. In older folders (nnU-Net v1, the Medical Segmentation Decathlon) images
of one channel have no `_0000`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, shown
from .endings import IMAGES, LOSSLESS, NIFTI, VOLUMES, split_ending
from .nifti_files import misnamed
from .nnunet import Layout
from .table import nfc

# Folder of the images, folder of their masks, whether each image needs a mask, and the split.
FOLDERS = (("imagesTr", "labelsTr", True, None), ("imagesTs", "labelsTs", False, "test"))


@dataclass
class CaseFiles:
    """The files of one case.

    Args:
        folder: the folder of its images.
        split: the split that the folder stands for; None if the folder leaves it open.
        channels: the image of each channel.
        label: the mask; None if there is none.
    """

    folder: Path
    split: str | None
    channels: dict[int, Path] = field(default_factory=dict)
    label: Path | None = None


class _Causes:
    """Collects faults of files by their cause, so that a mistake in many files gives one error."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def add(self, path: Path, cause: str) -> None:
        """Adds a file; `cause` must not mention it, so that files can share a cause."""
        self._paths.setdefault(cause, []).append(path)

    def errors(self) -> list[DataError]:
        """Gives one error for each cause, which names all files that have it."""
        errors = []
        for cause, (first, *others) in self._paths.items():
            more = f" (the same holds for {len(others)} more: {shown([p.name for p in others])})"
            errors.append(DataError(f"{first}: {cause}{more if others else ''}"))
        return errors


def list_cases(
    root: Path, layout: Layout, faults: list[DataError], notes: list[str]
) -> tuple[dict[str, CaseFiles], frozenset[str]]:
    """Lists the files of each case, by case id.

    Args:
        root: the folder that holds `imagesTr`, `labelsTr` and so on.
        layout: what its `dataset.json` says.
        faults, notes: lists to which faults of files, and remarks, are added.

    Returns:
        The files of all cases, and the ids of broken cases, whose files have faults. A mask without
        an image makes a broken case that has no files.

    Raises:
        DataError: there is no image.
    """
    found: dict[str, CaseFiles] = {}
    broken: set[str] = set()
    causes = _Causes()
    files = {
        folder: _files(root / folder, layout, causes, notes, masks=masks)
        for images, labels, _, _ in FOLDERS
        for folder, masks in ((images, False), (labels, True))
    }
    channels = layout.channels
    numbers = {_channel(stem)[1] for images, *_ in FOLDERS for stem, _ in files[images].found}
    if layout.axes == 2 and len(channels) == 3 and not numbers & {1, 2}:
        channels = channels[:1]  # one file holds all three colours

    def refuse(case_id: str, path: Path, cause: str) -> None:
        broken.add(case_id)
        causes.add(path, cause)

    for images, labels, needs_label, split in FOLDERS:
        here: dict[str, CaseFiles] = {}
        broken |= {_channel(stem)[0] for stem in files[images].refused}
        for stem, path in files[images].found:
            case_id, channel = _channel(stem)
            if case_id in found:
                refuse(case_id, path, f"its case has images in {found[case_id].folder} already")
                continue
            case = here.setdefault(case_id, CaseFiles(root / images, split))
            try:
                _add_image(case, channel, path, layout, len(channels))
            except ValueError as error:
                refuse(case_id, path, str(error))
        strays: dict[str, Path] = {}
        broken |= here.keys() & files[labels].refused
        for stem, path in files[labels].found:
            if stem in here:
                here[stem].label = path
            elif here and stem not in broken:  # if there is no image at all, only that is reported
                strays[stem] = path
        meant = _cases_meant(strays, [name for name, case in here.items() if case.label is None])
        for stem, path in strays.items():
            if stem in meant:
                refuse(
                    meant[stem],
                    path,
                    "no case has this name; a mask must have the name of its case and nothing "
                    f"more, so rename it to <case>{split_ending(path.name)[1]}",
                )
            else:
                refuse(
                    stem,
                    path,
                    f"this mask has no image <case>_0000{layout.ending} in {root / images}",
                )
        for case_id, case in here.items():
            missing = sorted({*range(len(channels))} - {*case.channels})
            if missing and case_id not in broken:
                path = case.folder / f"{case_id}_{missing[0]:04}{layout.ending}"
                refuse(case_id, path, f"there is no such file (channel {channels[missing[0]]})")
            if needs_label and case.label is None and case_id not in broken:
                refuse(
                    case_id,
                    root / labels / f"{case_id}{layout.mask_endings[0]}",
                    "there is no such mask; move images without a mask, which can only be "
                    "predicted, to imagesTs",
                )
            for path in (*case.channels.values(), *([case.label] if case.label else [])):
                if layout.ending in NIFTI and misnamed(str(path)):
                    refuse(case_id, path, _MISNAMED[layout.ending])
        found |= here
    wrong = causes.errors()
    if not found:
        raise wrong[0] if wrong else DataError(_no_image(root, layout))
    faults += wrong
    n_training = sum(case.split is None for case in found.values())
    if layout.n_training not in (None, n_training):
        notes.append(
            f"warning: {layout.path}: numTraining is {layout.n_training}, but imagesTr has "
            f"{n_training} cases"
        )
    return dict(sorted(found.items())), frozenset(broken)


def _no_image(root: Path, layout: Layout) -> str:
    """Says that there is no image, and where images should lie."""
    return (
        f"{root}: there is no {layout.ending} file in its folder imagesTr, nor in imagesTs; "
        f"expected a file for each channel, such as imagesTr/patient1_0000{layout.ending}"
    )


_MISNAMED = {
    ".nii": "this file is packed by gzip, but its name ends in .nii; if all files are packed, "
    "rename them to .nii.gz and write that as file_ending into dataset.json, else unpack this one",
    ".nii.gz": "this file is not packed by gzip, but its name ends in .gz; if no file is packed, "
    "rename them to .nii and write that as file_ending into dataset.json, else pack this one",
}


def _cases_meant(strays: Collection[str], cases: Collection[str]) -> dict[str, str]:
    """Finds the case that is meant by a mask of a wrong name, such as c1_seg for the case c1.

    Only a case's whole name counts: p10 does not mean p1.

    Args:
        strays: names of masks, without their endings, that no case has.
        cases: the ids of cases without a mask.
    """
    meant: dict[str, str] = {}
    for stem in strays:
        within = [
            case_id
            for case_id in cases
            if re.search(rf"(?<![^\W_]){re.escape(case_id)}(?![^\W_])", stem)
        ]
        if within:
            meant[stem] = max(within, key=len)
    return meant


def _add_image(
    case: CaseFiles, channel: int | None, path: Path, layout: Layout, count: int
) -> None:
    """Adds an image to its case as a channel; an image without a number is channel 0.

    Args:
        case: the case, which is changed.
        channel: the number in the image's name, None if there is none.
        path: the image.
        layout: the folder's layout.
        count: number of image files that a case has.

    Raises:
        ValueError: the image needs a number and has none, there is no such channel, or the case has
            an image for this channel already.
    """
    if channel is None and count > 1:
        parts = "split a 4D image into parts, and rename" if layout.axes == 3 else "rename"
        raise ValueError(
            f"expected a file for each of the {count} channels, <case>_0000{layout.ending} and "
            f"so on; {parts} them like that"
        )
    channel = channel or 0
    if channel >= count:
        named = len(layout.channels)
        in_one = f", and one file, <case>_0000{layout.ending}, holds its {named} colours"
        raise ValueError(
            f"its name says channel {channel:04}, but {layout.path} names {named} channels from "
            f"0000 on{in_one * (named > count)}; if {channel:04} is part of the case's name, add "
            f"_0000: <case>_{channel:04}_0000{layout.ending}"
        )
    if channel in case.channels:
        raise ValueError(
            f"it is the same channel as {case.channels[channel]}; remove or rename one of them"
        )
    case.channels[channel] = path


def _channel(stem: str) -> tuple[str, int | None]:
    """Splits an image's name, without its ending, into the case's id and the channel's number."""
    parts = re.fullmatch(r"(.+)_(\d{4})", stem)
    return (parts[1], int(parts[2])) if parts else (stem, None)


class _Listed(NamedTuple):
    """The files of a folder.

    Args:
        found: the name without its ending, and the path, of each image or mask.
        refused: the names, without endings, of files whose ending is wrong.
    """

    found: list[tuple[str, Path]]
    refused: set[str]


def _files(
    folder: Path, layout: Layout, causes: _Causes, notes: list[str], *, masks: bool
) -> _Listed:
    """Lists a folder's images or masks.

    Hidden files, such as those of macOS, are ignored. Other files become faults or notes.
    """
    files: dict[str, Path] = {}
    refused: set[str] = set()
    others: list[str] = []
    expected = layout.mask_endings if masks else (layout.ending,)
    kin = IMAGES if layout.axes == 2 else VOLUMES
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = path.name
        if name.startswith("."):
            continue
        stem, ending = split_ending(name)
        stem = nfc(stem)  # macOS writes accents as letters of their own
        if ending is None or ending not in kin:
            others.append(name)
        elif ending not in expected:
            refused.add(stem)
            causes.add(path, _unexpected(ending, layout, masks))
        elif stem in files:
            causes.add(path, f"it has the same name as {files[stem]}; remove one of them")
        else:
            files[stem] = path
    if others:
        notes.append(
            f"warning: {folder}: files that do not end in {' or '.join(expected)} are left out: "
            f"{shown(others, 5)}"
        )
    return _Listed([*files.items()], refused)


def _unexpected(ending: str, layout: Layout, masks: bool) -> str:
    """Says why files of an ending are refused."""
    if masks and layout.axes == 2:
        return (
            "this mask is a JPEG, which changes labels; export it again as .png or .tif from the "
            f"program in which it was drawn ({', '.join(LOSSLESS)} can be read)"
        )
    return (
        f"this file ends in {ending}, but the file_ending of {layout.path} is {layout.ending}; "
        f"convert it, or remove it if it is there as {layout.ending} too"
    )
