"""Harvard-FairSeg: fundus photographs with the optic disc's rim and cup, one `.npz` a patient.

Read from the data set's page and released files: `slo_fundus` (rows x columns of 0..255, some with
three channels), `disc_cup_mask` (0 background, -1 rim, -2 cup; the disc is both), codes for the
attributes with -1 for unknown, and lists of names for the official split. Older copies name some
members otherwise and some stand in unsigned bytes, where -1 and -2 read 255 and 254.
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
OLDEST = 130  # years; who is older than that has an age in days
DAYS_A_YEAR = 365.25
ATTRIBUTES = (*CODED, "age")
STRATUM = ATTRIBUTES[0]


class FairSeg(Dataset):
    """The `.npz` files under `root`, split by `train.txt` and `test.txt` where those are there.

    The lists (and a `validation.txt` or `val.txt`) hold a file name a line and lie in `root` or in
    a `lists` folder of it, the files anywhere below `root`. Files that no list names are left out;
    without lists all are taken and the split is left open. Images are given three channels, since
    pretrained networks expect them, with intensities / 255. The subject is `pid` where a file has
    it and it is known, the file elsewhere.

    Args:
        root: the folder.
        attributes: of `ATTRIBUTES`; None takes all that the files hold.
        damaged: as in `open_dataset`.
        unknown_texts: as in `DataSettings`, of the patient.

    Raises:
        DataError: no files, an attribute that no file holds, ages partly in days and partly in
            years, an empty list, or files that are missing, damaged, listed twice or hold Python
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
                        f"{root}: no file has the attribute {name}; the first has "
                        + ", ".join(_members(listed[next(iter(subjects))][0]))
                    )
                notes.append(f"{name}: in no file")
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
                f"{path}: image and mask must be numbers, got {image.dtype} {image.shape} "
                f"and {mask.dtype} {mask.shape}"
            )
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim != 3 or image.shape[2] not in (1, 3) or image.shape[:2] != mask.shape:
            raise DataError(
                f"{path}: image and mask must be (rows, columns) of one size, the image with 3 "
                f"channels or none; got image {image.shape} and mask {mask.shape}"
            )
        # Negated, so that NaN fails too. Fractions up to 1 would come out black.
        if not (image.min() >= 0 and image.max() <= 255) or (
            image.dtype.kind == "f" and 0 < image.max() <= 1
        ):
            raise DataError(f"{path}: intensities must be 0..255, got {image.min()}..{image.max()}")
        if mask.dtype.kind == "u":
            mask = mask.view(f"i{mask.dtype.itemsize}")
        labels, counts = np.unique(mask, return_counts=True)
        if wrong := set(labels.tolist()) - {0, -1, -2}:
            raise DataError(
                f"{path}: mask labels must be 0, -1 (rim) and -2 (cup), got also {sorted(wrong)}"
            )
        if labels.tolist() == [0]:
            raise DataError(f"{path}: the mask is all background ({counts[0]} pixels of 0)")
        image_CS = np.broadcast_to(
            image.transpose(2, 0, 1).astype(np.float32) / 255, (3, *mask.shape)
        )
        mask_S = (-mask.astype(np.int8)).astype(np.uint8)
        return Sample(case.case_id, image_CS, mask_S, case.attributes, (1.0, 1.0))


def _listed(
    root: Path, faults: list[DataError], notes: list[str]
) -> dict[str, tuple[Path, str | None]]:
    """Finds each case's file and official split, by case id."""
    files: dict[str, Path] = {}
    # Unlike rglob, glob follows links to folders, and leaves hidden files such as macOS's out.
    found = glob.glob("**/*.[nN][pP][zZ]", root_dir=root, recursive=True)
    for path in sorted(root / name for name in found):
        if (case_id := nfc(path.stem)) in files:
            faults.append(DataError(f"{path}: {files[case_id]} has the same name"))
        files.setdefault(case_id, path)
    lists = _lists(root)
    if not files:
        raise DataError(f"{root}: no .npz file in it")
    if not lists:
        notes.append("split: no train.txt or test.txt, so split by seed")
        return {case_id: (path, None) for case_id, path in files.items()}
    notes.append(f"split: by {', '.join(map(str, lists.values()))}")
    listed: dict[str, tuple[Path, str | None]] = {}
    for split, text in lists.items():
        lines = text.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            faults.append(DataError(f"{text}: names no file"))
        for name in names:
            # Of a path in Windows' manner too; "data.v1" without a suffix keeps its dot.
            stem = re.sub(r"\.npz$", "", PureWindowsPath(name).name, flags=re.IGNORECASE)
            case_id = nfc(stem)
            if case_id not in files:
                faults.append(DataError(f"{name}: in {text}, but no such file"))
            elif case_id in listed:
                other = lists[str(listed[case_id][1])]
                faults.append(DataError(f"{name}: in {text} and already in {other}"))
            else:
                listed[case_id] = (files[case_id], split)
    if left_out := len(files) - len(listed):
        notes.append(f"{left_out} files are in no list and left out")
    return listed


