"""Decides which case is trained, validated and tested on: once, by a seed, kept as json.

A data set's own split is kept. What it leaves open is split by subject, so that no patient or
lesion lies on both sides, and stratified by the data set's default attribute, so that each of its
values keeps its share: by that one whichever attributes a model is told, so that all models share
a split.

nnU-Net's `splits_final.json`, a list of folds, is read too: a fold's `train` is the training split,
its `val` the validation split, and test cases are the data set's own, if it has any. Without such a
file folds are made, as of `make_folds`. The fold "all" trains on every case but the test cases, and
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

FOLDS = "splits_final.json"  # as nnU-Net calls it
Fold: TypeAlias = int | Literal["all"]

VALIDATION_SHARE = 0.1  # of the training cases
TEST_SHARE = 0.2  # of all cases, where the data set names no test cases


@dataclass(frozen=True)
class Splits:
    """Case ids by split, and what they were made from and by.

    Args:
        dataset: the data set's name.
        seed: by which the cases were split that the data set left open.
        train, validation, test: case ids in the data set's order.
    """

    dataset: str
    seed: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def make_splits(dataset: Dataset, seed: int) -> Splits:
    """Makes splits: the data set's own where it has one, the rest by seed.

    Without test cases of the data set's own, a fifth of the open and training cases are made so;
    without validation cases, a tenth of what is then left. Cases without a mask are in no split.

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
        raise DataError(f"the split's seed must be 0 or more, got {seed}")
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
            f"{dataset.name}: {len(labelled)} cases with a mask of "
            f"{len({case.subject for case in labelled})} subjects leave nothing for "
            f"{' and '.join(empty)}"
        )
    return Splits(dataset.name, seed, **members)


def _require_apart(dataset: Dataset) -> None:
    """Raises where the data set's own splits share a subject.

    Raises:
        DataError: they do.
    """
    if leaks := leaked_subjects({case.case_id: case.split for case in dataset.cases}, dataset):
        raise DataError(
            f"{dataset.name}: {leaks[0]}" + (f" ({len(leaks)} such subjects)" if leaks[1:] else "")
            + "; put each subject's cases into one split, by lists or a splits file"
        )  # fmt: skip


def leaked_subjects(split_of: Mapping[str, str | None], dataset: Dataset) -> list[str]:
    """Says of each subject whose cases lie in several splits which they are; None is no split."""
    placed: dict[str, dict[str, str]] = {}
    for case in dataset.cases:
        if split := split_of.get(case.case_id):
            placed.setdefault(case.subject, {}).setdefault(split, case.case_id)
    return [
        f"subject {subject} lies in several splits: "
        + ", ".join(f"{case_id} in {split}" for split, case_id in where.items())
        for subject, where in placed.items()
        if len(where) > 1
    ]


def absent_values(dataset: Dataset, case_ids: Collection[str]) -> list[str]:
    """Lists the attribute values, as in "race White", that cases have but none of these has.

    Of training cases: a router that knows the attribute has learned nothing of them.
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


def write_splits(path: Path, splits: Splits) -> None:
    """Writes splits as json, whole or not at all."""
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
    """Reads the file's splits, or those of the folds beside the cases, else makes them by seed.

    Args:
        dataset: whose cases.
        path: of a splits file, or of folds.
        seed: of what is drawn.
        fold: which fold; of those that are made where no file has any. None: the file's first, and
            without a file no fold but a split.
        folds: how many folds are made, `COUNT` by default.
        needed: as of `read_splits`.

    Raises:
        DataError: there is no such fold, or two of the settings contradict each other; as of
            `read_splits` and `make_splits`.
    """
    if fold == "all":
        if path is not None:
            raise DataError(
                f"fold: all trains on every case, so that {path} would change nothing; leave "
                "--splits or --fold out"
            )
        return _all_trained(dataset, seed)
    if found := path or dataset.folds:
        _require_none_made(found, folds)
        return read_splits(found, dataset, fold, needed)
    if fold is None:
        if folds is not None:
            raise DataError(
                f"folds: got {folds}, but the cases are split once; choose a fold by --fold"
            )
        return make_splits(dataset, seed)
    made = choose_folds(dataset, None, seed, folds)
    if not 0 <= fold < len(made):
        raise DataError(
            f"fold: got {fold}, but {len(made)} folds are made (--folds), 0 to {len(made) - 1}"
        )
    return made[fold]


def choose_folds(
    dataset: Dataset, path: Path | None, seed: int, folds: int | None = None
) -> tuple[Splits, ...]:
    """Gives every fold of the file, or of the one beside the cases, else makes them by seed.

    Raises:
        DataError: the file has no folds, or `folds` is given beside one; as of `read_splits` and
            `make_folds`.
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
    """Writes folds as nnU-Net does, whole or not at all."""
    content = [{"train": fold.train, "val": fold.validation} for fold in folds]
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))


