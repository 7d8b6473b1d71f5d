"""Reads a whole data set before anyone trains on it, and says what is wrong with which file."""

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
from .folds import COUNT
from .splits import absent_values, choose_splits, leaked_subjects, read_folds

# Threads; decoding leaves Python's lock alone. Each may hold a volume, of up to a gigabyte or two.
WORKERS = {2: 8, 3: 2}  # by the image's axes
NAMED = 10  # cases of a warning; of errors, all are named


def check(settings: DataSettings, console: Console | None = None) -> int:
    """Prints counts, warnings and errors; errors name every bad file.

    Errors: files that are missing or cannot be read, masks of labels out of range, of background
    alone (but in a folder) or of another size than their image, volumes with NaN voxels or whose
    label lies elsewhere, attributes that are missing or no known value, subjects in several splits.
    Warnings: unknown attributes, masks that lack a class, images of one intensity, odd headers. It
    also says which texts were taken for unknown or for one value, and how intensities are scaled.
    Without attributes named, all that the files hold are looked at.

    Returns:
        1 if there is an error, else 0: the exit code of the command.
    """
    console = console or Console()
    # File names are printed as they are: neither wrapped, nor coloured, nor read as markup.
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
            if ids:  # there are none among cases that are to be predicted alone
                warnings += [
                    f"warning: {value}: no {called} case" for value in absent_values(dataset, ids)
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
    """Finds each case's split: by the file or by seed, or the data set's own where those fail.

    Returns:
        The splits, and where they come from; empty where they are the data set's own or the file's.
    """
    official = {case.case_id: case.split for case in dataset.cases}
    if not any(case.labelled for case in dataset.cases):
        return official, ""  # to be predicted alone
    try:
        if settings.splits is None and (leaks := leaked_subjects(official, dataset)):
            errors.extend(map(DataError, leaks))
            return official, ""
        splits = choose_splits(
            dataset, settings.splits, settings.split_seed, settings.fold, settings.folds
        )
    except DataError as error:
        # Too few cases to draw from are a consequence where some were left out, as damaged.
        asked = (settings.splits, dataset.folds, settings.fold, settings.folds)
        if not dataset.left_out or asked != (None,) * 4:
            errors.append(error)
        return official, ""
    split_of = {case_id: split for split in SPLITS for case_id in getattr(splits, split)}
    return split_of, _source(dataset, settings, split_of.values())


def _source(dataset: Dataset, settings: DataSettings, made: Collection[str]) -> str:
    """Says where the splits come from, unless they are the data set's own or the file's.

    Args:
        dataset, settings: of which the splits are.
        made: the split of each case that has one.
    """
    fold, file = settings.fold, settings.splits or dataset.folds
    if fold == "all":
        return "every case with a mask but the test cases is trained on (--fold all), none held out"
    n_folds, origin = len(read_folds(file)) if file else 0, f"of {file}"
    if not file and fold is not None:
        n_folds = settings.folds or COUNT
        origin = (
            "made by subject, stratified by the default attribute, by --split-seed "
            f"{settings.split_seed} the same on every machine"
        )
    if n_folds:
        return (
            f"fold {fold or 0} of 0 to {n_folds - 1} (--fold) {origin}; its val is the "
            "validation split"
        )
    own = {case.split for case in dataset.cases}
    drawn = [split for split in SPLITS if split not in own and split in made]
    if file or not drawn:
        return ""
    return f"{' and '.join(drawn)} drawn by seed {settings.split_seed} from the rest"


def _read_all(dataset: Dataset, errors: list[DataError], console: Console) -> list[str]:
    """Reads every case; errors are added, warnings returned."""
    warned: dict[str, list[str]] = {}
    with ThreadPoolExecutor(WORKERS[dataset.axes]) as pool:
        results = pool.map(partial(_oddities, dataset), dataset.cases)
        for case, found in zip(
            dataset.cases,
            track(results, "reading", total=len(dataset.cases), console=console, transient=True),
            strict=True,
        ):
            if isinstance(found, DataError):
                errors.append(found)
                continue
            for what in found:
                warned.setdefault(what, []).append(case.case_id)
    for index, attribute in enumerate(dataset.attributes):
        unknown = [c.case_id for c in dataset.cases if c.attributes[index] == UNKNOWN]
        if unknown:
            warned[f"{attribute.name} unknown"] = unknown
    return [
        f"warning: {what}: {len(ids)} cases: {shown(ids, NAMED)}" for what, ids in warned.items()
    ]


def _oddities(dataset: Dataset, case: Case) -> list[str] | DataError:
    """Reads a case and lists what is odd about it, or returns why it cannot be read."""
    try:
        sample = dataset.load(case)
    except DataError as error:
        return error
    odd = list(sample.remarks)
    if sample.mask_S is not None:
        odd += [
            f"mask without {name}"
            for label, name in enumerate(dataset.classes)
            if not (sample.mask_S == label).any()
        ]
    flat = [c for c, channel_S in enumerate(sample.image_CS) if np.ptp(channel_S) == 0]
    if len(flat) == len(sample.image_CS):
        return [*odd, "image of one intensity"]
    return odd + [f"channel {c:04} of one intensity" for c in flat]


def _counts(dataset: Dataset, split_of: Mapping[str, str | None]) -> list[Table]:
    """Makes a table for each attribute: how many cases each value has in each split."""
    tables = []
    for index, attribute in enumerate(dataset.attributes):
        counts = Counter(
            (
                case.attributes[index],
                split_of.get(case.case_id) or ("no split" if case.labelled else "no mask"),
            )
            for case in dataset.cases
        )
        # Texts of the csv are no markup.
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
