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
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, shown

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
    """

    path: Path
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    ending: str
    n_training: int | None


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
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(
            f'{path}: no such file; write one, such as {{"channel_names": {{"0": "CT"}}, '
            '"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}'
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not readable json ({error}); often a comma too many or too few there"
        ) from error
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
    )


def list_cases(
    root: Path, layout: Layout, faults: list[DataError], notes: list[str]
) -> dict[str, CaseFiles]:
    """Lists each case's files by its id; cases whose files are not as they should be are left out.

    Args:
        root: the folder that holds `imagesTr`, `labelsTr` and the like.
        layout: what its `dataset.json` says.
        faults, notes: what is wrong with files, and remarks, are added there.

    Raises:
        DataError: there is no image.
    """
    found: dict[str, CaseFiles] = {}
    broken: set[str] = set()

    def refuse(case_id: str, text: str) -> None:
        broken.add(case_id)
        faults.append(DataError(text))

    for images, labels, needs_label, split in FOLDERS:
        here: dict[str, CaseFiles] = {}
        for stem, path in _files(root / images, layout, faults, notes):
            case_id, channel = _channel(stem)
            if case_id in found:
                refuse(case_id, f"{path}: case {case_id} is in {found[case_id].folder} already")
                continue
            case = here.setdefault(case_id, CaseFiles(root / images, split))
            try:
                _add_image(case, case_id, channel, path, layout)
            except ValueError as error:
                refuse(case_id, f"{path}: {error}")
        for case_id, path in _files(root / labels, layout, faults, notes):
            if case_id in here:
                here[case_id].label = path
            elif case_id not in broken:
                faults.append(
                    DataError(
                        f"{path}: no image for it; expected "
                        f"{root / images / case_id}_0000{layout.ending}"
                    )
                )
        for case_id, case in here.items():
            missing = sorted({*range(len(layout.channels))} - {*case.channels})
            if missing and case_id not in broken:
                path = case.folder / f"{case_id}_{missing[0]:04}{layout.ending}"
                refuse(case_id, f"{path}: no such file (channel {layout.channels[missing[0]]})")
            if needs_label and case.label is None:
                refuse(
                    case_id,
                    f"{root / labels / case_id}{layout.ending}: no such file; an image without a "
                    "mask, which can be predicted alone, belongs into imagesTs",
                )
        found |= here
    if not found:
        raise DataError(
            f"{root}: no {layout.ending} file in its folder imagesTr (nor in imagesTs); expected "
            f"one a channel, such as imagesTr/patient1_0000{layout.ending}"
        )
    n_training = sum(case.split is None for case in found.values())
    if layout.n_training not in (None, n_training):
        notes.append(
            f"warning: {layout.path}: numTraining is {layout.n_training}, but imagesTr has "
            f"{n_training} cases"
        )
    return {case_id: found[case_id] for case_id in sorted(found) if case_id not in broken}


def _add_image(
    case: CaseFiles, case_id: str, channel: int | None, path: Path, layout: Layout
) -> None:
    """Takes an image for a channel of its case; an image without a number is channel 0.

    Raises:
        ValueError: it has no number and needs one, or there is no such channel, or it is taken.
    """
    count = len(layout.channels)
    if channel is None and count > 1:
        raise ValueError(
            f"expected a file for each of the {count} channels ({case_id}_0000{layout.ending} and "
            "so on); split a 4D image up, and name the parts so"
        )
    channel = channel or 0
    if channel >= count:
        raise ValueError(
            f"channel {channel:04}, but {layout.path} names {count} (0000 on); where {channel:04} "
            f"is part of the case's name, call it {case_id}_{channel:04}_0000{layout.ending}"
        )
    if channel in case.channels:
        raise ValueError(f"the same channel as {case.channels[channel]}")
    case.channels[channel] = path


def _channel(stem: str) -> tuple[str, int | None]:
    """Takes an image's name without its ending apart, into the case's id and the channel."""
    parts = re.fullmatch(r"(.+)_(\d{4})", stem)
    return (parts[1], int(parts[2])) if parts else (stem, None)


def _files(
    folder: Path, layout: Layout, faults: list[DataError], notes: list[str]
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
            faults.append(
                DataError(
                    f"{path}: ends in {ending}, but the file_ending of {layout.path} is "
                    f"{layout.ending}; convert it, or take it away if it is there as "
                    f"{layout.ending} too"
                )
            )
        # macOS takes accents apart, so that one name may be written in two ways.
        elif (stem := unicodedata.normalize("NFC", name[: -len(ending)])) in files:
            faults.append(DataError(f"{path}: the same name as {files[stem]}"))
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
