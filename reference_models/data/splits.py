"""Decides which cases are for training, validation and test; the splits are written as json.

A data set's own split is used. Cases that it leaves open are split by a seed: by subject, so that
no patient or lesion is in two splits, and stratified by the data set's default attribute, so that
each of its values has the same share in all splits. That attribute is used whichever attributes a
model receives, so that all models share a split.

nnU-Net's `splits_final.json`, a list of folds, is read too: a fold's `train` is the training split,
its `val` is the validation split, and the test cases are the data set's own, if it has any. Without
such a file `make_folds` makes folds. The fold "all" trains on every case except the test cases, and
has no validation split.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ..errors import DataError, reading, shown
from ..files import write_whole
from .cases import SPLITS, Dataset
from .folds import COUNT, draw_subjects, make_folds
from .table import nfc

FOLDS = "splits_final.json"  # nnU-Net's name for it
Fold: TypeAlias = int | Literal["all"]

VALIDATION_SHARE = 0.1  # of the training cases
TEST_SHARE = 0.2  # of all cases, if the data set names no test cases


@dataclass(frozen=True)
class Splits:
    """The case ids of each split, with the data set and the seed.

    Args:
        dataset: the data set's name.
        seed: the seed that split the cases which the data set left open.
        train, validation, test: case ids, in the data set's order.
    """

    dataset: str
    seed: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def make_splits(dataset: Dataset, seed: int) -> Splits:
    """Makes splits: the data set's own if it has them, and the rest by the seed.

    If the data set has no test cases, a fifth of the training cases become test cases. If it has no
    validation cases, a tenth of the remaining ones become validation cases. Cases without a mask
    are in no split.

    Raises:
        DataError: a subject lies in two of the data set's own splits, or there are too few
            subjects.
    """
    _require_apart(dataset)
    chosen: dict[str, str] = {}
    pool = []
    labelled = [case for case in dataset.cases if case.labelled]
    for case in labelled:
        if case.split in ("validation", "test"):
            chosen[case.case_id] = case.split
        else:
            pool.append(case)
    if seed < 0:
        raise DataError(f"split_seed: got {seed}, expected 0 or more")
    rng = np.random.default_rng([seed, *(dataset.former_name or dataset.name).encode()])
    for split, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if split not in chosen.values():
            taken = draw_subjects(pool, share, rng)
            chosen |= {case.case_id: split for case in pool if case.subject in taken}
            pool = [case for case in pool if case.subject not in taken]
    members = {
        split: tuple(
            case.case_id for case in labelled if chosen.get(case.case_id, "train") == split
        )
        for split in SPLITS
    }
    if empty := [split for split, ids in members.items() if not ids]:
        raise DataError(
            f"{dataset.name}: there are {len(labelled)} cases with a mask, of "
            f"{len({case.subject for case in labelled})} subjects, which are too few: none is left "
            f"for {' and '.join(empty)}"
        )
    return Splits(dataset.name, seed, **members)


def _require_apart(dataset: Dataset) -> None:
    """Raises if a subject is in several of the data set's own splits.

    Raises:
        DataError: a subject is.
    """
    if leaks := leaked_subjects({case.case_id: case.split for case in dataset.cases}, dataset):
        raise DataError(
            f"{dataset.name}: {leaks[0]}"
            + (f" ({len(leaks)} subjects do)" if leaks[1:] else "")
            + "; put all cases of a subject into one split, or name another split by --splits"
        )  # fmt: skip


def leaked_subjects(split_of: Mapping[str, str | None], dataset: Dataset) -> list[str]:
    """Gives a sentence on each subject whose cases lie in several splits; None is no split."""
    placed: dict[str, dict[str, str]] = {}
    for case in dataset.cases:
        if split := split_of.get(case.case_id):
            placed.setdefault(case.subject, {}).setdefault(split, case.case_id)
    return [
        f"the subject {subject} lies in several splits: "
        + ", ".join(f"{case_id} in {split}" for split, case_id in where.items())
        for subject, where in placed.items()
        if len(where) > 1
    ]


def absent_values(dataset: Dataset, case_ids: Collection[str]) -> list[str]:
    """Lists the values, such as "race White", that cases of the data set have but none of these
    has.

    If these are the training cases, the router has learned nothing about the listed values.
    """
    present = [case.attributes for case in dataset.cases if case.case_id in case_ids]
    return [
        f"{attribute.name} {attribute.label(value)}"
        for place, attribute in enumerate(dataset.attributes)
        for value in sorted(
            {case.attributes[place] for case in dataset.cases}
            - {values[place] for values in present}
        )
    ]


def describe_unused(dataset: Dataset, splits: Splits) -> str:
    """Says how many cases with a mask are in no split; an empty text if all are in one.

    Example:
        >>> from reference_models.data.phantom import Phantom, PhantomSettings
        >>> phantom = Phantom(PhantomSettings(cases=10, test_cases_per_group=1))
        >>> few = Splits("phantom", 0, ("phantom00000",), ("phantom00001",), ("phantom00002",))
        >>> describe_unused(phantom, few)[:61]
        '10 of 13 cases with a mask are in no split and are not used: '
    """
    used = {*splits.train, *splits.validation, *splits.test}
    labelled = [case.case_id for case in dataset.cases if case.labelled]
    if not (unused := [case_id for case_id in labelled if case_id not in used]):
        return ""
    return (
        f"{len(unused)} of {len(labelled)} cases with a mask are in no split and are not used: "
        f"{shown(unused, 5)}"
    )


def write_splits(path: Path, splits: Splits) -> None:
    """Writes splits as json, completely or not at all."""
    text = json.dumps(asdict(splits), indent=1) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def choose_splits(
    dataset: Dataset,
    path: Path | None,
    seed: int,
    fold: Fold | None = None,
    folds: int | None = None,
    needed: Collection[str] | None = None,
) -> Splits:
    """Reads the splits of a file, or of the folds beside the cases, or else makes them by the seed.

    Args:
        dataset: the data set.
        path: a splits file, or a file of folds; None if no file is named.
        seed: the seed of the cases and folds that are drawn.
        fold: the number of the fold. None: the first fold of the file; without a file, a split and
            no fold.
        folds: number of folds to make if no file has folds; `COUNT` by default.
        needed: as for `read_splits`.

    Raises:
        DataError: there is no such fold, two of the arguments contradict each other, or
            `read_splits` or `make_splits` raises it.
    """
    if fold == "all":
        if path is not None:
            raise DataError(
                f"fold: got all, which trains on every case, so that {path} would not be used; "
                "leave --splits or --fold out"
            )
        return _all_trained(dataset, seed)
    if found := path or dataset.folds:
        _require_none_made(found, folds)
        return read_splits(found, dataset, fold, needed)
    if fold is None:
        if folds is not None:
            raise DataError(
                f"folds: got {folds}, but no fold was chosen; choose one by --fold, or leave "
                "--folds out"
            )
        return make_splits(dataset, seed)
    made = choose_folds(dataset, None, seed, folds)
    if not 0 <= fold < len(made):
        raise DataError(
            f"fold: got {fold}, but there are {len(made)} folds (--folds), 0 to {len(made) - 1}"
        )
    return made[fold]


def choose_folds(
    dataset: Dataset, path: Path | None, seed: int, folds: int | None = None
) -> tuple[Splits, ...]:
    """Reads every fold of a file, or of the file beside the cases, or else makes folds by the seed.

    Raises:
        DataError: the file has no folds, `folds` is given although there is a file, or
            `read_splits` or `make_folds` raises it.
    """
    if found := path or dataset.folds:
        _require_none_made(found, folds)
        return tuple(
            read_splits(found, dataset, fold) for fold in range(max(len(read_folds(found)), 1))
        )
    everything = _all_trained(dataset, seed)
    return tuple(
        replace(
            everything,
            train=tuple(case_id for case_id in everything.train if case_id not in held_out),
            validation=tuple(case_id for case_id in everything.train if case_id in held_out),
        )
        for held_out in make_folds(dataset, COUNT if folds is None else folds, seed)
    )


def write_folds(path: Path, folds: Sequence[Splits]) -> None:
    """Writes folds in nnU-Net's format, completely or not at all."""
    content = [{"train": fold.train, "val": fold.validation} for fold in folds]
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def _require_none_made(path: Path, folds: int | None) -> None:
    """Raises a DataError if folds should be made although a file has them."""
    if folds is not None:
        raise DataError(f"folds: got {folds}, but the folds of {path} are used; leave --folds out")


