"""The data set of a folder in nnU-Net's layout: images or volumes, and `attributes.csv`.

The `file_ending` in `dataset.json` decides whether the files are images or volumes. Headers are
read when the data set is opened, pixels when a case is loaded.

Shapes: C channels, S spatial axes (rows, columns; in 3D axes as stored).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError, report_faults, shown
from .attributes_csv import CaseRecord, read_attributes
from .case_files import CaseFiles, list_cases
from .cases import IGNORED, Attribute, Case, Dataset, Sample
from .extent import median_grid, note_images, note_volumes
from .intensities import CT_WINDOW, describe_scale, scale
from .nnunet import IGNORE, read_layout
from .readers import Grid, reader_of
from .splits import FOLDS
from .table import UNKNOWN_TEXTS

INTEGRAL = 1e-3  # how far a label may be from a whole number, since slopes are float32
WHITE = 255  # in a mask that shows labels as black and white


class WhiteMaskError(DataError):
    """A mask holds 0 and 255 where labels are expected; `check` reports such masks together.

    Args:
        path: the mask.
        strange: which labels were expected, and what came.
        others: further masks of which this is true.
    """

    def __init__(self, path: str, strange: str, others: Sequence[str] = ()) -> None:
        self.path, self.strange = path, strange
        more = f" (the same holds for {len(others)} more: {shown(others, 3)})" if others else ""
        super().__init__(
            f"{path}: expected the labels {strange}; a mask must hold labels and not grey levels, "
            f"so write 1 for white, or use the command convert, which does that{more}"
        )


class Folder(Dataset):
    """The images or volumes under `root`.

    The name of a channel in `dataset.json` decides how its intensities are scaled; see
    `intensities`. A mask may be only background, since a tumour may be absent. Cases in `imagesTs`
    are test cases; those without a mask are in no split.

    Args:
        root: the folder.
        attributes: columns of `attributes.csv`. Empty: the first. None: all that have few values.
        damaged: as in `open_dataset`.
        ct_window: the lowest and highest Hounsfield unit of CT channels.
        known: as in `open_dataset`.
        unknown_texts: as in `DataSettings`.

    Raises:
        DataError: a file is missing or cannot be read; an image is not opaque with 8 bits for each
            channel; a volume is not 3D, of real numbers, and on a grid with right angles in mm; the
            channels or the mask of a case differ in size or grid; or `dataset.json` or
            `attributes.csv` contradicts the files.
    """

    name = "folder"
    former_name = "nifti"

    def __init__(
        self,
        root: Path,
        attributes: tuple[str, ...] | None,
        damaged: list[DataError] | None,
        *,
        ct_window: tuple[float, float] = CT_WINDOW,
        known: Sequence[Attribute] = (),
        unknown_texts: Collection[str] = UNKNOWN_TEXTS,
    ) -> None:
        low, high = ct_window
        if not -np.inf < low < high < np.inf:
            raise DataError(f"ct_window: got {low} {high}, expected a lower and a higher number")
        faults: list[DataError] = []
        notes: list[str] = []
        self.notes = notes
        layout = read_layout(root)
        self._window = ct_window
        self._reader = reader = reader_of(layout.ending, len(layout.channels))
        self.axes, self.unit = reader.axes, reader.unit
        self.channels, self.channel_names = len(layout.channels), layout.channels
        self.classes, self.regions = layout.classes, layout.regions
        self.ignores = layout.ignore is not None
        self.about = layout.description
        self.made_with = (*layout.channels, *ct_window, f"ignore {layout.ignore}")
        if self.ignores:
            notes.append(
                f"label {layout.ignore} ({IGNORE}): its pixels count in no loss and no score"
            )
        notes += [
            f"channel {number:04} ({name}): {describe_scale(name, ct_window)}"
            for number, name in enumerate(layout.channels)
        ]
        if (folds := root / FOLDS).is_file():
            self.folds = folds
        files, broken = list_cases(root, layout, faults, notes)
        path = root / "attributes.csv"
        records: dict[str, CaseRecord] = {}
        self.attributes = ()
        try:
            self.attributes, records = read_attributes(
                path,
                [*files],
                attributes,
                known,
                faults,
                notes,
                optional=[
                    case_id
                    for case_id, case in files.items()
                    if case.label is None and case_id not in broken
                ],
                left_out=broken - files.keys(),
                unknown_texts=unknown_texts,
            )
        except DataError as error:
            faults.insert(0, error)
        if not records:  # the images can be read nevertheless
            records = {case_id: CaseRecord(0, case_id, None, ()) for case_id in files}
        cases: list[Case] = []
        grids: list[Grid] = []
        for case_id in sorted(records.keys() - broken):
            try:
                case = _case(case_id, files[case_id], records[case_id], path)
                grid = reader.inspect(*_images_and_mask(case))
            except DataError as error:
                faults.append(error)
                continue
            cases.append(case)
            grids.append(grid)
        report_faults(faults, damaged)
        self.cases = tuple(cases)
        self.left_out = (files.keys() | broken) - {case.case_id for case in cases}
        if cases:
            median = median_grid(cases, grids)
            if self.axes == 2:
                notes.append(note_images(median))
            else:
                notes += note_volumes(cases, grids, median)
                (x, y, z), (across, along, up) = median.sizes.tolist(), median.counts.tolist()
                self.spacing, self.size = (x, y, z), (across, along, up)

    def load(self, case: Case) -> Sample:
        content = self._reader.read(*_images_and_mask(case))
        remarks = [*content.remarks]
        for name, path, values_S in zip(
            self.channel_names, content.paths, content.channels, strict=True
        ):
            if name.lower() == "ct" and values_S.min() >= 0:
                remarks.append(
                    "no voxel of the CT is below 0 HU, as if it were shifted or scaled already"
                )
            scale(name, path, values_S, self._window)
        mask_S = content.mask_S
        return Sample(
            case.case_id,
            np.stack(content.channels),
            None if mask_S is None else self._labels(case.files[-1], mask_S),
            case.attributes,
            content.spacing,
            content.header,
            tuple(dict.fromkeys(remarks)),
        )

    def _labels(self, path: str, stored_S: np.ndarray) -> np.ndarray:
        """Turns a mask's float32 numbers into uint8 labels; `stored_S` is changed.

        Raises:
            DataError: a number is not whole or not a label of `dataset.json`, or all are ignored.
            WhiteMaskError: the mask holds 255 for white, which is no label.
        """
        labels_S = np.rint(stored_S)
        stored_S -= labels_S
        last = len(self.classes) - 1
        names = ", ".join((*self.classes, *[IGNORE] * self.ignores))
        expected = f"0 to {last + self.ignores} ({names})"
        if (between_S := np.abs(stored_S) > INTEGRAL).any():
            raise DataError(
                f"{path}: expected whole numbers as labels, {expected}; got "
                f"{_few((labels_S + stored_S)[between_S])}; resample masks by the nearest "
                "neighbour, without interpolation"
            )
        if (strange_S := (labels_S < 0) | (labels_S > last + self.ignores)).any():
            strange = f"{expected}, as dataset.json says; got also {_few(labels_S[strange_S])}"
            if (labels_S[strange_S] == WHITE).all():
                raise WhiteMaskError(path, strange)
            raise DataError(
                f"{path}: expected the labels {strange}; correct the mask or dataset.json"
            )
        if self.ignores:
            labels_S[labels_S > last] = IGNORED
            if (labels_S == IGNORED).all():
                raise DataError(
                    f"{path}: all of this mask has the label {IGNORE}, so that there is nothing to "
                    "learn or to score; leave the case out, or move its image to imagesTs"
                )
        return labels_S.astype(np.uint8)


def _images_and_mask(case: Case) -> tuple[tuple[str, ...], str | None]:
    """Gives the files of a case's channels, and the file of its mask if it has one."""
    return (case.files[:-1], case.files[-1]) if case.labelled else (case.files, None)


def _few(numbers: np.ndarray) -> str:
    """Writes out some of the distinct numbers."""
    return shown([f"{number:g}" for number in np.unique(numbers)], 8)


def _case(case_id: str, files: CaseFiles, record: CaseRecord, path: Path) -> Case:
    """Makes a case from its files and its row in the csv at `path`.

    Raises:
        DataError: folder and csv give different splits to the case.
    """
    if files.split and record.split not in (None, files.split):
        raise DataError(
            f"{path}:{record.line}: {case_id}: its split is {record.split}, but its image is in "
            f"{files.folder}; move the image to imagesTr, or leave the cell of split empty"
        )
    labelled = files.label is not None
    if record.split and not labelled:
        raise DataError(
            f"{path}:{record.line}: {case_id}: its split is {record.split}, but it has no mask; "
            "add one to labelsTs, or leave the cell of split empty"
        )
    paths = [files.channels[channel] for channel in sorted(files.channels)]
    return Case(
        case_id,
        record.subject,
        record.attributes,
        (record.split or files.split) if labelled else None,
        tuple(str(path) for path in (*paths, *([files.label] if files.label else []))),
        record.stratum,
        labelled,
    )
