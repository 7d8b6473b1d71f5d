"""Reads and writes masks as files: one for each case, with label values at native resolution.

Masks of volumes are written as NIfTI, and masks of images as PNG. Another tool's masks may have any
format in which the masks of a folder are read; masks of images may also be .npy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti2 import Nifti2Header
from PIL import Image

from ..data import DataSettings
from ..data.cases import Case, Dataset, Sample
from ..data.endings import LOSSLESS, VOLUMES, split_ending
from ..data.folder import INTEGRAL
from ..data.images import read_labels
from ..data.readers import open_volume
from ..data.splits import choose_splits
from ..data.table import nfc
from ..data.volumes import ASTRAY, apart
from ..errors import DataError, reading, shown

# By the axes of what they are masks of, in this order where an error names them.
SUFFIXES = {2: (*LOSSLESS, ".npy"), 3: VOLUMES}


def write_mask(folder: Path, sample: Sample, mask_S: np.ndarray) -> Path:
    """Writes `<case id>.png`, 8 bits a pixel, or `<case id>.nii.gz`; returns the file.

    A NIfTI file is uint8 and has its image's affines (sform and qform), with their codes and units.
    Scaling, display range and extensions are of the image's intensities, or of its patient, and are
    left out.
    """
    if sample.header is None:
        path = folder / f"{sample.case_id}{SUFFIXES[2][0]}"
        Image.fromarray(mask_S.astype(np.uint8)).save(path)
        return path
    path = folder / f"{sample.case_id}{SUFFIXES[3][0]}"
    header = sample.header.copy()
    header.extensions.clear()
    header["cal_max"] = header["cal_min"] = 0
    header.set_data_dtype(np.uint8)
    kind = nibabel.Nifti2Image if isinstance(header, Nifti2Header) else nibabel.Nifti1Image
    nibabel.save(kind(mask_S.astype(np.uint8), None, header), path)
    return path


def find_masks(folder: Path, *, axes: int = 2) -> dict[str, list[Path]]:
    """Finds the files of each case id; `axes` are the images'.

    Files of other kinds, and folders, are ignored: tools write their settings beside their masks.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder with a mask for every case.")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        stem, suffix = split_ending(path.name, SUFFIXES[axes])
        if suffix and path.is_file() and not path.name.startswith("."):
            files.setdefault(nfc(stem), []).append(path)
    return files


def choose_cases(
    files: Mapping[str, Sequence[Path]], dataset: Dataset, settings: DataSettings, split: str
) -> tuple[tuple[Case, ...], str]:
    """Chooses the cases of a split whose masks are to be scored.

    Args:
        files: what `find_masks` found.
        dataset, settings: the data, and what they were opened by.
        split: one of the splits, or "all": every case that can be scored. The data's own test cases
            are none of these if no mask is of one of them, as in a cross-validation.

    Returns:
        The cases, and a note on test cases that were left out, empty if there are none.

    Raises:
        DataError: as of `choose_splits`, or "all" is to be of a splits file or a fold.
    """
    if split != "all":
        splits = choose_splits(
            dataset,
            settings.splits,
            settings.split_seed,
            settings.fold,
            settings.folds,
            needed=(split,),
        )
        chosen = set(getattr(splits, split))
        return tuple(case for case in dataset.cases if case.case_id in chosen), ""
    given = {"--splits": settings.splits, "--fold": settings.fold, "--folds": settings.folds}
    if idle := [f"{flag} {value}" for flag, value in given.items() if value is not None]:
        raise DataError(
            f"split: all scores every case, so that {' and '.join(idle)} would change nothing. "
            "Leave it out, or name one of the splits, such as --split validation."
        )
    cases = tuple(case for case in dataset.cases if case.labelled)
    own = [case.case_id for case in cases if case.split == "test"]
    if not own or len(own) == len(cases) or any(case_id in files for case_id in own):
        return cases, ""
    note = f"The data's own test cases have no mask in the folder and are not scored: {shown(own)}."
    return tuple(case for case in cases if case.split != "test"), note


