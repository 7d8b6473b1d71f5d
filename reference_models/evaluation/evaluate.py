"""Scores a run, or a folder of any tool's masks, and writes what it found.

    cases.csv      a row a case and region
    summary.json   `scores.Summary`: groups, overall, intervals, and attributes told wrongly
    report.html    the same to look at
    masks/         of a run: label values at native resolution, of volumes NIfTI

A run may be several that answer together, or a cross-validation.
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
from .conditions import AS_GIVEN, attributes_told, left_out_note
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
    """Tolerance of the surface Dice, in the data's unit (mm, or pixels where the files do not say);
    take the distance between two experts' outlines if you know it."""
    resamples: int = 2000
    """Number of resamples of the bootstrap, and of shuffles of the group labels."""
    seed: int = 0
    """Seed of the bootstrap and the shuffles, and of which attributes are told wrongly."""


@dataclass(frozen=True)
class EvaluateRun(RunSettings):
    """Scores a trained run, several together, or a cross-validation."""

    split: Split = "test"
    """The split whose cases are scored; of a cross-validation, validation is all that were held
    out."""
    out: Path | None = None
    """Folder to write; by default evaluation-<split> in the run's folder."""
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = field(default_factory=Scoring)

    @property
    def folder(self) -> Path:
        return self.folder_for(self.out, f"evaluation-{self.split}")

    def score(self) -> tuple[Path, Summary]:
        """Does as `evaluate_run`; the folder that it wrote comes first."""
        return self.folder, evaluate_run(self)


@dataclass(frozen=True)
class EvaluatePredictions:
    """Scores masks that any tool has written.

    One file a case: `<case id>.png` (or .tif, .bmp), 8 bits, grey or palette, or `<case id>.npy`,
    integers; of volumes `<case id>.nii.gz` (or .nii, .mha, .nrrd), on the image's own grid. Values
    are labels, the size is the image's own.
    """

    folder: Path
    """Folder of the masks."""
    data: Annotated[DataSettings, tyro.conf.arg(name="")]
    """The data set that they are masks of."""
    split: Literal["train", "validation", "test", "all"] = "test"
    """The split whose cases are scored. all: every case that has a mask in the data, as of masks
    from a cross-validation; test cases of the data's own are left out if the folder has none of
    theirs."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is not known, as a run's evaluation may have done."""
    out: Path = Path("evaluation")
    """Folder to write."""
    scoring: Annotated[Scoring, tyro.conf.arg(name="")] = field(default_factory=Scoring)

    def score(self) -> tuple[Path, Summary]:
        """Does as `evaluate_predictions`; the folder that it wrote comes first."""
        return self.out, evaluate_predictions(self)


def evaluate_run(settings: EvaluateRun) -> Summary:
    """Scores a run under the attributes as given and, where it knows them, told wrongly.

    Raises:
        DataError, RunError: as of `open_run`; a case has no mask to be scored by; or `out` holds
            something else. Nothing is written.
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
            notes[AS_GIVEN] = "; ".join(filter(None, (notes[AS_GIVEN], run.twin.note())))
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
            missing, too many, damaged, of another size or place, or hold other values than labels:
            all of them in one error. Nothing is written.
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
        raise DataError(f"{settings.split}: no case is left to be scored.")
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
        told = ("masks read from files; what wrote them was not run", note, left_out_note(left_out))
        notes = {AS_GIVEN: "; ".join(filter(None, told))}
        result = _Evaluation(dataset, cases, {AS_GIVEN: scored}, notes, loads={})
        return _write(folder, result, settings, str(settings.folder), paths)

    return write_results(settings.out, write, CONTENTS)


@dataclass(frozen=True)
class _Evaluation:
    """All that an evaluation's files are written from.

    Args:
        dataset: whose cases they are.
        cases: that were scored.
        scored: by condition, the scores [case][region].
        notes: a note on every condition; one without scores was not run.
        loads: by condition, the experts' loads; empty without experts, or of several networks.
        folds: by case id, the fold of a cross-validation that held it out.
        about: as of `TrainedRun`.
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
    """Every region of one case."""
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
    """The scores [case][region] of masks in files, and a sentence for each that is damaged.

    Every file is read, so that all faults are told at once; once there is one, or where the folder
    is not `sound` anyway, none is scored.
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
            f"{split}: {len(lacking)} cases have no mask to be scored by ({shown(lacking)}); take "
            "them out of the splits file, or write their masks with `predict`."
        )


def _check(scoring: Scoring) -> None:
    for name, value, least in (
        ("tolerance", scoring.tolerance, 0), ("resamples", scoring.resamples, 100),
        ("seed", scoring.seed, 0),
    ):  # fmt: skip
        if not value >= least:
            raise DataError(f"{name}: got {value}, expected {least} or more.")
