"""The data set of volumes in nnU-Net's folders: NIfTI images and labels, and `attributes.csv`.

Headers are read when the data set is opened, voxels when a case is loaded.
Shapes: C channels, S the three axes as stored.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes

from ..errors import DataError, report_faults, shown
from .attributes_csv import CaseRecord, read_attributes
from .case_files import CaseFiles, list_cases
from .cases import IGNORED, Attribute, Case, Dataset, Sample
from .nnunet import IGNORE, read_layout
from .splits import FOLDS
from .table import UNKNOWN_TEXTS
from .volumes import canonical_grid, oddities, open_volume, read_voxels, require_one_grid

CT_WINDOW = (-175.0, 250.0)  # Hounsfield units: soft tissue
UNLIKE = 500  # of two voxels' volumes; cm taken for mm are a factor of 1000
# mm, of the median volume's longest side and of its voxel (the cube root of its volume): a head of
# 1 mm that is written in cm has 20 and 0.1. Crops of clinical scans are small, but not both. A
# whole body in cm is longer than SHORT, but of voxels finer than any clinical scan's.
SHORT, FINE, FINEST = 80.0, 0.5, 0.15
LONG = 3000.0  # mm, of the same side: longer than anybody is
INTEGRAL = 1e-3  # what a label may lack to a whole number, since slopes are float32


class Folder(Dataset):
    """The volumes under `root`.

    Intensities by the name of their channel in `dataset.json`: "CT" is clipped to `ct_window` and
    scaled to 0..1, "noNorm" stays as it is, "rescale_to_0_1" is scaled by its own range,
    "rgb_to_0_1" divided by 255, and all others, such as MR, are brought to mean 0 and variance 1 of
    their voxels other than 0. Masks may be empty: a tumour may be absent. Cases of `imagesTs` are
    test cases, those of them without a label are in no split.

    Args:
        root: the folder.
        attributes: columns of `attributes.csv`. Empty: the first. None: all that are groups.
        damaged: as in `open_dataset`.
        ct_window: in Hounsfield units.
        known: as in `open_dataset`.
        unknown_texts: as in `DataSettings`.

    Raises:
        DataError: a file is missing, cannot be read, or is no 3D image of real numbers on a grid of
            right angles in mm; a label's or channel's grid is not the image's; or what
            `dataset.json` or `attributes.csv` says does not fit the files.
    """

    name = "folder"
    former_name = "nifti"
    axes = 3
    unit = "mm"

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
        self.channels, self.channel_names = len(layout.channels), layout.channels
        self.classes, self.regions = layout.classes, layout.regions
        self.ignores = layout.ignore is not None
        self.about = layout.description
        self.made_with = (*layout.channels, *ct_window, f"ignore {layout.ignore}")
        if self.ignores:
            notes.append(
                f"label {layout.ignore} ({IGNORE}): what has it counts in no loss and no score"
            )
        notes += [
            f"channel {number:04} ({name}): {_scaling(name, ct_window)}"
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
        if not records:  # the volumes can be looked at all the same
            records = {case_id: CaseRecord(0, case_id, None, ()) for case_id in files}
        cases: list[Case] = []
        grids: list[tuple[np.ndarray, np.ndarray]] = []
        for case_id in sorted(records.keys() - broken):
            try:
                case = _case(case_id, files[case_id], records[case_id], path)
                images = [open_volume(path) for path in case.files]
                require_one_grid(case.files, images)
            except DataError as error:
                faults.append(error)
                continue
            cases.append(case)
            grids.append(canonical_grid(images[0]))
        report_faults(faults, damaged)
        self.cases = tuple(cases)
        self.left_out = (files.keys() | broken) - {case.case_id for case in cases}
        if cases:
            self.spacing, self.size = _median_grid(cases, grids, notes)

    def load(self, case: Case) -> Sample:
        images = [open_volume(path) for path in case.files]
        require_one_grid(case.files, images)
        remarks = [
            oddity
            for path, image in zip(case.files, images, strict=True)
            for oddity in oddities(path, image)
        ]
        channels = []
        for name, path, image in zip(self.channel_names, case.files, images, strict=False):
            voxels_S = read_voxels(path, image)
            if name.lower() == "ct" and voxels_S.min() >= 0:
                remarks.append("CT without a voxel below 0 HU, as if offset or scaled already")
            channels.append(self._scaled(name, path, voxels_S))
        mask_S = None
        if case.labelled:
            mask_S = self._labels(case.files[-1], read_voxels(case.files[-1], images[-1]))
        return Sample(
            case.case_id,
            np.stack(channels),
            mask_S,
            case.attributes,
            tuple(voxel_sizes(images[0].affine).tolist()),
            images[0].header,
            tuple(dict.fromkeys(remarks)),
        )

    def _scaled(self, channel: str, path: str, voxels_S: np.ndarray) -> np.ndarray:
        """Scales a channel's intensities as the network is to see them; changes `voxels_S`.

        Raises:
            DataError: they are no colour, as the channel's name says.
        """
        kind = channel.lower()
        low, high = 0.0, 1.0
        if kind == "ct":
            low, high = self._window
            np.clip(voxels_S, low, high, out=voxels_S)
        elif kind == "rescale_to_0_1":
            low, high = float(voxels_S.min()), float(voxels_S.max())
        elif kind == "rgb_to_0_1":
            if not 0 <= voxels_S.min() <= voxels_S.max() <= 255:
                raise DataError(
                    f"{path}: channel {channel} must be 0 to 255, got {voxels_S.min():g} to "
                    f"{voxels_S.max():g}; correct the file, or the channel's name in dataset.json"
                )
            high = 255.0
        elif kind != "nonorm":
            inside = voxels_S[voxels_S != 0]
            if inside.size:
                low = float(inside.mean(dtype=np.float64))
                high = low + float(inside.std(dtype=np.float64))
        voxels_S -= low
        voxels_S /= high - low or 1.0  # of an image of one intensity
        return voxels_S

    def _labels(self, path: str, voxels_S: np.ndarray) -> np.ndarray:
        """Turns a mask's voxels into uint8 labels; changes `voxels_S`.

        Raises:
            DataError: a voxel is no whole number, or no label of `dataset.json`, or all are
                ignored.
        """
        labels_S = np.rint(voxels_S)
        last = len(self.classes) - 1
        voxels_S -= labels_S
        names = ", ".join((*self.classes, *[IGNORE] * self.ignores))
        expected = f"0 to {last + self.ignores} ({names})"
        if (between_S := np.abs(voxels_S) > INTEGRAL).any():
            raise DataError(
                f"{path}: labels must be whole numbers, {expected}; got "
                f"{_few((labels_S + voxels_S)[between_S])}; resample labels to the nearest "
                "neighbour, never smoothly"
            )
        if (strange_S := (labels_S < 0) | (labels_S > last + self.ignores)).any():
            raise DataError(
                f"{path}: labels must be {expected}, as dataset.json says; got also "
                f"{_few(labels_S[strange_S])}; correct the one or the other"
            )
        if self.ignores:
            labels_S[labels_S > last] = IGNORED
            if (labels_S == IGNORED).all():
                raise DataError(
                    f"{path}: all of it has the label {IGNORE}, so that there is nothing to learn "
                    "or to score; leave the case out, or move its image to imagesTs"
                )
        return labels_S.astype(np.uint8)


def _scaling(channel: str, ct_window: tuple[float, float]) -> str:
    """Says what `Folder` does to a channel's intensities."""
    low, high = ct_window
    return {
        "ct": f"clipped to {low:g} .. {high:g} HU, then scaled to 0 .. 1",
        "nonorm": "left as it is",
        "rescale_to_0_1": "scaled to 0 .. 1 by its own range",
        "rgb_to_0_1": "divided by 255",
    }.get(channel.lower(), "brought to mean 0 and variance 1 of its voxels other than 0")


