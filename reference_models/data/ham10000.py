"""HAM10000: dermatoscopic photographs with the lesion's outline, in the layout of MEDFAIR.

    HAM10000_images/ISIC_0024306.jpg
    HAM10000_segmentations/ISIC_0024306_segmentation.png     0 skin, 255 lesion
    split/new_train.csv, new_val.csv, new_test.csv           or one csv, such as HAM10000_metadata

A row is an image: `image_id`, `lesion_id`, `Path` (of the image, from the root; without
that column `HAM10000_images/<image_id>.jpg`), `Age_multi` (0..4) or `age` (years), `Sex` and
`localization`.
"""

from __future__ import annotations

import csv
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError, report_faults
from .cases import SPLITS, UNKNOWN, Attribute, Case, Dataset, Sample

AGES = ("0-19", "20-39", "40-59", "60-79", "80 and over")
YEARS_A_GROUP = 20
SEXES = {"f": 0, "female": 0, "m": 1, "male": 1, "unknown": UNKNOWN}
# The ten that the paper's code counts, in its order.
SITES = (
    "scalp", "face", "back", "trunk", "chest", "upper extremity", "abdomen", "lower extremity",
    "neck", "foot",
)  # fmt: skip
RARE_SITES = ("acral", "ear", "genital", "hand", "unknown")  # unknown here, as they are there
VALUES = {"age": AGES, "sex": ("female", "male"), "localization": SITES}
ATTRIBUTES = tuple(VALUES)
MISSING = ("", "nan", "none", "null")


class Ham10000(Dataset):
    """The images that the csv files under `root` name.

    The files are `train`, `val` (or `validation`) and `test.csv`, with or without `new_` before
    the name, in `root` or its folder `split`; without a train.csv, the only csv in `root`, whose
    split is left open. The subject is the lesion.

    What is not known stays unknown (-1): a missing age, sex "unknown", and sites other than
    `SITES`. The paper's code drops the first and the last and counts the second as female.

    Args:
        root: the folder.
        attributes: of `VALUES`; None takes all that the csv files hold.
        damaged: as in `open_dataset`.

    Raises:
        DataError: no csv, a column that is missing, a row that cannot be read, an image that is
            listed twice, or a file that is missing.
    """

    name = "ham10000"
    classes = ("skin", "lesion")
    regions = {"lesion": (1,)}  # noqa: RUF012
    channels = 3

    def __init__(
        self, root: Path, attributes: tuple[str, ...] | None, damaged: list[DataError] | None
    ) -> None:
        faults: list[DataError] = []
        self.notes = ["unknown ages, sexes and rare sites are kept, as unknown"]
        rows = [
            (f"{path}:{line}", split, row)
            for split, path in _csv_files(root)
            for line, row in _rows(path)
        ]
        columns = set.intersection(*(set(row) for _, _, row in rows))
        sources = {
            "age": {"age_multi", "age"} & columns,
            "sex": {"sex"} & columns,
            "localization": {"localization"} & columns,
        }
        names = attributes if attributes is not None else tuple(n for n in VALUES if sources[n])
        needed = {"image_id", "lesion_id", *(name for name in names if not sources[name])}
        if missing := sorted(needed - columns):
            raise DataError(
                f"{root}: the csv files lack {', '.join(missing)}; the first has "
                f"{', '.join(rows[0][2])}"
            )
        if "age" in names:
            source = "Age_multi" if "age_multi" in columns else "age, in years"
            self.notes.append(f"age: groups of {YEARS_A_GROUP} years from the column {source}")
        self.attributes = tuple(Attribute(name, VALUES[name]) for name in names)
        cases: dict[str, Case] = {}
        for where, split, row in rows:
            try:
                case = _case(root, row, split, names)
                if case.case_id in cases:
                    raise DataError(
                        f"{case.case_id} is listed already, in {cases[case.case_id].split}"
                    )
                cases[case.case_id] = case
            except DataError as error:
                faults.append(DataError(f"{where}: {error}"))
        report_faults(faults, damaged)
        self.cases = tuple(cases.values())

    def load(self, case: Case) -> Sample:
        image_path, mask_path = case.files
        image_SC = _pixels(image_path)
        mask_SC = _pixels(mask_path)
        mask_S = mask_SC[..., 0]
        if (mask_SC != mask_S[..., None]).any():
            raise DataError(f"{mask_path}: the mask must be black and white, but has colours")
        if image_SC.shape[:2] != mask_S.shape:
            raise DataError(
                f"{mask_path}: mask of {mask_S.shape} pixels, but its image has "
                f"{image_SC.shape[:2]}"
            )
        lesion_S = mask_S == 255
        if not (lesion_S | (mask_S == 0)).all():
            raise DataError(
                f"{mask_path}: mask values must be 0 and 255, got "
                f"{sorted(set(np.unique(mask_S).tolist()))[:8]}"
            )
        if not lesion_S.any():
            raise DataError(f"{mask_path}: the mask is all background (only 0)")
        image_CS = image_SC.transpose(2, 0, 1).astype(np.float32) / 255
        return Sample(
            case.case_id, image_CS, lesion_S.astype(np.uint8), case.attributes, (1.0, 1.0)
        )


