"""HAM10000: dermatoscopic photographs with the lesion's outline, in MEDFAIR's layout or unpacked.

    HAM10000_images/ISIC_0024306.jpg                         or HAM10000_images_part_1, _part_2
    HAM10000_segmentations/ISIC_0024306_segmentation.png     0 skin, 255 lesion
    split/new_train.csv, new_val.csv, new_test.csv           or HAM10000_metadata

Each row of a csv describes an image: `image_id`, `lesion_id`, `Age_multi` (0..4) or `age` (years),
`Sex`, `localization` and, in MEDFAIR's files, `Path`, the image's path from the root. Without a
path of an existing file, photographs and outlines are found by `image_id` in the folders to which
the archives of Dataverse or Kaggle unpack: folders whose names begin with HAM10000_images and
HAM10000_segmentations, in upper or lower case and nested or not, `images` and `masks`, or the root.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from ..errors import DataError, report_faults, shown
from .cases import SPLITS, UNKNOWN, Attribute, Case, Dataset, Sample
from .images import find_file, read_image
from .table import UNKNOWN_TEXTS, Cells, Row, doubtful_identifiers, read_table

AGES = ("0-19", "20-39", "40-59", "60-79", "80 and over")
YEARS_A_GROUP = 20
SEXES = {"f": 0, "female": 0, "m": 1, "male": 1}
# The ten sites that the paper's code uses, in its order.
SITES = (
    "scalp", "face", "back", "trunk", "chest", "upper extremity", "abdomen", "lower extremity",
    "neck", "foot",
)  # fmt: skip
RARE_SITES = ("acral", "ear", "genital", "hand")  # unknown here, as in the paper's code
VALUES = {"age": AGES, "sex": ("female", "male"), "localization": SITES}
ATTRIBUTES = tuple(VALUES)


class Ham10000(Dataset):
    """The images that the csv files under `root` name.

    The files are `train`, `val` (or `validation`) and `test.csv`, with or without `new_` before the
    name, in `root` or its folder `split`. Without a train.csv, HAM10000_metadata in `root` is read
    (it may end in .csv, .tab or have no ending), or else the only csv there; the split is then left
    open. The subject is the lesion.

    A missing age, the sex "unknown", and sites other than `SITES` are unknown (-1). The paper's
    code leaves out cases of the first and the last kind, and counts those of the second as female.

    Args:
        root: the folder.
        attributes: names from `VALUES`; None reads all that the csv files hold.
        damaged: as in `open_dataset`.
        unknown_texts: as in `DataSettings`.

    Raises:
        DataError: there is no csv, a column or a file is missing, a row cannot be read, or an image
            is listed twice.
    """

    name = "ham10000"
    classes = ("skin", "lesion")
    regions = {"lesion": (1,)}  # noqa: RUF012
    channels = 3

    def __init__(
        self,
        root: Path,
        attributes: tuple[str, ...] | None,
        damaged: list[DataError] | None,
        unknown_texts: Collection[str] = UNKNOWN_TEXTS,
    ) -> None:
        faults: list[DataError] = []
        notes = ["cases of unknown age, unknown sex or a rare site are included, as unknown"]
        self.notes = notes
        tables = [
            (split, read_table(path, faults, notes, str.lower))
            for split, path in _csv_files(root, notes)
        ]
        columns = set.intersection(*({*table.columns} for _, table in tables))
        archives = {kind: _unpacked(root, kind, notes) for kind in _ARCHIVES}
        for kind, found in archives.items():
            if not found and "path" not in columns:
                raise DataError(
                    f"{root}: there are no {kind}: neither this folder nor a folder in it whose "
                    f"name begins with {' or '.join(_ARCHIVES[kind][1:])} has a "
                    f"*{_ARCHIVES[kind][0]}; unpack the archives of that name into it"
                )
        sources = {
            "age": {"age_multi", "age"} & columns,
            "sex": {"sex"} & columns,
            "localization": {"localization"} & columns,
        }
        names = attributes if attributes is not None else tuple(n for n in VALUES if sources[n])
        needed = {"image_id", "lesion_id", *(name for name in names if not sources[name])}
        if missing := sorted(needed - columns):
            raise DataError(
                f"{root}: the csv files lack the columns {', '.join(missing)}; the first file has "
                f"{', '.join(tables[0][1].columns)}"
            )
        if "age" in names:
            source = "Age_multi" if "age_multi" in columns else "age, in years"
            notes.append(f"age: groups of {YEARS_A_GROUP} years, from the column {source}")
        self.attributes = tuple(Attribute(name, VALUES[name]) for name in names)
        cases: dict[str, Case] = {}
        left_out: set[str] = set()
        for split, table in tables:
            cells = Cells(unknown_texts)
            left_out |= {row.cells.get("image_id", "") for row in table.misfits}
            for row in table.rows:
                try:
                    case = _case(root, archives, row, split, names, cells)
                    if case.case_id in cases:
                        raise DataError(
                            f"{case.case_id} is listed already, in {cases[case.case_id].split}"
                        )
                    cases[case.case_id] = case
                except DataError as error:
                    left_out.add(row.cells["image_id"])
                    faults.append(DataError(f"{table.path}:{row.line}: {error}"))
            notes += cells.notes(table.path)
        notes += doubtful_identifiers("lesion_id", {case.subject for case in cases.values()})
        report_faults(faults, damaged)
        self.cases = tuple(cases.values())
        self.left_out = left_out - cases.keys()

    def load(self, case: Case) -> Sample:
        image_path, mask_path = case.files
        image_SC = read_image(image_path)
        mask_SC = read_image(mask_path)
        mask_S = mask_SC[..., 0]
        if (mask_SC != mask_S[..., None]).any():
            raise DataError(f"{mask_path}: expected a mask of black and white, but it has colours")
        if image_SC.shape[:2] != mask_S.shape:
            raise DataError(
                f"{mask_path}: this mask has {mask_S.shape} pixels, but its image has "
                f"{image_SC.shape[:2]}"
            )
        lesion_S = mask_S == 255
        if not (lesion_S | (mask_S == 0)).all():
            raise DataError(
                f"{mask_path}: expected a mask of 0 and 255, got "
                f"{sorted(set(np.unique(mask_S).tolist()))[:8]}"
            )
        if not lesion_S.any():
            raise DataError(f"{mask_path}: the mask is only background (0)")
        image_CS = image_SC.transpose(2, 0, 1).astype(np.float32) / 255
        return Sample(
            case.case_id, image_CS, lesion_S.astype(np.uint8), case.attributes, (1.0, 1.0)
        )


# The ending of the files, and the beginnings of the names of the folders that hold them.
_ARCHIVES = {
    "photographs": (".jpg", "HAM10000_images", "images"),
    "outlines": ("_segmentation.png", "HAM10000_segmentations", "masks"),
}
_METADATA = [f"ham10000_metadata{ending}" for ending in (".csv", "", ".tab", ".tsv", ".txt")]


def _csv_files(root: Path, notes: list[str]) -> list[tuple[str | None, Path]]:
    """Finds the csv files and their splits, in the first folder that has a train.csv, or one file
    without splits."""
    for folder in (root, root / "split"):
        found: list[tuple[str | None, Path]] = []
        for split in SPLITS:
            names = ("validation", "val") if split == "validation" else (split,)
            paths = [folder / f"{prefix}{name}.csv" for name in names for prefix in ("", "new_")]
            found += [(split, path) for path in paths if path.is_file()][:1]
        if "train" in [split for split, _ in found]:
            return found
    files = [path for path in sorted(root.iterdir()) if path.is_file()]
    metadata = [path for path in files if path.name.lower() in _METADATA]
    metadata.sort(key=lambda path: _METADATA.index(path.name.lower()))
    alone = metadata or [path for path in files if path.suffix.lower() == ".csv"]
    if not metadata and len(alone) != 1:
        raise DataError(
            f"{root}: expected HAM10000_metadata (with .csv, .tab or no ending), a train.csv in it "
            f"or in {root / 'split'}, or a single csv; got "
            f"{', '.join(path.name for path in alone) or 'none'}"
        )
    if metadata[1:]:
        notes.append(f"{metadata[0]} is read; {shown([path.name for path in metadata[1:]])} is not")
    return [(None, alone[0])]


def _unpacked(root: Path, kind: str, notes: list[str]) -> dict[str, Path]:
    """Finds the files of an archive by their names in lower case, however it was unpacked."""
    ending, *beginnings = _ARCHIVES[kind]
    folders = [
        path
        for path in sorted(root.iterdir())
        if path.is_dir() and path.name.lower().startswith(tuple(map(str.lower, beginnings)))
    ]
    found: dict[str, Path] = {}
    again: list[Path] = []
    for paths in (*(folder.rglob("*") for folder in folders), root.iterdir()):
        for path in sorted(paths):
            name = path.name.lower()
            if not name.endswith(ending) or name[0] == "." or not path.is_file():
                continue
            if found.setdefault(name, path) != path:
                again.append(path)
    if again:
        notes.append(
            f"{len(again)} {kind} exist twice, such as {again[0]}; "
            f"{found[again[0].name.lower()]} is read instead of it"
        )
    return found


def _case(
    root: Path,
    archives: Mapping[str, Mapping[str, Path]],
    row: Row,
    split: str | None,
    names: tuple[str, ...],
    cells: Cells,
) -> Case:
    """Makes a case from a row of the csv.

    Raises:
        DataError: a cell cannot be read, or the image or its mask is missing.
    """
    image_id, lesion = row.cells["image_id"], cells.identifier(row.cells["lesion_id"])
    if not image_id or not lesion or image_id[0] == "." or Path(image_id).name != image_id:
        raise DataError(
            f"expected names as image_id and lesion_id, got {image_id!r} and "
            f"{row.cells['lesion_id']!r}"
        )
    # Only in the csv's path is "_images" replaced, since the root's name may contain it too.
    written = (row.cells.get("path") or f"HAM10000_images/{image_id}.jpg").replace("\\", "/")
    relative = PurePosixPath(written)
    mask = str(relative.with_name(f"{relative.stem}_segmentation.png"))
    mask = mask.replace("_images", "_segmentations")
    files, absent = [], []
    for expected, (kind, found) in zip((str(relative), mask), archives.items(), strict=True):
        name = f"{image_id}{_ARCHIVES[kind][0]}"
        if path := find_file(root, expected) or found.get(name.lower()):
            files.append(str(path))
        else:
            absent.append(str(root / expected) if row.cells.get("path") else f"{name} ({kind})")
    if absent:
        raise DataError(f"{image_id}: there is no such file: {', '.join(absent)}")
    readers = {"age": _age, "sex": _sex, "localization": _site}
    attributes = {name: readers[name](row.cells, cells) for name in names}
    stratum = UNKNOWN
    if {"age", "age_multi"} & row.cells.keys():
        stratum = (
            attributes["age"]
            if "age" in attributes
            else _age(row.cells, Cells(cells.unknown_texts))
        )
    return Case(image_id, lesion, tuple(attributes.values()), split, tuple(files), stratum)


def _age(row: dict[str, str], cells: Cells) -> int:
    """Reads an index of `AGES` from the column of groups or, where there is none, of years."""
    grouped = "age_multi" in row
    text = cells.value("age", row["age_multi" if grouped else "age"])
    if text is None:
        return UNKNOWN
    try:
        number = float(text)
        index = int(number) if grouped else min(int(number // YEARS_A_GROUP), len(AGES) - 1)
        if 0 <= index < len(AGES) and (not grouped or number == index) and number <= 130:
            return index
    except (ValueError, OverflowError):
        pass
    expected = f"Age_multi 0..{len(AGES) - 1}" if grouped else "age in years"
    raise DataError(f"{row['image_id']}: expected {expected}, or an empty cell, got {text!r}")


def _sex(row: dict[str, str], cells: Cells) -> int:
    """Reads 0 for female, 1 for male."""
    text = cells.value("sex", row["sex"])
    if text is None:
        return UNKNOWN
    if text.lower() not in SEXES:
        raise DataError(
            f"{row['image_id']}: Sex is {row['sex']!r}, expected one of {', '.join(SEXES)}"
        )
    return SEXES[text.lower()]


def _site(row: dict[str, str], cells: Cells) -> int:
    """Reads an index of `SITES`."""
    text = cells.value("localization", row["localization"])
    if text is None:
        return UNKNOWN
    site = text.lower()
    if site in RARE_SITES:
        cells.count_unknown("localization", text)
        return UNKNOWN
    if site not in SITES:
        raise DataError(
            f"{row['image_id']}: localization is {text!r}, expected one of "
            f"{', '.join([*SITES, *RARE_SITES])}"
        )
    return SITES.index(site)
