"""Scores a run, or a folder of any tool's masks, and writes what it found.

    cases.csv      a row for each case and region
    summary.json   `scores.Summary`: groups, overall scores, intervals, and wrong attributes
    report.html    the same as a page for the browser
    masks/         for a run: label values at native resolution; of volumes as NIfTI

A run may be several networks that predict together, or a cross-validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from ..data import DataSettings, open_dataset
from ..data.cases import IGNORED, UNKNOWN, Case, Dataset, Sample
from ..errors import DataError, shown
from ..files import write_results
from ..metrics.fairness import SMALL_GROUP
from ..metrics.loads import ExpertLoads, LoadTables
from ..metrics.region import IGNORING, POLICY, RegionScore, score_region
from ..metrics.scores import Condition, RegionScores, Summary
from ..report.page import write_report
from ..report.pictures import Picture, pictures_wanted
from .conditions import AS_GIVEN, attributes_told, joined, left_out_note
from .inference import predictions
from .masks import assign_masks, choose_cases, find_masks, read_mask, write_mask
from .summary import (
    case_scores,
    comparisons,
    population_shares,
    region_scores,
    write_cases,
    write_summary,
)
from .trained_run import RunSettings, open_run

CONTENTS = ("cases.csv", "summary.json", "report.html")
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Scoring:
    """How masks are scored."""

    tolerance: float = 2.0
    """Tolerance of the surface Dice, in the data's unit
    (mm, or pixels where the files do not say). Set it
    to the distance between the outlines of two human
    readers, if you know it."""
    resamples: int = 2000
    """Number of resamples of the bootstrap, and number of shuffles of the group labels."""
    seed: int = 0
    """Seed of the bootstrap, of the shuffles, and of the shuffled and wrong attributes."""


@dataclass(frozen=True)
class EvaluateRun(RunSettings):
    """Scores a trained run, several runs together, or a cross-validation."""

    split: Split = "test"
    """Split whose cases are scored. For a
    cross-validation's folder, validation means all
    cases, each predicted by the fold that it was held
    out from."""
    out: Path | None = None
    """Folder to write to. The default is evaluation-<split> in the run's folder."""
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = field(default_factory=Scoring)

    @property
    def folder(self) -> Path:
        return self.folder_for(self.out, f"evaluation-{self.split}")

    def score(self) -> tuple[Path, Summary]:
        """Runs `evaluate_run`; returns the folder that it wrote, and the summary."""
        return self.folder, evaluate_run(self)


@dataclass(frozen=True)
class EvaluatePredictions:
    """Scores masks that any tool has written.

    The folder has one file for each case. Images are
    `<case id>.png`, .tif or .bmp with 8 bits, grey or
    palette, or `<case id>.npy` with integers. Volumes are
    `<case id>.nii.gz`, .nii, .mha or .nrrd on the grid of
    the image. The values are labels, and each mask is as
    large as its image.
    """

    folder: Path
    """Folder of the masks."""
    data: Annotated[DataSettings, tyro.conf.arg(name="")]
    """Data set that the masks belong to."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """Split whose cases are scored. all means every case
    that has a mask in the data, which suits the masks
    of a cross-validation. If the folder has no mask
    of the data set's own test cases, all leaves them
    out."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is not known, as the evaluation of a run may do."""
    out: Path = Path("evaluation")
    """Folder to write to."""
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = field(default_factory=Scoring)

    def score(self) -> tuple[Path, Summary]:
        """Runs `evaluate_predictions`; returns the folder that it wrote, and the summary."""
        return self.out, evaluate_predictions(self)


