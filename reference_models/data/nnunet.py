"""Reads nnU-Net's `dataset.json`: channels, labels, regions, and the ending of the files.

Older files (nnU-Net v1, the Medical Segmentation Decathlon) have `modality` and list labels by
number; they are read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, reading, shown
from .endings import ENDINGS, IMAGES, LOSSLESS, NIFTI

MOST_LABELS = 255  # a mask's uint8 holds as many besides `IGNORED`
IGNORE = "ignore"  # nnU-Net's name for the label of pixels that are not annotated


@dataclass(frozen=True)
class Layout:
    """What `dataset.json` says.

    Args:
        path: the file.
        channels: the names of the channels, in their order.
        classes: the names of the labels, in their order.
        regions: what is scored: the name of each region, and the labels that it consists of.
        ignore: the label of ignored pixels, which is the number of classes; None if there is none.
        ending: the ending of images or volumes, one of `ENDINGS`.
        n_training: the number of training cases; None if the file does not say it.
        description: what the file says about the data; may be empty.
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
        """The number of spatial axes: 2 for images, 3 for volumes."""
        return 2 if self.ending in IMAGES else 3

    @property
    def mask_endings(self) -> tuple[str, ...]:
        """The endings that masks may have; masks of JPEG images have a lossless format."""
        return LOSSLESS if self.axes == 2 else (self.ending,)


def read_layout(root: Path) -> Layout:
    """Reads `dataset.json`.

    Raises:
        DataError: there is no such file, or it describes data that cannot be read here.
    """
    path = root / "dataset.json"
    if not path.exists():
        if inside := sorted(found.parent.name for found in root.glob(f"*/{path.name}")):
            raise DataError(
                f"{path}: there is no such file, but these folders have one; name one as --root: "
                f"{shown([str(root / name) for name in inside], 5)}"
            )
        raise DataError(
            f'{path}: there is no such file; write one, such as {{"channel_names": {{"0": "CT"}}, '
            '"labels": {"background": 0, "tumour": 1}, "file_ending": ".nii.gz"}'
        )
    with reading(path, "not readable json", "look for a comma too many or too few there"):
        content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of channel_names, labels and file_ending")
    if "dataset" in content:
        raise DataError(
            f"{path}: the key 'dataset' lists files, which is not supported; put or link the files "
            "into imagesTr and labelsTr, and remove the key"
        )
    ending = content.get("file_ending", NIFTI[0])
    if ending not in ENDINGS:
        raise DataError(
            f"{path}: file_ending is {ending!r}, expected one of {', '.join(ENDINGS)}; convert "
            "files of other formats"
        )
    names = content.get("channel_names", content.get("modality"))
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise DataError(
            f'{path}: expected channel_names that name the channels from "0" on, such as '
            f'{{"0": "CT"}}; got {names}'
        )
    if not names:
        raise DataError(f'{path}: channel_names is empty; name the channels, such as {{"0": "CT"}}')
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
    """Reads `labels`, by name or by number: the classes' names, the regions, and the ignore label.

    Raises:
        DataError: the labels cannot be trained on here.
    """
    if not isinstance(labels, dict) or not labels:
        raise DataError(
            f'{path}: expected labels such as {{"background": 0, "tumour": 1}}; got {labels}'
        )
    if all(name.isdecimal() for name in labels):  # as in older files: {"0": "background"}
        names = [str(name) for name in labels.values()]
        if len(set(names)) < len(names):
            raise DataError(
                f"{path}: two labels have the same name: {', '.join(names)}; rename one of them"
            )
        labels = {str(name): int(number) for number, name in labels.items()}
    if other := sorted(name for name in labels if name != IGNORE and name.lower() == IGNORE):
        raise DataError(
            f"{path}: labels has {other[0]!r}, which nnU-Net treats as a class; write {IGNORE!r} "
            "for pixels that loss and scores must ignore, or give the class another name"
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
                f"{path}: the label {name!r} is {value!r}, expected a whole number or a list of "
                "whole numbers"
            ) from error
    every = sorted({number for numbers in values.values() for number in numbers})
    if every != [*range(len(every))] or not 2 <= len(every) <= MOST_LABELS:
        raise DataError(
            f"{path}: expected labels that count up from 0, the background, without a gap: at "
            f"least 0 and 1, at most {MOST_LABELS} of them; got {every}; renumber them there and "
            "in the masks"
        )
    if ignore is not None and (isinstance(ignore, bool) or ignore != len(every)):
        raise DataError(
            f"{path}: the ignore label is {ignore}, expected the next number after the other "
            f"labels, {len(every)}; renumber it there and in the masks"
        )
    single = {numbers[0]: name for name, numbers in values.items() if len(numbers) == 1}
    if 0 not in single or any(numbers[0] == 0 and numbers[1:] for numbers in values.values()):
        raise DataError(
            f'{path}: expected a name for 0 alone, such as {{"background": 0}}; got {values}'
        )
    if len({*values.values()}) < len(values):
        raise DataError(f"{path}: two names have the same labels: {values}; remove one of them")
    classes = tuple(single.get(label, f"label {label}") for label in every)
    regions = {name: numbers for name, numbers in values.items() if numbers != (0,)}
    return classes, regions, ignore