def _require_none_made(path: Path, folds: int | None) -> None:
    """Raises where folds are to be made though a file has them."""
    if folds is not None:
        raise DataError(f"folds: got {folds}, but the folds are those of {path}; leave it out")


def _all_trained(dataset: Dataset, seed: int) -> Splits:
    """Splits without a held-out case: every case that has a mask is trained on, or a test case."""
    _require_apart(dataset)
    labelled = [case for case in dataset.cases if case.labelled]
    if not (train := tuple(case.case_id for case in labelled if case.split != "test")):
        raise DataError(f"{dataset.name}: no case with a mask is left to train on")
    test = tuple(case.case_id for case in labelled if case.split == "test")
    return Splits(dataset.name, seed, train, (), test)


def read_splits(
    path: Path,
    dataset: Dataset,
    fold: int | None = None,
    needed: Collection[str] | None = None,
) -> Splits:
    """Reads what `write_splits` wrote, or a fold of nnU-Net's; cases not named are left out.

    Args:
        path: of the file.
        dataset: whose cases it names.
        fold: which of nnU-Net's folds; None: the first.
        needed: the splits that must have a case. None: all, but a fold needs no test case.

    Raises:
        DataError: the file cannot be read, is of another data set, has no such fold, names a case
            that the data set lacks or that has no mask, or one case twice, spreads a subject over
            splits, contradicts the data set's own split, or leaves a split empty.
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
            raise DataError(f"fold: got {fold}, but {path} has 0 to {len(folds) - 1}")
        splits = _splits_of_fold(path, folds[number], dataset)
        needed = ("train", "validation") if needed is None else needed
    elif fold is not None:
        raise DataError(f"fold: got {fold}, but {path} is one split and not a list of folds")
    if splits.dataset not in (dataset.name, dataset.former_name):
        raise DataError(f"{path}: splits of {splits.dataset}, but the data set is {dataset.name}")
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
                "; folds name no test case: score every case by --split all, or a fold's "
                "validation cases by --split validation --fold <number>"
            )
            of_folds = bool(folds) and wrong == ["test"]
            raise DataError(f"{path}: {shown(wrong, 5)}: {what}{advice * of_folds}")
    split_of = {case_id: split for split in SPLITS for case_id in getattr(splits, split)}
    if leaks := leaked_subjects(split_of, dataset):
        raise DataError(f"{path}: {leaks[0]} ({len(leaks)} such subjects)")
    return splits


def read_folds(path: Path) -> list[dict[str, list[str]]]:
    """Reads a file's folds as they stand; none where it is a splits file of ours, or damaged."""
    try:
        return _folds(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return []


def _folds(content: Any) -> list[dict[str, list[str]]]:
    """Gives nnU-Net's folds, if the content of a json file is a list of such."""
    if not isinstance(content, list) or not all(
        isinstance(fold, dict)
        and all(isinstance(fold.get(part), list) for part in ("train", "val"))
        for fold in content
    ):
        return []
    return content


def _case_ids(names: Collection[Any], dataset: Dataset) -> tuple[str, ...]:
    """Reads case ids, leaving out those of cases that are known to be damaged."""
    ids = (nfc(str(name)) for name in names)
    return tuple(case_id for case_id in ids if case_id not in dataset.left_out)


def _splits_of_fold(path: Path, fold: Mapping[str, Sequence[str]], dataset: Dataset) -> Splits:
    """Makes splits of one of nnU-Net's folds.

    Raises:
        DataError: a case of the fold has another split by the data set itself.
    """
    parts = {"train": _case_ids(fold["train"], dataset)}
    parts["validation"] = _case_ids(fold["val"], dataset)
    own = {case.case_id: case.split for case in dataset.cases if case.split}
    for split, ids in parts.items():
        if contrary := [i for i in ids if own.get(i, split) != split]:
            raise DataError(
                f"{path}: the fold has {shown(contrary, 5)} in {split}, but by its folder or the "
                f"csv's column split {contrary[0]} is in {own[contrary[0]]}; leave the column or "
                "the file out"
            )
    test = (case.case_id for case in dataset.cases if case.split == "test" and case.labelled)
    return Splits(dataset.name, 0, **parts, test=tuple(test))