def _all_trained(dataset: Dataset, seed: int) -> Splits:
    """Makes splits that hold no case out: every case with a mask is a training or a test case."""
    _require_apart(dataset)
    labelled = [case for case in dataset.cases if case.labelled]
    if not (train := tuple(case.case_id for case in labelled if case.split != "test")):
        raise DataError(
            f"{dataset.name}: no case can be trained on, since none with a mask is not a test case"
        )
    test = tuple(case.case_id for case in labelled if case.split == "test")
    return Splits(dataset.name, seed, train, (), test)


def read_splits(
    path: Path,
    dataset: Dataset,
    fold: int | None = None,
    needed: Collection[str] | None = None,
) -> Splits:
    """Reads a file of `write_splits`, or a fold of nnU-Net's file; cases not named are left out.

    Args:
        path: the file.
        dataset: the data set whose cases it names.
        fold: the number of nnU-Net's fold; None: the first.
        needed: the splits that must have a case. None: all splits, but a fold needs no test case.

    Raises:
        DataError: the file cannot be read, belongs to another data set or has no such fold; it
            names a case that the data set lacks, that has no mask, or twice; it puts a subject into
            several splits, contradicts the data set's own split, or leaves a split empty.
    """
    with reading(
        path,
        "not a splits file",
        f"expected json with dataset, seed, {', '.join(SPLITS)}, or nnU-Net's {FOLDS}",
    ):
        content = json.loads(path.read_bytes())
        folds = _folds(content)
        if isinstance(content, list) and not folds:
            raise ValueError("a list, but not of folds with train and val")
        if not folds:
            splits = Splits(
                dataset=str(content["dataset"]),
                seed=int(content["seed"]),
                **{split: _case_ids(content[split], dataset) for split in SPLITS},
            )
    if folds:
        if not 0 <= (number := fold or 0) < len(folds):
            raise DataError(f"fold: got {fold}, but {path} has the folds 0 to {len(folds) - 1}")
        splits = _splits_of_fold(path, folds[number], dataset)
        needed = ("train", "validation") if needed is None else needed
    elif fold is not None:
        raise DataError(
            f"fold: got {fold}, but {path} holds one split and no folds; leave --fold out"
        )
    if splits.dataset not in (dataset.name, dataset.former_name):
        raise DataError(
            f"{path}: these are splits of {splits.dataset}, but the data set is {dataset.name}; "
            "name another file by --splits"
        )
    named = Counter(case_id for split in SPLITS for case_id in getattr(splits, split))
    known = {case.case_id: case.labelled for case in dataset.cases}
    for wrong, what in (
        ([case_id for case_id in named if case_id not in known], "not in the data set"),
        ([case_id for case_id in named if not known.get(case_id, True)], "without a mask"),
        ([case_id for case_id, times in named.items() if times > 1], "named more than once"),
        (
            [s for s in (SPLITS if needed is None else needed) if not getattr(splits, s)],
            "without a case",
        ),
    ):
        if wrong:
            advice = (
                "; folds name no test cases: score every case by --split all, or the validation "
                "cases of a fold by --split validation --fold <number>"
            )
            of_folds = bool(folds) and wrong == ["test"]
            raise DataError(f"{path}: {shown(wrong, 5)}: {what}{advice * of_folds}")
    split_of = {case_id: split for split in SPLITS for case_id in getattr(splits, split)}
    if leaks := leaked_subjects(split_of, dataset):
        raise DataError(
            f"{path}: {leaks[0]} ({len(leaks)} subjects do); put all cases of a subject into one "
            "split"
        )
    return splits


