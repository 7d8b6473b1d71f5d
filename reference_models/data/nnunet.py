"""Reads nnU-Net's folders: what `dataset.json` says, and which files make up which case.

Read from nnU-Net's pages: `imagesTr/<case>_0000.nii.gz`, `_0001` and so on, one file a channel,
`labelsTr/<case>.nii.gz`, the same for test cases in `imagesTs` and `labelsTs`, and beside them
`dataset.json` with `channel_names`, `labels` and `file_ending`. Older ones (nnU-Net v1, the Medical
Segmentation Decathlon) say `modality`, have labels by number, and give images of one channel
without a `_0000`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, reading, shown
from .table import nfc
from .volumes import misnamed

ENDINGS = (".nii.gz", ".nii")
MOST_LABELS = 256  # that a mask's uint8 can hold
# Folders of images and of labels, whether each image needs a label, and nnU-Net's split.
FOLDERS = (("imagesTr", "labelsTr", True, None), ("imagesTs", "labelsTs", False, "test"))


@dataclass(frozen=True)
class Layout:
    """What `dataset.json` says.

    Args:
        path: of the file.
        channels: names in their order.
        classes: names by label.
        regions: what is scored: a name, and the labels that make it up.
        ending: of the files, one of `ENDINGS`.
        n_training: how many training cases there are, where the file says so.
        description: what it says of the data, empty if nothing.
    """

    path: Path
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    ending: str
    n_training: int | None
    description: str


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


def read_layout(root: Path) -> Layout:
    """Reads `dataset.json`.

    Raises:
        DataError: there is none, or it says what cannot be used here.
    """
    path = root / "dataset.json"
    if not path.exists():
        if inside := sorted(found.parent.name for found in root.glob(f"*/{path.name}")):
            raise DataError(
                f"{path}: no such file, but its folders have one; give one of them as --root: "
                f"{shown([str(root / name) for name in inside], 5)}"
            )
        raise DataError(
            f'{path}: no such file; write one, such as {{"channel_names": {{"0": "CT"}}, '
            '"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}'
        )
    with reading(path, "not readable json", "often a comma too many or too few there"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of channel_names, labels and file_ending")
    if "dataset" in content:
        raise DataError(
            f"{path}: lists files by the key 'dataset', which is not read here; lay or link them "
            "into imagesTr and labelsTr, and leave the key out"
        )
    ending = content.get("file_ending", ENDINGS[0])
    if ending not in ENDINGS:
        raise DataError(
            f"{path}: file_ending is {ending!r}, expected {' or '.join(ENDINGS)}; convert the files"
        )
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise DataError(
            f'{path}: channel_names must name the channels from "0" on, such as {{"0": "CT"}}; got '
            f"{names}"
        )
    if not names:
        raise DataError(f'{path}: channel_names names no channel; write {{"0": "CT"}} or its like')
    classes, regions = _labels(path, content.get("labels"))
    n_training = content.get("numTraining")
    return Layout(
        path,
        tuple(str(names[str(channel)]).strip() for channel in range(len(names))),
        classes,
        regions,
        ending,
        n_training if isinstance(n_training, int) else None,
        str(content.get("description", "")).strip(),
    )


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
        The files of all cases, and the ids of those whose files are not as they should be.

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
                causes.add(path, f"no image for it in {root / images}, <case>_0000{layout.ending}")
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


def _labels(path: Path, labels: Any) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Reads `labels`, whether by name or by number: the classes' names, and the regions.

    Raises:
        DataError: they are not what can be trained on here.
    """
    if not isinstance(labels, dict) or not labels:
        raise DataError(
            f'{path}: labels must be an object such as {{"background": 0, "tumour": 1}}; got '
            f"{labels}"
        )
    if all(name.isdecimal() for name in labels):  # as in older files: {"0": "background"}
        names = [str(name) for name in labels.values()]
        if len(set(names)) < len(names):
            raise DataError(f"{path}: labels name one thing twice: {', '.join(names)}")
        labels = {str(name): int(number) for number, name in labels.items()}
    if "ignore" in {name.lower() for name in labels}:
        raise DataError(
            f"{path}: labels has an ignore label, and training that leaves voxels out is not "
            "offered here; outline those cases in full, or leave them out"
        )
    values: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        numbers = value if isinstance(value, list) else [value]
        try:
            if any(isinstance(number, float) for number in numbers) or not numbers:
                raise ValueError
            values[name.strip()] = tuple(sorted({int(number) for number in numbers}))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{path}: label {name!r} must be a whole number, or a list of such; got {value!r}"
            ) from error
    every = sorted({number for numbers in values.values() for number in numbers})
    if every != [*range(len(every))] or not 2 <= len(every) <= MOST_LABELS:
        raise DataError(
            f"{path}: labels must count up from 0, the background, without a gap, at least 0 and "
            f"1, at most {MOST_LABELS} of them; got {every}; renumber them there and in the files"
        )
    single = {numbers[0]: name for name, numbers in values.items() if len(numbers) == 1}
    if 0 not in single or any(numbers[0] == 0 and numbers[1:] for numbers in values.values()):
        raise DataError(f'{path}: labels must name 0 alone, as {{"background": 0}}; got {values}')
    if len({*values.values()}) < len(values):
        raise DataError(f"{path}: labels has two names for one thing: {values}")
    classes = tuple(single.get(label, f"label {label}") for label in every)
    return classes, {name: numbers for name, numbers in values.items() if numbers != (0,)}
