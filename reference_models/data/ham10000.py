"""HAM10000: dermatoscopic photographs with the lesion's outline, laid out by MEDFAIR or unpacked.

    HAM10000_images/ISIC_0024306.jpg                         or HAM10000_images_part_1, _part_2
    HAM10000_segmentations/ISIC_0024306_segmentation.png     0 skin, 255 lesion
    split/new_train.csv, new_val.csv, new_test.csv           or HAM10000_metadata

A row is an image: `image_id`, `lesion_id`, `Age_multi` (0..4) or `age` (years), `Sex`,
`localization` and, in MEDFAIR's, `Path`, of the image from the root. Without that, or where it
leads nowhere, photographs and outlines are found by `image_id` in what Dataverse's or Kaggle's
archives unpack to: folders whose names begin with HAM10000_images and HAM10000_segmentations, in
upper or lower case, one in the other or not, `images` and `masks`, or the root itself.
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
# The ten that the paper's code counts, in its order.
SITES = (
    "scalp", "face", "back", "trunk", "chest", "upper extremity", "abdomen", "lower extremity",
    "neck", "foot",
)  # fmt: skip
RARE_SITES = ("acral", "ear", "genital", "hand")  # unknown here, as they are there
VALUES = {"age": AGES, "sex": ("female", "male"), "localization": SITES}
ATTRIBUTES = tuple(VALUES)


class Ham10000(Dataset):
    """The images that the csv files under `root` name.

    The files are `train`, `val` (or `validation`) and `test.csv`, with or without `new_` before
    the name, in `root` or its folder `split`; without a train.csv, HAM10000_metadata in `root`,
    whether it ends in .csv, .tab or nothing, or else the only csv there, whose split is left open.
    The subject is the lesion.

    What is not known stays unknown (-1): a missing age, sex "unknown", and sites other than
    `SITES`. The paper's code drops the first and the last and counts the second as female.

    Args:
        root: the folder.
        attributes: of `VALUES`; None takes all that the csv files hold.
        damaged: as in `open_dataset`.
        unknown_texts: as in `DataSettings`.

    Raises:
        DataError: no csv, a column that is missing, a row that cannot be read, an image that is
            listed twice, or a file that is missing.
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
        notes = ["unknown ages, sexes and rare sites are kept, as unknown"]
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
                    f"{root}: no {kind}: there is no *{_ARCHIVES[kind][0]} in it, nor in a folder "
                    f"of it whose name begins with {' or '.join(_ARCHIVES[kind][1:])}; unpack the "
                    "archives of that name into it"
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
                f"{root}: the csv files lack {', '.join(missing)}; the first has "
                f"{', '.join(tables[0][1].columns)}"
            )
        if "age" in names:
            source = "Age_multi" if "age_multi" in columns else "age, in years"
            notes.append(f"age: groups of {YEARS_A_GROUP} years from the column {source}")
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


# How files end, and how the folders' names begin that archives unpack to.
_ARCHIVES = {
    "photographs": (".jpg", "HAM10000_images", "images"),
    "outlines": ("_segmentation.png", "HAM10000_segmentations", "masks"),
}
_METADATA = [f"ham10000_metadata{ending}" for ending in (".csv", "", ".tab", ".tsv", ".txt")]


def _csv_files(root: Path, notes: list[str]) -> list[tuple[str | None, Path]]:
    """Finds the csv files and their splits: in the first folder that has a train.csv, or one."""
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
        notes.append(
            f"{metadata[0]} is read, and not {shown([path.name for path in metadata[1:]])}"
        )
    return [(None, alone[0])]


def _unpacked(root: Path, kind: str, notes: list[str]) -> dict[str, Path]:
    """Finds the files of a kind of archive by name in lower case, however it was unpacked."""
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
            f"{len(again)} {kind} are there twice, such as {again[0]}; it is not read, but "
            f"{found[again[0].name.lower()]}"
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
    """Makes a case of a row of the csv and the attributes' names.

    Raises:
        DataError: a cell cannot be read, or the image or its mask is missing.
    """
    image_id, lesion = row.cells["image_id"], cells.identifier(row.cells["lesion_id"])
    if not image_id or not lesion or image_id[0] == "." or Path(image_id).name != image_id:
        raise DataError(
            f"image_id and lesion_id must be names, got {image_id!r} and {row.cells['lesion_id']!r}"
        )
    # The rule for masks holds for the csv's path; the root's own name may contain "_images" too.
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
        raise DataError(f"{image_id}: no such file: {', '.join(absent)}")
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
    raise DataError(f"{row['image_id']}: expected {expected}, or nothing, got {text!r}")


def _sex(row: dict[str, str], cells: Cells) -> int:
    """Reads 0 for female, 1 for male."""
    text = cells.value("sex", row["sex"])
    if text is None:
        return UNKNOWN
    if text.lower() not in SEXES:
        raise DataError(f"{row['image_id']}: Sex must be one of {list(SEXES)}, got {row['sex']!r}")
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
            f"{row['image_id']}: localization must be one of {[*SITES, *RARE_SITES]}, got {text!r}"
        )
    return SITES.index(site)
