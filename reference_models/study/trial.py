"""One job of the study: trains a network, tests it with every attribute, and writes it as json.

A study's folder holds:

    trials/<job>.json   a finished job: how it was made, and its `Trial`
    runs/<job>/         a job under way, as any training leaves it; removed when the job is done
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dmoe_layer

from ..errors import RunError
from ..evaluation.conditions import AS_GIVEN, attributes_told, given_attributes
from ..evaluation.inference import NonFiniteOutputError, predictions
from ..evaluation.trained_run import RunSettings, TrainedRun, open_run
from ..files import write_whole
from ..metrics.loads import ExpertLoads
from ..metrics.region import batch_dice
from ..recipes.recipe import Recipe
from ..recipes.serial import flat, from_json, to_json
from ..training.loop import NonFiniteLossError, train
from .cost import multiply_adds
from .jobs import TOLD_RIGHT, Job, Trial
from .methods import METHODS, Method
from .scenes import SCENES, Design

# What a trial's recipe is written without: where things lie.
_PLACES = ("out", "data.root", "data.cache")
# Images at a time in testing.
_BATCH = 50


def run(job: Job, design: Design, folder: Path) -> Trial:
    """Trains and tests without a word, and leaves nothing but `trials/<job>.json`.

    If a loss or an output is not finite, the trial has no test cases and a validation score of
    -inf.

    Raises:
        RunError, DataError: as of `train` and `open_run`.
    """
    begun = time.monotonic()
    recipe = design.recipe(job, folder)
    shutil.rmtree(recipe.out, ignore_errors=True)  # of a job that was stopped
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        try:
            _train(recipe, METHODS[job.method])
            trial = _tested(job, recipe, design.sizes.image_size)
        except (NonFiniteLossError, NonFiniteOutputError):
            trial = Trial(job, 0, 0, -math.inf, (), (), (), (), {}, {}, {})
    content = _made_by(job, recipe)
    content |= {"seconds": round(time.monotonic() - begun, 1), "trial": to_json(trial)}
    path = _path(job, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    shutil.rmtree(recipe.out)
    return trial


def stored(job: Job, design: Design, folder: Path) -> Trial | None:
    """What `run` left of this job, None if it was not run yet.

    Raises:
        RunError: the file is damaged, or was made by other settings or another version.
    """
    path = _path(job, folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trial = content.pop("trial")
        del content["seconds"]
        before = flat(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: not a trial ({type(error).__name__}: {error}). Remove the file, and the "
            "study runs that job again."
        ) from error
    now = flat(_made_by(job, design.recipe(job, folder)))
    differing = [
        f"{name}: it has {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise RunError(
            f"{path}: was made with other settings. Use the former settings, choose another --out, "
            "or remove the trials that should be run again. " + "; ".join(differing)
        )
    found: Trial = from_json(Trial, trial, f"{path}: trial")
    return found


def seconds_of(jobs: Iterable[Job], folder: Path) -> float:
    """What these jobs took, one after the other, whenever they were run."""
    return sum(
        json.loads(_path(job, folder).read_text(encoding="utf-8"))["seconds"] for job in jobs
    )


def _path(job: Job, folder: Path) -> Path:
    return folder / "trials" / f"{job.name}.json"


def _made_by(job: Job, recipe: Recipe) -> dict[str, Any]:
    """All that a trial depends on, as json; `stored` compares it."""
    settings = flat(to_json(recipe))
    return {
        "version": dmoe_layer.__version__,
        "region": SCENES[job.scene].region,
        "upcycled": METHODS[job.method].upcycled,
        "recipe": {name: value for name, value in settings.items() if name not in _PLACES},
    }


def _train(recipe: Recipe, method: Method) -> None:
    """The job's network into `recipe.out`; an upcycled one is dense for half of the epochs."""
    if not method.upcycled:
        train(recipe)
        return
    settings, epochs = method.settings, int(recipe.epochs)
    dense_epochs = max(epochs // 2, 1)
    dense = dataclasses.replace(
        recipe,
        model=dataclasses.replace(settings, block="mlp", hidden=settings.hidden // settings.k),
        out=recipe.out / "dense",
        epochs=dense_epochs,
    )
    (weights,) = train(dense).glob("last-*/model.safetensors")
    experts = dataclasses.replace(
        recipe,
        model=dataclasses.replace(settings, weights=weights),
        epochs=max(epochs - dense_epochs, 1),
    )
    train(experts)


def _tested(job: Job, recipe: Recipe, size: int) -> Trial:
    """What the trained network does on the test cases, of the last step, under each condition."""
    tested = open_run(RunSettings(recipe.out, which="last", batch_size=_BATCH), "test")
    (network,) = tested.members
    image = tested.dataset.channels, size, size
    given_NA = given_attributes(tested.cases)
    told, _ = attributes_told(tested, job.data_seed)
    told = {TOLD_RIGHT if name == AS_GIVEN else name: told_NA for name, told_NA in told.items()}
    loads = {condition: ExpertLoads(tested.dataset) for condition in told}
    trained = {c.attributes for c in tested.dataset.cases if c.case_id in network.trained}
    return Trial(
        job=job,
        parameters=sum(parameter.numel() for parameter in network.model.parameters()),
        multiply_adds=multiply_adds(network.model, image, len(tested.dataset.attributes)),
        validation=_last_score(recipe.out),
        cases=tuple(case.case_id for case in tested.cases),
        subjects=tuple(case.subject for case in tested.cases),
        attributes=tuple(case.attributes for case in tested.cases),
        seen=tuple(case.attributes in trained for case in tested.cases),
        dice=_dice(tested, told, loads, SCENES[job.scene].region),
        told_right={
            condition: float((told_NA == given_NA).all(axis=1).mean())
            for condition, told_NA in told.items()
        },
        loads={condition: tables.tables() for condition, tables in loads.items()},
    )


def _dice(
    tested: TrainedRun,
    told: Mapping[str, np.ndarray],
    loads: Mapping[str, ExpertLoads],
    region: str,
) -> dict[str, tuple[float, ...]]:
    """Gives by condition every test case's Dice of a region, at native resolution."""
    labels = tested.dataset.regions[region]
    dice: dict[str, list[float]] = {condition: [] for condition in told}
    for sample, masks in predictions(tested, told, loads):
        truth_1S = torch.from_numpy(np.isin(sample.truth_S, labels))[None]
        for condition, mask_S in masks.items():
            mask_1S = torch.from_numpy(np.isin(mask_S, labels))[None]
            dice[condition] += batch_dice(mask_1S, truth_1S)
    return {condition: tuple(scores) for condition, scores in dice.items()}


def _last_score(run: Path) -> float:
    """The last epoch's validation score."""
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    return float(last["score"])
