"""Reads nnU-Net's `dataset.json`: channels, labels, regions, and how files end.

Older ones (nnU-Net v1, the Medical Segmentation Decathlon) say `modality` and number labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, reading, shown
from .endings import ENDINGS, IMAGES, LOSSLESS, NIFTI

MOST_LABELS = 255  # that a mask's uint8 can hold beside `IGNORED`
IGNORE = "ignore"  # as nnU-Net calls the label of what is not outlined


@dataclass(frozen=True)
class Layout:
    """What `dataset.json` says.

    Args:
        path: of the file.
        channels: names in their order.
        classes: names by label.
        regions: what is scored: a name, and the labels that make it up.
        ignore: the label of what is ignored, if there is one: as high as there are classes.
        ending: of images or volumes, one of `ENDINGS`.
        n_training: how many training cases there are, where the file says so.
        description: what it says of the data, empty if nothing.
    """

    path: Path
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    regions: Mapping[str, tuple[int, ...]]
    ignore: int | None
    ending: str
    n_training: int | None
    description: str

    @property
    def axes(self) -> int:
        """2 of images, 3 of volumes."""
        return 2 if self.ending in IMAGES else 3

    @property
    def mask_endings(self) -> tuple[str, ...]:
        """How masks may end: of images in any way that keeps labels, JPEG's or not."""
        return LOSSLESS if self.axes == 2 else (self.ending,)


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
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of channel_names, labels and file_ending")
    if "dataset" in content:
        raise DataError(
            f"{path}: lists files by the key 'dataset', which is not read here; lay or link them "
            "into imagesTr and labelsTr, and leave the key out"
        )
    ending = content.get("file_ending", NIFTI[0])
    if ending not in ENDINGS:
        raise DataError(
            f"{path}: file_ending is {ending!r}, expected one of {', '.join(ENDINGS)}; convert the "
            "files if they end otherwise"
        )
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise DataError(
            f'{path}: channel_names must name the channels from "0" on, such as {{"0": "CT"}}; got '
            f"{names}"
        )
    if not names:
        raise DataError(f'{path}: channel_names names no channel; write {{"0": "CT"}} or its like')
    classes, regions, ignore = _labels(path, content.get("labels"))
    n_training = content.get("numTraining")
    return Layout(
        path,
        tuple(str(names[str(channel)]).strip() for channel in range(len(names))),
        classes,
        regions,
        ignore,
        ending,
        n_training if isinstance(n_training, int) else None,
        str(content.get("description", "")).strip(),
    )


def _labels(
    path: Path, labels: Any
) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]], int | None]:
    """Reads `labels`, by name or by number: the classes' names, the regions, and what is ignored.

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
    if other := sorted(name for name in labels if name != IGNORE and name.lower() == IGNORE):
        raise DataError(
            f"{path}: labels has {other[0]!r}, which nnU-Net takes for a class; write {IGNORE!r} "
            "for what is to be left out of loss and scores, or call the class otherwise"
        )
    ignore = labels.get(IGNORE)
    labels = {name: value for name, value in labels.items() if name != IGNORE}
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
    if ignore is not None and (isinstance(ignore, bool) or ignore != len(every)):
        raise DataError(
            f"{path}: the ignore label must be one whole number, the next after the other labels: "
            f"{len(every)}; got {ignore}; renumber it there and in the files"
        )
    single = {numbers[0]: name for name, numbers in values.items() if len(numbers) == 1}
    if 0 not in single or any(numbers[0] == 0 and numbers[1:] for numbers in values.values()):
        raise DataError(f'{path}: labels must name 0 alone, as {{"background": 0}}; got {values}')
    if len({*values.values()}) < len(values):
        raise DataError(f"{path}: labels has two names for one thing: {values}")
    classes = tuple(single.get(label, f"label {label}") for label in every)
    regions = {name: numbers for name, numbers in values.items() if numbers != (0,)}
    return classes, regions, ignore
