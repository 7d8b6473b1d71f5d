"""Finds which files of nnU-Net's folders make up which case.

Read from nnU-Net's pages: `imagesTr/<case>_0000.nii.gz`, `_0001` and so on, one file a channel,
`labelsTr/<case>.nii.gz`, the same for test cases in `imagesTs` and `labelsTs`. Older ones (nnU-Net
v1, the Medical Segmentation Decathlon) give images of one channel without a `_0000`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, shown
from .nnunet import ENDINGS, Layout
from .table import nfc
from .volumes import misnamed

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

    def refuse(case_id: str, path: Path, cause: str) -> None:
        broken.add(case_id)
        causes.add(path, cause)

    for images, labels, needs_label, split in FOLDERS:
        here: dict[str, CaseFiles] = {}
        for stem, path in _files(root / images, layout, causes, notes):
            case_id, channel = _channel(stem)
            if case_id in found:
                refuse(case_id, path, f"its case is in {found[case_id].folder} already")
                continue
            case = here.setdefault(case_id, CaseFiles(root / images, split))
            try:
                _add_image(case, channel, path, layout)
            except ValueError as error:
                refuse(case_id, path, str(error))
        strays: dict[str, Path] = {}
        for stem, path in _files(root / labels, layout, causes, notes):
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
                    f"it to <case>{layout.ending}",
                )
            else:
                refuse(
                    stem, path, f"no image for it in {root / images}, <case>_0000{layout.ending}"
                )
        for case_id, case in here.items():
            missing = sorted({*range(len(layout.channels))} - {*case.channels})
            if missing and case_id not in broken:
                path = case.folder / f"{case_id}_{missing[0]:04}{layout.ending}"
                refuse(case_id, path, f"no such file (channel {layout.channels[missing[0]]})")
            if needs_label and case.label is None and case_id not in broken:
                refuse(
                    case_id,
                    root / labels / f"{case_id}{layout.ending}",
                    "no such file; an image without a mask, which can be predicted alone, belongs "
                    "into imagesTs",
                )
            for path in (*case.channels.values(), *([case.label] if case.label else [])):
                if misnamed(str(path)):
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


def _add_image(case: CaseFiles, channel: int | None, path: Path, layout: Layout) -> None:
    """Takes an image for a channel of its case; an image without a number is channel 0.

    Raises:
        ValueError: it has no number and needs one, or there is no such channel, or it is taken.
    """
    count = len(layout.channels)
    if channel is None and count > 1:
        raise ValueError(
            f"expected a file for each of the {count} channels, <case>_0000{layout.ending} and "
            "so on; split a 4D image up, and name the parts so"
        )
    channel = channel or 0
    if channel >= count:
        raise ValueError(
            f"channel {channel:04}, but {layout.path} names {count} (0000 on); where {channel:04} "
            f"is part of the case's name, add _0000 to it: <case>_{channel:04}_0000{layout.ending}"
        )
    if channel in case.channels:
        raise ValueError(f"the same channel as {case.channels[channel]}")
    case.channels[channel] = path


def _channel(stem: str) -> tuple[str, int | None]:
    """Takes an image's name without its ending apart, into the case's id and the channel."""
    parts = re.fullmatch(r"(.+)_(\d{4})", stem)
    return (parts[1], int(parts[2])) if parts else (stem, None)


def _files(
    folder: Path, layout: Layout, causes: _Causes, notes: list[str]
) -> list[tuple[str, Path]]:
    """Lists a folder's NIfTI files: the name without its ending, and the path.

    Hidden files, such as macOS's, are passed over; what else does not fit is a fault or a note.
    """
    if not folder.is_dir():
        return []
    files: dict[str, Path] = {}
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith("."):
            continue
        ending = next((e for e in ENDINGS if name.lower().endswith(e)), None)
        if ending is None:
            others.append(name)
        elif ending != layout.ending:
            causes.add(
                path,
                f"ends in {ending}, but the file_ending of {layout.path} is {layout.ending}; "
                f"convert it, or take it away if it is there as {layout.ending} too",
            )
        # macOS takes accents apart, so that one name may be written in two ways.
        elif (stem := nfc(name[: -len(ending)])) in files:
            causes.add(path, f"the same name as {files[stem]}")
        else:
            files[stem] = path
    if others:
        notes.append(f"warning: {folder}: not {layout.ending} and left out: {shown(others, 5)}")
    return [*files.items()]
