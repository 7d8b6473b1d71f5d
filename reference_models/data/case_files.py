"""Finds which files of nnU-Net's folders make up which case.

Read from nnU-Net's pages: `imagesTr/<case>_0000.nii.gz`, `_0001` and so on, one file a channel,
`labelsTr/<case>.nii.gz`, the same for test cases in `imagesTs` and `labelsTs`. Of images, red,
green and blue may stand in one file, `imagesTr/<case>_0000.png`. Older folders (nnU-Net v1, the
Medical Segmentation Decathlon) give images of one file without a `_0000`.
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

# Folders of images and of labels, whether each image needs a label, and nnU-Net's split.
FOLDERS = (("imagesTr", "labelsTr", True, None), ("imagesTs", "labelsTs", False, "test"))


@dataclass
class CaseFiles:
    """The files of one case.

    Args:
        folder: where its images are.
        split: the one that the folder stands for, None where that is open.
        channels: the image of each channel.
        label: the mask, where there is one.
    """

    folder: Path
    split: str | None
    channels: dict[int, Path] = field(default_factory=dict)
    label: Path | None = None


class _Causes:
    """Faults of files by their cause: a mistake that runs through a folder is told once."""

    def __init__(self) -> None:
        self._paths: dict[str, list[Path]] = {}

    def add(self, path: Path, cause: str) -> None:
        """Adds a file; `cause` says nothing of this one file."""
        self._paths.setdefault(cause, []).append(path)

    def errors(self) -> list[DataError]:
        """Gives one error for each cause, which names all of its files."""
        errors = []
        for cause, (first, *others) in self._paths.items():
            more = f" (so are {len(others)} more: {shown([path.name for path in others])})"
            errors.append(DataError(f"{first}: {cause}{more if others else ''}"))
        return errors


def list_cases(
    root: Path, layout: Layout, faults: list[DataError], notes: list[str]
) -> tuple[dict[str, CaseFiles], frozenset[str]]:
    """Lists each case's files by its id.

    Args:
        root: the folder that holds `imagesTr`, `labelsTr` and the like.
        layout: what its `dataset.json` says.
        faults, notes: what is wrong with files, and remarks, are added there.

    Returns:
        The files of all cases, and the ids of those whose files are not as they should be; those
        of labels without an image are among these alone.

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
        channels = channels[:1]  # all colours are in one file

    def refuse(case_id: str, path: Path, cause: str) -> None:
        broken.add(case_id)
        causes.add(path, cause)

    for images, labels, needs_label, split in FOLDERS:
        here: dict[str, CaseFiles] = {}
        broken |= {_channel(stem)[0] for stem in files[images].refused}
        for stem, path in files[images].found:
            case_id, channel = _channel(stem)
            if case_id in found:
                refuse(case_id, path, f"its case is in {found[case_id].folder} already")
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
            elif here and stem not in broken:  # without an image at all, that is the fault
                strays[stem] = path
        meant = _cases_meant(strays, [name for name, case in here.items() if case.label is None])
        for stem, path in strays.items():
            if stem in meant:
                refuse(
                    meant[stem],
                    path,
                    "no case is called so; a label has its case's name and nothing more: rename "
                    f"it to <case>{split_ending(path.name)[1]}",
                )
            else:
                refuse(
                    stem, path, f"no image for it in {root / images}, <case>_0000{layout.ending}"
                )
        for case_id, case in here.items():
            missing = sorted({*range(len(channels))} - {*case.channels})
            if missing and case_id not in broken:
                path = case.folder / f"{case_id}_{missing[0]:04}{layout.ending}"
                refuse(case_id, path, f"no such file (channel {channels[missing[0]]})")
            if needs_label and case.label is None and case_id not in broken:
                refuse(
                    case_id,
                    root / labels / f"{case_id}{layout.mask_endings[0]}",
                    "no such file; an image without a mask, which can be predicted alone, belongs "
                    "into imagesTs",
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
    """Says where images are looked for."""
    return (
        f"{root}: no {layout.ending} file in its folder imagesTr (nor in imagesTs); expected one a "
        f"channel, such as imagesTr/patient1_0000{layout.ending}"
    )


_MISNAMED = {
    ".nii": "is packed by gzip, and its name does not say so; if all files are, rename them to "
    ".nii.gz and write that as file_ending into dataset.json, else unpack it",
    ".nii.gz": "is not packed by gzip, and its name says so; if no file is, rename them to .nii "
    "and write that as file_ending into dataset.json, else pack it",
}


def _cases_meant(strays: Collection[str], cases: Collection[str]) -> dict[str, str]:
    """Finds for labels that no case is called by, such as c1_seg, the one whose name is in theirs.

    Only a case's whole name counts: p10 is nothing of p1.
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
    """Takes an image for a channel of its case; an image without a number is channel 0.

    Args:
        case: added to.
        channel: its number, if it has one.
        path: of the image.
        layout: of the folder.
        count: files of a case.

    Raises:
        ValueError: it has no number and needs one, or there is no such channel, or it is taken.
    """
    if channel is None and count > 1:
        parts = "split a 4D image up, and name the parts" if layout.axes == 3 else "name them"
        raise ValueError(
            f"expected a file for each of the {count} channels, <case>_0000{layout.ending} and "
            f"so on; {parts} so"
        )
    channel = channel or 0
    if channel >= count:
        named = len(layout.channels)
        in_one = f"; its {named} colours are in one file, <case>_0000{layout.ending}"
        raise ValueError(
            f"channel {channel:04}, but {layout.path} names {named} (0000 on)"
            f"{in_one * (named > count)}; where {channel:04} "
            f"is part of the case's name, add _0000 to it: <case>_{channel:04}_0000{layout.ending}"
        )
    if channel in case.channels:
        raise ValueError(f"the same channel as {case.channels[channel]}")
    case.channels[channel] = path


def _channel(stem: str) -> tuple[str, int | None]:
    """Takes an image's name without its ending apart, into the case's id and the channel."""
    parts = re.fullmatch(r"(.+)_(\d{4})", stem)
    return (parts[1], int(parts[2])) if parts else (stem, None)


class _Listed(NamedTuple):
    """A folder's files.

    Args:
        found: the name without its ending, and the path.
        refused: names without their endings of those that are no such files as they should be.
    """

    found: list[tuple[str, Path]]
    refused: set[str]


def _files(
    folder: Path, layout: Layout, causes: _Causes, notes: list[str], *, masks: bool
) -> _Listed:
    """Lists a folder's images or masks.

    Hidden files, such as macOS's, are passed over; what else does not fit is a fault or a note.
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
        stem = nfc(stem)  # macOS takes accents apart, so that a name may be written in two ways
        if ending is None or ending not in kin:
            others.append(name)
        elif ending not in expected:
            refused.add(stem)
            causes.add(path, _unexpected(ending, layout, masks))
        elif stem in files:
            causes.add(path, f"the same name as {files[stem]}")
        else:
            files[stem] = path
    if others:
        notes.append(
            f"warning: {folder}: not {' or '.join(expected)} and left out: {shown(others, 5)}"
        )
    return _Listed([*files.items()], refused)


def _unexpected(ending: str, layout: Layout, masks: bool) -> str:
    """Says why files of an ending are not taken."""
    if masks and layout.axes == 2:
        return (
            "a mask as JPEG, which changes labels; write it as .png or .tif from what it was drawn "
            f"in ({', '.join(LOSSLESS)} are read)"
        )
    return (
        f"ends in {ending}, but the file_ending of {layout.path} is {layout.ending}; convert it, "
        f"or take it away if it is there as {layout.ending} too"
    )
