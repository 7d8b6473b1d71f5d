"""The command `check`: reads every file of a data set and says what is wrong with which file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..errors import DataError, shown
from .cases import SPLITS, UNKNOWN, Case, Dataset
from .datasets import DataSettings, open_dataset
from .folder import WhiteMaskError
from .folds import COUNT
from .splits import absent_values, choose_splits, describe_unused, leaked_subjects, read_folds

# Number of threads by an image's axes. Decoding releases Python's lock. Each thread may hold a
# volume, which takes up to one or two gigabytes.
WORKERS = {2: 8, 3: 2}
NAMED = 10  # cases that a warning names; errors name all


def check(settings: DataSettings, console: Console | None = None) -> int:
    """Prints the number of cases of each group, warnings, and an error for every bad file.

    Errors are files that are missing or cannot be read, masks with labels out of range or of
    another size than their image, masks of background alone (except in a folder), volumes with NaN
    or with a mask on another grid, attributes that are missing or have a value that is not allowed,
    and subjects in several splits. Warnings are unknown attributes, masks that lack a class, images
    of one intensity and odd headers. Remarks say which texts count as unknown or as one value, and
    how intensities are scaled. All attributes in the files are checked unless `settings` names
    some.

    Returns:
        The exit code of the command: 1 if there is an error, else 0.
    """
    console = console or Console()
    # File names are printed as they are: not wrapped, not coloured, and not read as markup.
    say = partial(console.print, soft_wrap=True, markup=False, highlight=False)
    errors: list[DataError] = []
    try:
        dataset = open_dataset(settings, damaged=errors)
    except DataError as fatal:
        errors.append(fatal)
    else:
        split_of, source = _splits(dataset, settings, errors)
        warnings = _read_all(dataset, errors, console)
        for table in _counts(dataset, split_of):
            console.print(table)
        if source:
            say(f"split: {source}")
        for split, called in zip(SPLITS, ("training", "validation", "test"), strict=True):
            ids = {case_id for case_id, placed in split_of.items() if placed == split}
            if ids:  # cases that can only be predicted are in no split
                warnings += [
                    f"warning: {value}: there is no {called} case"
                    for value in absent_values(dataset, ids)
                ]
        for line in (*dataset.notes, *warnings):
            say(line)
    for error in errors:
        say(f"error: {error}")
    say(f"{settings.data}: {len(errors) or 'no'} error{'s' * (len(errors) != 1)}")
    return 1 if errors else 0


def _splits(
    dataset: Dataset, settings: DataSettings, errors: list[DataError]
) -> tuple[Mapping[str, str | None], str]:
    """Finds the split of each case as a run would choose it, or else the data set's own split.

    Returns:
        The split of each case, and a text on where the splits come from and which cases they leave
        out. The text is empty if they are the data set's own or those of a splits file, and leave
        out none.
    """
    official = {case.case_id: case.split for case in dataset.cases}
    if not any(case.labelled for case in dataset.cases):
        return official, ""  # they can only be predicted
    try:
        if settings.splits is None and (leaks := leaked_subjects(official, dataset)):
            errors.extend(map(DataError, leaks))
            return official, ""
        splits = choose_splits(
            dataset, settings.splits, settings.split_seed, settings.fold, settings.folds
        )
    except DataError as error:
        # Damaged cases were left out and are reported; that too few remain is a consequence.
        asked = (settings.splits, dataset.folds, settings.fold, settings.folds)
        if not dataset.left_out or asked != (None,) * 4:
            errors.append(error)
        return official, ""
    split_of = {case_id: split for split in SPLITS for case_id in getattr(splits, split)}
    said = (_source(dataset, settings, split_of.values()), describe_unused(dataset, splits))
    return split_of, "; ".join(filter(None, said))


def _source(dataset: Dataset, settings: DataSettings, made: Collection[str]) -> str:
    """Says where the splits come from, unless they are the data set's own or those of a file.

    Args:
        dataset, settings: the data set and its settings.
        made: the split of each case that has one.
    """
    fold, file = settings.fold, settings.splits or dataset.folds
    if fold == "all":
        return (
            "--fold all: every case with a mask is a training case, except the test cases; no case "
            "is held out"
        )
    n_folds, origin = len(read_folds(file)) if file else 0, f"of {file}"
    if not file and fold is not None:
        n_folds = settings.folds or COUNT
        origin = (
            "made by subject and stratified by the default attribute, with --split-seed "
            f"{settings.split_seed}; they are the same on every machine"
        )
    if n_folds:
        return (
            f"fold {fold or 0} of the folds 0 to {n_folds - 1} (--fold), {origin}; the cases that "
            "it holds out are the validation split"
        )
    own = {case.split for case in dataset.cases}
    drawn = [split for split in SPLITS if split not in own and split in made]
    if file or not drawn:
        return ""
    return (
        f"{' and '.join(drawn)} cases were drawn from the rest with --split-seed "
        f"{settings.split_seed}"
    )


def _read_all(dataset: Dataset, errors: list[DataError], console: Console) -> list[str]:
    """Reads every case, adds errors to the list, and returns warnings."""
    warned: dict[str, list[str]] = {}
    white: list[WhiteMaskError] = []
    with ThreadPoolExecutor(WORKERS[dataset.axes]) as pool:
        results = pool.map(partial(_oddities, dataset), dataset.cases)
        for case, found in zip(
            dataset.cases,
            track(results, "reading", total=len(dataset.cases), console=console, transient=True),
            strict=True,
        ):
            if isinstance(found, WhiteMaskError):
                white.append(found)
                continue
            if isinstance(found, DataError):
                errors.append(found)
                continue
            for what in found:
                warned.setdefault(what, []).append(case.case_id)
    if white:  # a mistake that usually runs through a whole folder
        first, *others = white
        errors.append(WhiteMaskError(first.path, first.strange, [error.path for error in others]))
    for index, attribute in enumerate(dataset.attributes):
        unknown = [c.case_id for c in dataset.cases if c.attributes[index] == UNKNOWN]
        if unknown:
            warned[f"{attribute.name} is unknown"] = unknown
    return [
        f"warning: {what}: {len(ids)} cases: {shown(ids, NAMED)}" for what, ids in warned.items()
    ]


def _oddities(dataset: Dataset, case: Case) -> list[str] | DataError:
    """Reads a case and lists its oddities, or returns the error that says why it cannot be read."""
    try:
        sample = dataset.load(case)
    except DataError as error:
        return error
    odd = list(sample.remarks)
    if sample.mask_S is not None:
        odd += [
            f"the mask has no {name}"
            for label, name in enumerate(dataset.classes)
            if not (sample.mask_S == label).any()
        ]
    flat = [c for c, channel_S in enumerate(sample.image_CS) if np.ptp(channel_S) == 0]
    if len(flat) == len(sample.image_CS):
        return [*odd, "the image has a single intensity"]
    return odd + [f"channel {c:04} has a single intensity" for c in flat]


def _counts(dataset: Dataset, split_of: Mapping[str, str | None]) -> list[Table]:
    """Makes a table for each attribute, with the number of cases of each value in each split."""
    tables = []
    for index, attribute in enumerate(dataset.attributes):
        counts = Counter(
            (
                case.attributes[index],
                split_of.get(case.case_id) or ("no split" if case.labelled else "no mask"),
            )
            for case in dataset.cases
        )
        # Texts of the csv must not be read as markup.
        table = Table(title=Text(f"{dataset.name}: cases by {attribute.name}"))
        table.add_column(Text(attribute.name))
        found = {split for _, split in counts}
        columns = [*SPLITS, *(split for split in ("no split", "no mask") if split in found)]
        for split in columns:
            table.add_column(split, justify="right")
        for value in (*range(len(attribute.values)), UNKNOWN):
            label = Text(attribute.label(value))
            table.add_row(label, *(str(counts[value, s]) for s in columns))
        tables.append(table)
    return tables