def evaluate_run(settings: EvaluateRun) -> Summary:
    """Scores a run with the true attributes and, where it uses them, with other attributes.

    Raises:
        DataError, RunError: `open_run` raises it, a case has no mask to be scored by, or `out`
            holds something else. Nothing is written.
    """
    _check(settings.scoring)
    run = open_run(settings, settings.split)
    _require_masks(run.cases, settings.split)
    told, notes = attributes_told(run, settings.scoring.seed)
    # Experts of several networks have nothing in common but their numbers.
    loads = {name: ExpertLoads(run.dataset) for name in told} if len(run.members) == 1 else None
    scored: dict[str, list[list[RegionScore]]] = {condition: [] for condition in told}
    paths: dict[str, Path] = {}

    def write(folder: Path) -> Summary:
        (folder / "masks").mkdir()
        for sample, masks in predictions(run, told, loads):
            for condition, mask in masks.items():
                scored[condition].append(_score(run.dataset, sample, mask, settings.scoring))
            paths[sample.case_id] = write_mask(folder / "masks", sample, masks[AS_GIVEN])
        if run.twin:
            notes[AS_GIVEN] = joined(notes[AS_GIVEN], run.twin.note())
        result = _Evaluation(
            run.dataset,
            run.cases,
            scored,
            notes,
            {name: load.tables() for name, load in (loads or {}).items()},
            {
                case.case_id: panel.fold
                for panel in run.panels
                if panel.fold is not None
                for case in panel.cases
            },
            run.about,
        )
        source = ", ".join(map(str, settings.named))
        return _write(folder, result, settings, source, paths)

    return write_results(settings.folder, write, (*CONTENTS, "masks"))


def evaluate_predictions(settings: EvaluatePredictions) -> Summary:
    """Scores a folder of masks.

    Raises:
        DataError: the data cannot be read, a case has no mask to be scored by, or masks are
            missing, too many, damaged, of another size or place, or hold other values than labels.
            One error lists all faults, and nothing is written.
    """
    _check(settings.scoring)
    dataset = open_dataset(settings.data)
    masks = find_masks(settings.folder, axes=dataset.axes)
    cases, note = choose_cases(masks, dataset, settings.data, settings.split)
    left_out: tuple[Case, ...] = ()
    if settings.leave_out_unknown:
        left_out = tuple(case for case in cases if UNKNOWN in case.attributes)
        cases = tuple(case for case in cases if case not in left_out)
    _require_masks(cases, settings.split)
    if not cases:
        raise DataError(
            f"{settings.split}: no case is left to be scored; choose another --split, or score the "
            "cases whose attribute is not known, too."
        )
    paths, faults = assign_masks(
        masks,
        [case.case_id for case in cases],
        [case.case_id for case in left_out],
        {case.case_id: case.labelled for case in dataset.cases},
        axes=dataset.axes,
    )

    def write(folder: Path) -> Summary:
        found = [case for case in cases if case.case_id in paths]
        scored, damaged = _score_files(dataset, found, paths, settings.scoring, sound=not faults)
        if faults + damaged:
            raise DataError(
                f"{settings.folder}: cannot be scored as masks of the {settings.split} split of "
                f"{dataset.name}:\n" + "\n".join(f"- {fault}" for fault in faults + damaged)
            )
        read = "The masks were read from files, so no network was run."
        notes = {AS_GIVEN: joined(read, note, left_out_note(left_out))}
        result = _Evaluation(dataset, cases, {AS_GIVEN: scored}, notes, loads={})
        return _write(folder, result, settings, str(settings.folder), paths)

    return write_results(settings.out, write, CONTENTS)


@dataclass(frozen=True)
class _Evaluation:
    """Holds all that an evaluation's files are written from.

    Args:
        dataset: the data set.
        cases: the cases that were scored.
        scored: for each condition, the scores [case][region].
        notes: a note on every condition; one without scores was not run.
        loads: for each condition, the experts' loads; empty without experts, and for several
            networks.
        folds: for each case id, the fold of a cross-validation that held the case out.
        about: `TrainedRun.about`.
    """

    dataset: Dataset
    cases: tuple[Case, ...]
    scored: Mapping[str, list[list[RegionScore]]]
    notes: Mapping[str, str]
    loads: Mapping[str, LoadTables]
    folds: Mapping[str, int] = field(default_factory=dict)
    about: str = ""