def _csv_files(root: Path) -> list[tuple[str | None, Path]]:
    """Finds the csv files and their splits, in the first folder that has a train.csv."""
    for folder in (root, root / "split"):
        found: list[tuple[str | None, Path]] = []
        for split in SPLITS:
            names = ("validation", "val") if split == "validation" else (split,)
            paths = [folder / f"{prefix}{name}.csv" for name in names for prefix in ("", "new_")]
            found += [(split, path) for path in paths if path.is_file()][:1]
        if "train" in [split for split, _ in found]:
            return found
    alone = sorted(root.glob("*.csv"))
    if len(alone) != 1:
        raise DataError(
            f"{root}: expected a train.csv in it or in {root / 'split'}, or a single csv; got "
            f"{', '.join(path.name for path in alone) or 'none'}"
        )
    return [(None, alone[0])]


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Reads each row: its line in the file, and its cells by column in lower case."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = [
                (reader.line_num, {k: v.strip() for k, v in row.items() if k is not None})
                for row in reader
            ]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: not a readable csv ({error})") from error
    if not rows:
        raise DataError(f"{path}: has no row")
    return rows


def _case(root: Path, row: dict[str, str], split: str | None, names: tuple[str, ...]) -> Case:
    """Makes a case of a row of the csv and the attributes' names.

    Raises:
        DataError: a cell cannot be read, or the image or its mask is missing.
    """
    image_id, lesion = row["image_id"], row["lesion_id"]
    if not image_id or not lesion or image_id[0] == "." or Path(image_id).name != image_id:
        raise DataError(f"image_id and lesion_id must be names, got {image_id!r} and {lesion!r}")
    # The rule for masks holds for the csv's path; the root's own name may contain "_images" too.
    written = (row.get("path") or f"HAM10000_images/{image_id}.jpg").replace("\\", "/")
    relative = PurePosixPath(written)
    mask = str(relative.with_name(f"{relative.stem}_segmentation.png"))
    mask = mask.replace("_images", "_segmentations")
    image_path, mask_path = root / relative, root / mask
    if absent := [str(path) for path in (image_path, mask_path) if not path.is_file()]:
        raise DataError(f"{image_id}: no such file: {', '.join(absent)}")
    readers = {"age": _age, "sex": _sex, "localization": _site}
    attributes = tuple(readers[name](row) for name in names)
    stratum = _age(row) if {"age", "age_multi"} & row.keys() else UNKNOWN
    return Case(image_id, lesion, attributes, split, (str(image_path), str(mask_path)), stratum)


def _age(row: dict[str, str]) -> int:
    """Reads an index of `AGES` from the column of groups or, where there is none, of years."""
    grouped = "age_multi" in row
    text = row["age_multi" if grouped else "age"]
    if text.lower() in (*MISSING, "unknown", str(UNKNOWN), f"{UNKNOWN}.0"):
        return UNKNOWN
    try:
        number = float(text)
        index = int(number) if grouped else min(int(number // YEARS_A_GROUP), len(AGES) - 1)
        if 0 <= index < len(AGES) and (not grouped or number == index) and number <= 130:
            return index
    except (ValueError, OverflowError):
        pass
    expected = f"Age_multi 0..{len(AGES) - 1}" if grouped else "age in years"
    raise DataError(f"{row['image_id']}: expected {expected}, or nothing, got {text!r}")


def _sex(row: dict[str, str]) -> int:
    """Reads 0 for female, 1 for male."""
    text = row["sex"].lower()
    if text in MISSING:
        return UNKNOWN
    if text not in SEXES:
        raise DataError(f"{row['image_id']}: Sex must be one of {list(SEXES)}, got {row['sex']!r}")
    return SEXES[text]


def _site(row: dict[str, str]) -> int:
    """Reads an index of `SITES`."""
    text = row["localization"].lower()
    if text in (*MISSING, *RARE_SITES):
        return UNKNOWN
    if text not in SITES:
        raise DataError(
            f"{row['image_id']}: localization must be one of {[*SITES, *RARE_SITES]}, got {text!r}"
        )
    return SITES.index(text)


def _pixels(path: str) -> np.ndarray:
    """Reads an image as rows x columns x RGB, uint8, upright as its EXIF says.

    Raises:
        DataError: it is damaged, or not of 8 opaque bits a channel.
    """
    try:
        with Image.open(path) as image:
            image.verify()  # a PNG's checksums, which decoding alone does not look at to the end
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # which Pillow would cut off at 255
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            upright = ImageOps.exif_transpose(image)
            see_through = "A" in image.mode or "transparency" in image.info
            if see_through and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
                raise ValueError("parts of it are transparent, and what lies behind is not known")
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
