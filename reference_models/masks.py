"""Masks as files, ours or another tool's: one a case, label values at native resolution."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from .data.cases import DataError, shown

# In this order where an error names them.
SUFFIXES = (".png", ".npy")


def write_mask(folder: Path, case_id: str, mask_HW: np.ndarray) -> None:
    """Writes `<case_id>.png`, 8 bits a pixel."""
    Image.fromarray(mask_HW.astype(np.uint8)).save(folder / f"{case_id}.png")


def find_masks(
    folder: Path, case_ids: Sequence[str], others: Collection[str] = ()
) -> tuple[dict[str, Path], list[str]]:
    """The file of each case, and a sentence for each thing that is wrong with the folder.

    Masks of `others`, cases that are not to be scored, may be there.
    Files of other kinds and folders are let be: tools keep their settings beside their masks.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with a mask for every case.")
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            files.setdefault(path.stem, []).append(path)
    known = {*case_ids, *others}
    missing = [case_id for case_id in case_ids if case_id not in files]
    extra = [path.name for stem in files if stem not in known for path in files[stem]]
    faults = [
        f"{' and '.join(path.name for path in files[case_id])}: two masks of one case; keep one."
        for case_id in case_ids
        if len(files.get(case_id, ())) > 1
    ]
    if missing:
        faults.append(
            f"{len(missing)} of {len(case_ids)} cases have no mask "
            f"(<case id>{' or <case id>'.join(SUFFIXES)}): {shown(missing)}."
        )
    if extra:
        faults.append(f"{len(extra)} masks are of no case of this split: {shown(extra)}.")
    return {case_id: files[case_id][0] for case_id in case_ids if case_id in files}, faults


def read_mask(path: Path, size: tuple[int, ...], classes: Sequence[str]) -> np.ndarray:
    """The labels in a file: uint8, of the native size.

    Args:
        path: an 8-bit (or 1-bit) PNG, grey or with a palette, whose values are labels; or an .npy
            of integers or bool.
        size: expected.
        classes: names by label.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    try:
        values = _read_npy(path) if path.suffix.lower() == ".npy" else _read_png(path)
    except Exception as error:  # which one, depends on where the damage lies
        raise DataError(f"{path.name}: cannot be read ({error}).") from error
    if values.shape != size:
        raise DataError(f"{path.name}: got size {values.shape}, expected the image's, {size}.")
    labels = np.unique(values)
    if wrong := [label for label in labels.tolist() if not 0 <= label < len(classes)]:
        names = ", ".join(f"{label} {name}" for label, name in enumerate(classes))
        raise DataError(
            f"{path.name}: got label {', '.join(map(str, wrong[:5]))}"
            f"{', ...' if len(wrong) > 5 else ''}, expected labels, not grey levels: {names}."
        )
    return values.astype(np.uint8)


def _read_png(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as image:
        image.verify()  # checksums, which decoding alone does not look at to the end
    with Image.open(path, formats=["PNG"]) as image:
        if image.mode not in ("1", "L", "P"):
            raise ValueError(
                f"a PNG of mode {image.mode}, expected one label a pixel: 8 bits, grey or palette"
            )
        values = np.asarray(image).astype(np.uint8)
        colours = np.array(image.getpalette() or [], np.int64).reshape(-1, 3)[
            : int(values.max()) + 1
        ]
    # Of colours, places in the palette are the labels. Of greys that do not rise with their places
    # they need not be: tools that make files small put greys into any order.
    if (colours == colours[:, :1]).all() and (np.diff(colours[:, 0]) < 0).any():
        raise ValueError(
            f"its palette's greys are {', '.join(map(str, colours[:5, 0]))}, so that place and "
            "grey level are different labels; write it as 8-bit grey"
        )
    return values


def _read_npy(path: Path) -> np.ndarray:
    values = np.load(path, allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iub":
        kind = getattr(values, "dtype", type(values).__name__)
        raise ValueError(f"got {kind}, expected integer labels: the argmax, not scores")
    return values