def _score(
    dataset: Dataset, sample: Sample, mask_S: np.ndarray, scoring: Scoring
) -> list[RegionScore]:
    """Scores every region of one case."""
    ignored_S = sample.truth_S == IGNORED
    return [
        score_region(
            np.isin(mask_S, labels),
            np.isin(sample.truth_S, labels),
            spacing=sample.spacing,
            tolerance=scoring.tolerance,
            ignored_S=ignored_S if ignored_S.any() else None,
        )
        for labels in dataset.regions.values()
    ]


def _score_files(
    dataset: Dataset,
    cases: Sequence[Case],
    paths: Mapping[str, Path],
    scoring: Scoring,
    *,
    sound: bool,
) -> tuple[list[list[RegionScore]], list[str]]:
    """Gives the scores [case][region] of masks in files, and a sentence for each damaged file.

    Every file is read, so that one error can name all faults. After a first fault, and where the
    folder is not `sound`, files are read but not scored.
    """
    scored: list[list[RegionScore]] = []
    damaged: list[str] = []
    for case in track(cases, "scoring", console=Console(stderr=True), transient=True):
        sample = dataset.load(case)
        try:
            mask_S = read_mask(paths[case.case_id], sample, dataset.classes)
        except DataError as error:
            damaged.append(str(error))
            continue
        if sound and not damaged:
            scored.append(_score(dataset, sample, mask_S, scoring))
    return scored, damaged


def _write(
    folder: Path,
    result: _Evaluation,
    settings: EvaluateRun | EvaluatePredictions,
    source: str,
    masks: Mapping[str, Path],
) -> Summary:
    """Writes csv, json and page."""
    dataset, scoring = result.dataset, settings.scoring
    conditions = []
    for name, note in result.notes.items():
        scores: dict[str, tuple[RegionScores, ...]] = {}
        if name in result.scored:
            scores = region_scores(
                dataset,
                result.cases,
                result.scored[name],
                resamples=scoring.resamples,
                seed=scoring.seed,
            )
        conditions.append(Condition(name, note, scores, result.loads.get(name, {})))
    summary = Summary(
        dataset=dataset.name,
        split=settings.split,
        source=source,
        n_cases=len(result.cases),
        n_subjects=len({case.subject for case in result.cases}),
        unit=dataset.unit,
        tolerance=scoring.tolerance,
        small_group=SMALL_GROUP,
        resamples=scoring.resamples,
        attributes={attribute.name: attribute.values for attribute in dataset.attributes},
        population=population_shares(dataset, result.cases),
        policy=f"{POLICY} {IGNORING}" if dataset.ignores else POLICY,
        conditions=tuple(conditions),
        about=dataset.about,
        comparisons=comparisons(conditions[0].scores),
        networks=result.about,
    )
    rows = case_scores(dataset, result.cases, result.scored[AS_GIVEN])
    write_cases(folder / "cases.csv", rows, dataset.unit, result.folds)
    write_summary(folder / "summary.json", summary)
    by_id = {case.case_id: case for case in result.cases}
    pictures = {}
    for case_id in pictures_wanted(rows, summary.attributes):
        sample = dataset.load(by_id[case_id])
        mask_S = read_mask(masks[case_id], sample, dataset.classes)
        pictures[case_id] = Picture.of(
            case_id, sample.image_CS, sample.truth_S, mask_S, sample.affine
        )
    write_report(folder / "report.html", summary, rows, pictures, tuple(dataset.classes))
    return summary


def _require_masks(cases: Sequence[Case], split: str) -> None:
    """Raises, before anything is predicted or read, unless all cases can be scored."""
    if lacking := [case.case_id for case in cases if not case.labelled]:
        raise DataError(
            f"{split}: {len(lacking)} cases have no true mask to be scored by ({shown(lacking)}). "
            "Take them out of the splits file, or only predict them, with `predict`."
        )


def _check(scoring: Scoring) -> None:
    for name, value, least in (
        ("tolerance", scoring.tolerance, 0), ("resamples", scoring.resamples, 100),
        ("seed", scoring.seed, 0),
    ):  # fmt: skip
        if not value >= least:
            raise DataError(f"{name}: got {value}, expected {least} or more.")