def _age_groups(
    ages: Mapping[str, float],
    listed: Mapping[str, tuple[Path, str | None]],
    subjects: dict[str, str],
    faults: list[DataError],
    notes: list[str],
) -> dict[str, float]:
    """Finds each age's index of `AGE_GROUPS`, by the unit in which most of the files are.

    A case whose age is in the other unit is a fault, and is taken out of `subjects`.
    """
    known = {case_id: age for case_id, age in ages.items() if age >= 0}
    days = [case_id for case_id, age in known.items() if age > OLDEST]
    in_days = 2 * len(days) > len(known)
    unit, other = ("days", "years") if in_days else ("years", "days")
    for case_id in known:
        if (known[case_id] > OLDEST) != in_days:
            faults.append(
                DataError(
                    f"{listed[case_id][0]}: age {known[case_id]:g} would be in {other}, but "
                    f"the data set's stand in {unit}"
                )
            )
            subjects.pop(case_id)
    if known:
        low, high = min(known.values()), max(known.values())
        notes.append(f"age: in {unit}, {low:g} to {high:g}; groups: {AGE_GROUPS}")
    limit = 60 * (DAYS_A_YEAR if in_days else 1)
    return {case_id: float(age >= limit) for case_id, age in known.items()}


def _lists(root: Path) -> dict[str, Path]:
    """Finds the lists of names by split, in the first folder that has any."""
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
    """Reads the attributes that the file holds (-1 unknown, age as it stands) and its patient.

    The patient is None where the file has no such member.

    Raises:
        DataError: the file is damaged, or one of them is not what it may be.
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
                    f"{path}: {name} must be one number, got {array.dtype} {array.shape}"
                )
            value = float(array.item())
            n_codes = np.inf if name == "age" else len(CODED[name][1])
            if np.isnan(value):
                value = UNKNOWN
            elif value != UNKNOWN and not (
                0 <= value < n_codes and (name == "age" or value == int(value))
            ):
                codes = "0 or more" if name == "age" else f"0..{len(CODED[name][1]) - 1}"
                raise DataError(f"{path}: {name} must be {codes} or -1 (unknown), got {value:g}")
            values[name] = value
        if "pid" in members.files:
            array = _member(path, members, ("pid",))
            if array.size != 1:
                raise DataError(f"{path}: pid must be one value, got {array.dtype} {array.shape}")
            patient = nfc(str(array.item()).strip())
    return values, patient


def _opened(path: Path) -> np.lib.npyio.NpzFile:
    """Opens a file, or raises a `DataError` that says why it cannot be read."""
    with reading(path, "not a readable .npz file", "copy or download it again"):
        opened = np.load(path, allow_pickle=False)
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: not an .npz file but a single array")
    return opened


def _members(path: Path) -> list[str]:
    """Lists what a file holds."""
    with _opened(path) as members:
        return members.files


def _member(path: Path, members: np.lib.npyio.NpzFile, aliases: tuple[str, ...]) -> np.ndarray:
    """Reads the first of `aliases` that the file has.

    Raises:
        DataError: it has none, or it is damaged or holds Python objects.
    """
    name = next((alias for alias in aliases if alias in members.files), None)
    if name is None:
        raise DataError(f"{path}: no {' or '.join(aliases)} in it, only {', '.join(members.files)}")
    with reading(path, f"{name} cannot be read", "copy or download the file again"):
        try:
            array = members[name]
        except ValueError as error:
            if "allow_pickle" in str(error):
                raise _pickled(path, name) from error
            raise
        if not isinstance(array, np.ndarray):  # numpy hands out as bytes what is no array
            raise ValueError("no array")
    return array


def _pickled(path: Path, name: str) -> DataError:
    """Says how a member of Python objects can be read all the same."""
    return DataError(
        f"{path}: {name} holds Python objects, which only unpickling could read, and that runs "
        "whatever code the file carries. If you trust its source, convert it once:\n"
        f"  old = dict(numpy.load({str(path)!r}, allow_pickle=True))\n"
        f"  old[{name!r}] = numpy.array(old[{name!r}].tolist())\n"
        f"  numpy.savez_compressed({str(path)!r}, **old)"
    )
