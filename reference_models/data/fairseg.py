"""Harvard-FairSeg: fundus photographs with the optic disc's rim and cup, a `.npz` for each patient.

The data set's page and released files describe the format: `slo_fundus` (rows x columns of 0..255,
some with three channels), `disc_cup_mask` (0 background, -1 rim, -2 cup; rim and cup are the disc),
codes for the attributes, where -1 means unknown, and lists of names for the official split. Older
copies have other names for some arrays, and some store unsigned bytes, in which -1 and -2 are 255
and 254.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath

import numpy as np

from ..errors import DataError, reading, report_faults
from .cases import SPLITS, UNKNOWN, Attribute, Case, Dataset, Sample
from .table import UNKNOWN_TEXTS, Cells, doubtful_identifiers, nfc

IMAGE = ("slo_fundus", "fundus_slo", "fundus")  # the first that a file has
MASK = ("disc_cup_mask", "disc_cup")
# Values in the order of their codes in the files.
CODED = {
    "race": (("race",), ("Asian", "Black", "White")),
    "gender": (("gender",), ("female", "male")),
    "ethnicity": (("ethnicity", "hispanic"), ("non-Hispanic", "Hispanic")),
    "language": (("language",), ("English", "Spanish", "other")),
    "maritalstatus": (
        ("maritalstatus",),
        ("married or partnered", "single", "divorced", "widowed", "legally separated"),
    ),
}
AGE_GROUPS = ("under 60", "60 and over")  # as in the paper's code
OLDEST = 130  # years; a higher age is in days
DAYS_A_YEAR = 365.25
ATTRIBUTES = (*CODED, "age")
STRATUM = ATTRIBUTES[0]


class FairSeg(Dataset):
    """The `.npz` files under `root`, split by `train.txt` and `test.txt` if those exist.

    The lists (`train.txt`, `test.txt` and perhaps `validation.txt` or `val.txt`) hold a file name
    on each line, and lie in `root` or in its folder `lists`. The files may lie anywhere below
    `root`. Files that no list names are left out; without lists all files are used and the split
    is left open. Images have three channels, since pretrained networks expect them, with
    intensities divided by 255. The subject is `pid` if a file has a known one, else the file.

    Args:
        root: the folder.
        attributes: names from `ATTRIBUTES`; None reads all that the files hold.
        damaged: as in `open_dataset`.
        unknown_texts: as in `DataSettings`, for `pid`.

    Raises:
        DataError: there are no files, no file holds an attribute, some ages are in days and others
            in years, a list is empty, or files are missing, damaged, listed twice or hold Python
            objects.
    """

    name = "fairseg"
    classes = ("background", "rim", "cup")
    regions = {"rim": (1,), "cup": (2,), "disc": (1, 2)}  # noqa: RUF012
    channels = 3

    def __init__(
        self,
        root: Path,
        attributes: tuple[str, ...] | None,
        damaged: list[DataError] | None,
        unknown_texts: Collection[str] = UNKNOWN_TEXTS,
    ) -> None:
        faults: list[DataError] = []
        notes: list[str] = []
        self.notes = notes
        listed = _listed(root, faults, notes)
        names = ATTRIBUTES if attributes is None else attributes
        found: dict[str, dict[str, float]] = {name: {} for name in (*names, STRATUM)}
        subjects: dict[str, str] = {}
        cells = Cells(unknown_texts)
        for case_id, (path, _) in listed.items():
            try:
                values, patient = _metadata(path, tuple(found))
                subjects[case_id] = (
                    case_id if patient is None else cells.subject("pid", patient, case_id)
                )
                for name, value in values.items():
                    found[name][case_id] = value
            except DataError as error:
                faults.append(error)
        if subjects:
            for name in [name for name in names if not found[name]]:
                if attributes is not None:
                    raise DataError(
                        f"{root}: no file has the attribute {name}; the first file has "
                        + ", ".join(_members(listed[next(iter(subjects))][0]))
                    )
                notes.append(f"{name}: no file has this attribute")
                del found[name]
        if "age" in found:
            found["age"] = _age_groups(found["age"], listed, subjects, faults, notes)
        notes += cells.notes(root)
        notes += doubtful_identifiers("pid", {*subjects.values()} - {*listed})
        report_faults(faults, damaged)
        names = tuple(name for name in names if name in found)
        self.left_out = listed.keys() - subjects.keys()
        strata = found.get(STRATUM, {})
        self.attributes = tuple(
            Attribute(name, AGE_GROUPS if name == "age" else CODED[name][1]) for name in names
        )
        self.cases = tuple(
            Case(
                case_id,
                subject,
                tuple(int(found[name].get(case_id, UNKNOWN)) for name in names),
                listed[case_id][1],
                (str(listed[case_id][0]),),
                int(strata.get(case_id, UNKNOWN)),
            )
            for case_id, subject in subjects.items()
        )

    def load(self, case: Case) -> Sample:
        path = Path(case.files[0])
        with _opened(path) as members:
            image = _member(path, members, IMAGE)
            mask = _member(path, members, MASK)
        if not image.size or image.dtype.kind not in "uif" or mask.dtype.kind not in "uif":
            raise DataError(
                f"{path}: expected an image and a mask of numbers, got {image.dtype} {image.shape} "
                f"and {mask.dtype} {mask.shape}; download it again"
            )
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[2] not in (1, 3) or image.shape[:2] != mask.shape:
            raise DataError(
                f"{path}: expected image and mask of one size (rows, columns), and an image of one "
                f"or three channels; got image {image.shape} and mask {mask.shape}"
            )
        # `not` lets NaN fail too. Fractions up to 1 would give a black image.
        if not (image.min() >= 0 and image.max() <= 255) or (
            image.dtype.kind == "f" and 0 < image.max() <= 1
        ):
            raise DataError(
                f"{path}: expected intensities of 0..255, got {image.min()}..{image.max()}"
            )
        if mask.dtype.kind == "u":
            mask = mask.view(f"i{mask.dtype.itemsize}")
        labels, counts = np.unique(mask, return_counts=True)
        if wrong := set(labels.tolist()) - {0, -1, -2}:
            raise DataError(
                f"{path}: expected a mask of 0, -1 (rim) and -2 (cup), got also {sorted(wrong)}"
            )
        if labels.tolist() == [0]:
            raise DataError(f"{path}: the mask is only background ({counts[0]} pixels of 0)")
        image_CS = np.broadcast_to(
            image.transpose(2, 0, 1).astype(np.float32) / 255, (3, *mask.shape)
        )
        mask_S = (-mask.astype(np.int8)).astype(np.uint8)
        return Sample(case.case_id, image_CS, mask_S, case.attributes, (1.0, 1.0))


def _listed(
    root: Path, faults: list[DataError], notes: list[str]
) -> dict[str, tuple[Path, str | None]]:
    """Finds the file and the official split of each case, by case id."""
    files: dict[str, Path] = {}
    # Unlike rglob, glob follows links to folders, and ignores hidden files such as those of macOS.
    found = glob.glob("**/*.[nN][pP][zZ]", root_dir=root, recursive=True)
    for path in sorted(root / name for name in found):
        if (case_id := nfc(path.stem)) in files:
            faults.append(
                DataError(f"{path}: {files[case_id]} has the same name; remove one of them")
            )
        files.setdefault(case_id, path)
    lists = _lists(root)
    if not files:
        raise DataError(f"{root}: there is no .npz file in this folder; name another --root")
    if not lists:
        notes.append("split: there is no train.txt or test.txt, so cases are split by --split-seed")
        return {case_id: (path, None) for case_id, path in files.items()}
    notes.append(f"split: by the lists {', '.join(map(str, lists.values()))}")
    listed: dict[str, tuple[Path, str | None]] = {}
    for split, text in lists.items():
        lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            faults.append(DataError(f"{text}: this list names no file"))
        for name in names:
            # Paths may be written as on Windows; "data.v1" without a suffix keeps its dot.
            stem = re.sub(r"\.npz$", "", PureWindowsPath(name).name, flags=re.IGNORECASE)
            case_id = nfc(stem)
            if case_id not in files:
                faults.append(DataError(f"{name}: {text} lists this file, but there is none"))
            elif case_id in listed:
                other = lists[str(listed[case_id][1])]
                faults.append(DataError(f"{name}: {text} and {other} both list this file"))
            else:
                listed[case_id] = (files[case_id], split)
    if left_out := len(files) - len(listed):
        notes.append(f"{left_out} files are in no list and are left out")
    return listed


def _age_groups(
    ages: Mapping[str, float],
    listed: Mapping[str, tuple[Path, str | None]],
    subjects: dict[str, str],
    faults: list[DataError],
    notes: list[str],
) -> dict[str, float]:
    """Finds the index in `AGE_GROUPS` of each age, in the unit, days or years, that most files
    have.

    A case whose age is in the other unit is a fault, and is removed from `subjects`.
    """
    known = {case_id: age for case_id, age in ages.items() if age >= 0}
    days = [case_id for case_id, age in known.items() if age > OLDEST]
    in_days = 2 * len(days) > len(known)
    unit, other = ("days", "years") if in_days else ("years", "days")
    for case_id in known:
        if (known[case_id] > OLDEST) != in_days:
            faults.append(
                DataError(
                    f"{listed[case_id][0]}: the age {known[case_id]:g} is in {other}, but most "
                    f"files have it in {unit}"
                )
            )
            subjects.pop(case_id)
    if known:
        low, high = min(known.values()), max(known.values())
        notes.append(f"age: the files have it in {unit}, {low:g} to {high:g}; groups: {AGE_GROUPS}")
    limit = 60 * (DAYS_A_YEAR if in_days else 1)
    return {case_id: float(age >= limit) for case_id, age in known.items()}


def _lists(root: Path) -> dict[str, Path]:
    """Finds the list of each split, in the first folder that has a list."""
    folders = (root, root / "lists", *sorted((root / "lists").glob("*/")))
    for folder in filter(Path.is_dir, folders):
        there = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
        names = {split: f"{split}.txt" for split in SPLITS}
        if names["validation"] not in there:
            names["validation"] = "val.txt"
        if lists := {split: there[name] for split, name in names.items() if name in there}:
            return lists
    return {}


def _metadata(path: Path, names: tuple[str, ...]) -> tuple[dict[str, float], str | None]:
    """Reads the attributes of a file (-1 if unknown, age in the file's unit) and its patient.

    The patient is None if the file has none.

    Raises:
        DataError: the file is damaged, or an attribute or patient is not valid.
    """
    values: dict[str, float] = {}
    patient: str | None = None
    with _opened(path) as members:
        for name in names:
            aliases = ("age",) if name == "age" else CODED[name][0]
            if not any(alias in members.files for alias in aliases):
                continue
            array = _member(path, members, aliases)
            if array.size != 1 or array.dtype.kind not in "iufb":
                raise DataError(
                    f"{path}: expected one number as {name}, got {array.dtype} {array.shape}"
                )
            value = float(array.item())
            n_codes = np.inf if name == "age" else len(CODED[name][1])
            if np.isnan(value):
                value = UNKNOWN
            elif value != UNKNOWN and not (
                0 <= value < n_codes and (name == "age" or value == int(value))
            ):
                codes = "0 or more" if name == "age" else f"0..{len(CODED[name][1]) - 1}"
                raise DataError(f"{path}: {name} is {value:g}, expected {codes}, or -1 for unknown")
            values[name] = value
        if "pid" in members.files:
            array = _member(path, members, ("pid",))
            if array.size != 1:
                raise DataError(
                    f"{path}: expected one value as pid, got {array.dtype} {array.shape}"
                )
            patient = nfc(str(array.item()).strip())
    return values, patient


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    """Opens a file, or raises a `DataError` that says why it cannot be read."""
    with reading(path, "not a readable .npz file", "copy or download it again"):
        opened = np.load(path, allow_pickle=False)
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise DataError(
            f"{path}: this file holds a single array, expected an .npz file; download it again"
        )
    return opened


def _members(path: Path) -> list[str]:
    """Lists the names of a file's arrays."""
    with _opened(path) as members:
        return members.files


def _member(path: Path, members: np.lib.npyio.NpzFile, aliases: tuple[str, ...]) -> np.ndarray:
    """Reads the first of `aliases` that the file has.

    Raises:
        DataError: the file has none, or the array is damaged or holds Python objects.
    """
    name = next((alias for alias in aliases if alias in members.files), None)
    if name is None:
        raise DataError(
            f"{path}: expected {' or '.join(aliases)} in this file; it has only "
            f"{', '.join(members.files)}"
        )
    with reading(path, f"{name} cannot be read", "copy or download the file again"):
        try:
            array = members[name]
        except ValueError as error:
            if "allow_pickle" in str(error):
                raise _pickled(path, name) from error
            raise
        if not isinstance(array, np.ndarray):  # numpy returns bytes for a member that is no array
            raise DataError(
                f"{path}: The entry {name} holds {type(array).__name__}, but a NumPy array was "
                "expected. Copy or download the file again."
            )
    return array


def _pickled(path: Path, name: str) -> DataError:
    """Says how an array of Python objects can be converted."""
    return DataError(
        f"{path}: {name} holds Python objects. Reading them would run code that the file may "
        "contain, so they are not read. If you trust its source, convert it once:\n"
        f"  old = dict(numpy.load({str(path)!r}, allow_pickle=True))\n"
        f"  old[{name!r}] = numpy.array(old[{name!r}].tolist())\n"
        f"  numpy.savez_compressed({str(path)!r}, **old)"
    )