def assign_masks(
    files: Mapping[str, Sequence[Path]],
    case_ids: Sequence[str],
    left_out: Collection[str] = (),
    others: Mapping[str, bool] | None = None,
    *,
    axes: int = 2,
) -> tuple[dict[str, Path], list[str]]:
    """Gives the file of each case, and a sentence for each thing that is wrong with the files.

    Args:
        files: what `find_masks` found.
        case_ids: the cases to be scored.
        left_out: cases whose masks may be there, and are not scored.
        others: all cases of the data, and whether they can be scored: masks of those that can tell
            that another split is meant.
        axes: of the images.
    """
    known = {*case_ids, *left_out}
    missing = [case_id for case_id in case_ids if case_id not in files]
    extra = [stem for stem in files if stem not in known]
    faults = [
        f"{' and '.join(path.name for path in files[case_id])}: two masks of one case; keep one."
        for case_id in case_ids
        if len(files.get(case_id, ())) > 1
    ]
    *suffixes, last = SUFFIXES[axes]
    if missing:
        faults.append(
            f"{len(missing)} of {len(case_ids)} cases have no mask "
            f"(<case id>{', '.join(suffixes)} or {last}): {shown(missing)}."
        )
    for scorable, what in (
        (None, "of no case of this split"),
        (True, "of cases in other splits (--split all scores every case)"),
        (False, "of cases without a mask in the data to be scored by; take them away"),
    ):
        stems = [stem for stem in extra if (others or {}).get(stem) is scorable]
        if names := [path.name for stem in stems for path in files[stem]]:
            faults.append(f"{len(names)} masks are {what}: {shown(names)}.")
    return {case_id: files[case_id][0] for case_id in case_ids if case_id in files}, faults


def read_mask(path: Path, sample: Sample, classes: Sequence[str]) -> np.ndarray:
    """Reads the labels in a file: uint8, of the sample's size.

    Args:
        path: an image of 8 (or 1) bits, grey or with a palette, whose values are labels; an .npy
            of integers or bool; or a volume of the image's geometry, of whole numbers.
        sample: whose mask it is.
        classes: names by label.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    with reading(path.name, "cannot be read", "write it again."):
        if path.name.lower().endswith(SUFFIXES[3]):
            values = _read_volume(path, sample)
        else:
            values = _read_npy(path) if path.suffix.lower() == ".npy" else read_labels(path)
    size = sample.native_size
    if values.shape != size:
        raise DataError(f"{path.name}: got size {values.shape}, expected the image's size, {size}.")
    # Sorting out which labels there are takes seconds of a volume, and is rarely needed.
    if not 0 <= values.min() <= values.max() < len(classes):
        labels = np.unique(values).tolist()
        wrong = [label for label in labels if not 0 <= label < len(classes)]
        names = ", ".join(f"{label} {name}" for label, name in enumerate(classes))
        raise DataError(
            f"{path.name}: got label {', '.join(f'{label:g}' for label in wrong[:5])}"
            f"{', ...' if len(wrong) > 5 else ''}, expected labels and not grey levels. The labels "
            f"are {names}."
        )
    return values.astype(np.uint8)


def _read_npy(path: Path) -> np.ndarray:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iub":
        kind = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"got {kind}, expected integer labels: the argmax, not scores")
    return values


def _read_volume(path: Path, sample: Sample) -> np.ndarray:
    """float32, of the image's own grid."""
    volume = open_volume(str(path))
    if volume.shape == sample.native_size and sample.affine is not None:
        astray = apart(sample.affine, volume.affine, volume.shape)
        if not astray <= ASTRAY:
            raise DataError(
                f"{path}: lies elsewhere than its image: its corners are up to {astray:.1f} "
                "voxels away; resample it onto the image's grid"
            )
    values_S = volume.read()
    labels_S = np.rint(values_S)
    if np.abs(values_S - labels_S).max() > INTEGRAL:
        raise DataError(f"{path}: got fractions, expected labels: the argmax, not scores")
    return labels_S