def _median_grid(
    cases: Sequence[Case], grids: Sequence[tuple[np.ndarray, np.ndarray]], notes: list[str]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Finds the median voxel in mm and the median count of them; notes what is odd about sizes.

    Args:
        cases: one or more.
        grids: of each, what `canonical_grid` gives.
        notes: added to.
    """
    # Test cases decide nothing, not even the grid, where there are others.
    own = [grid for grid, case in zip(grids, cases, strict=True) if case.split != "test"]
    sizes, counts = np.median(own or grids, axis=0)
    voxel = " x ".join(f"{size:.3g}" for size in sizes)
    notes.append(
        f"volumes: in the median {' x '.join(f'{n:.0f}' for n in counts)} voxels of {voxel} mm, "
        "from left to right, back to front and below to above"
    )
    longest, cube = float((sizes * counts).max()), float(np.prod(sizes) ** (1 / 3))
    if (longest < SHORT and cube < FINE) or cube < FINEST:
        notes.append(
            f"warning: the median volume is {longest:.3g} mm long, of voxels of {voxel} mm, as if "
            "its affine were in cm or m; if so, correct the affines, since all scores in mm and "
            "the grid go by them"
        )
    if longest > LONG:
        notes.append(
            f"warning: the median volume is {longest:.3g} mm long, as if its affine were in "
            "micrometres; if so, correct the affines, since all scores in mm and the grid go by "
            "them"
        )
    unlike = [
        case.case_id
        for case, (spacing, _) in zip(cases, grids, strict=True)
        if not 1 / UNLIKE < np.prod(spacing) / np.prod(sizes) < UNLIKE
    ]
    if unlike:
        notes.append(
            f"warning: voxels {UNLIKE} times as large as the median's or as small, as if "
            f"not in mm: {len(unlike)} cases: {shown(unlike, 10)}"
        )
    (x, y, z), (across, along, up) = sizes.tolist(), counts.tolist()
    return (x, y, z), (across, along, up)


def _few(numbers: np.ndarray) -> str:
    """Writes out some of the distinct numbers."""
    return shown([f"{number:g}" for number in np.unique(numbers)], 8)


def _case(case_id: str, files: CaseFiles, record: CaseRecord, path: Path) -> Case:
    """Puts together what the folders and the csv at `path` say of a case.

    Raises:
        DataError: they contradict each other in its split.
    """
    if files.split and record.split not in (None, files.split):
        raise DataError(
            f"{path}:{record.line}: {case_id}: split is {record.split}, but its image is in "
            f"{files.folder}; move it to imagesTr, or leave split empty"
        )
    labelled = files.label is not None
    if record.split and not labelled:
        raise DataError(
            f"{path}:{record.line}: {case_id}: split is {record.split}, but it has no label; add "
            "one to labelsTs, or leave split empty"
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