def read_folds(path: Path) -> list[dict[str, list[str]]]:
    """Reads the folds of a file; there are none if it is a file of `write_splits`, or damaged."""
    try:
        return _folds(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return []


def _folds(content: Any) -> list[dict[str, list[str]]]:
    """Gives nnU-Net's folds if the content of a json file is a list of folds, else none."""
    if not isinstance(content, list) or not all(
        isinstance(fold, dict)
        and all(isinstance(fold.get(part), list) for part in ("train", "val"))
        for fold in content
    ):
        return []
    return content


def _case_ids(names: Collection[Any], dataset: Dataset) -> tuple[str, ...]:
    """Reads case ids, without those of cases that are known to be damaged."""
    ids = (nfc(str(name)) for name in names)
    return tuple(case_id for case_id in ids if case_id not in dataset.left_out)


def _splits_of_fold(path: Path, fold: Mapping[str, Sequence[str]], dataset: Dataset) -> Splits:
    """Makes splits from one of nnU-Net's folds.

    Raises:
        DataError: the data set itself gives another split to a case of the fold.
    """
    parts = {"train": _case_ids(fold["train"], dataset)}
    parts["validation"] = _case_ids(fold["val"], dataset)
    own = {case.case_id: case.split for case in dataset.cases if case.split}
    for split, ids in parts.items():
        if contrary := [i for i in ids if own.get(i, split) != split]:
            raise DataError(
                f"{path}: the fold has {shown(contrary, 5)} in {split}, but by its folder or the "
                f"column split of the csv {contrary[0]} is in {own[contrary[0]]}; empty the "
                "column, or leave the file out: --fold then makes folds of the training and "
                "validation cases, the same that cross-validate makes"
            )
    test = (case.case_id for case in dataset.cases if case.split == "test" and case.labelled)
    return Splits(dataset.name, 0, **parts, test=tuple(test))
