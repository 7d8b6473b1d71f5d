"""Trains a network of the study and predicts its test cases as if no attribute were known.

Shapes: B samples of a batch, N cases, C channels, V values, K classes, H rows, W columns.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_layer import routing

from ...data.cases import UNKNOWN, Case, Sample
from ...evaluation.framed import FramedCases, stacked
from ...evaluation.trained_run import RunSettings, TrainedRun, open_run
from ...metrics import fairness
from ...metrics.region import batch_dice
from ...training.loop import train
from ..csv_table import Table
from ..jobs import Job
from ..scenes import SCENES, Design

# The methods of prediction, in the order of the page. The network receives the true value; it
# receives "unknown" and follows its policy; its probabilities for all values are averaged, by the
# training shares or by a classifier's probabilities; it receives the classifier's best guess; or it
# is a blind network.
RIGHT, POLICY, SHARES, WEIGHED, GUESS, BLIND = (
    "right", "policy", "shares", "weighed", "guess", "blind",
)  # fmt: skip
_BATCH = 50  # images at a time
_CLASSIFIER_STEPS, _CLASSIFIER_BATCH, _CLASSIFIER_RATE = 300, 16, 3e-3


@dataclass(frozen=True)
class UnknownScore:
    """The scores of a network with one method of prediction.

    Args:
        scene, method, seed, learning_rate: of its training.
        way: one of the methods above.
        passes: forward passes for an image, without that of a classifier.
        es_dice, worst, overall: of the test cases, as the study's.
        guessed: share of the test cases whose value the classifier guesses.
    """

    scene: str
    method: str
    seed: int
    learning_rate: Annotated[float, "g"]
    way: str
    passes: int
    es_dice: float
    worst: float
    overall: float
    guessed: float


UNKNOWN_SCORES = Table("unknown.csv", UnknownScore)


def run_unknown(job: Job, design: Design, folder: Path) -> list[UnknownScore]:
    """Trains a network, and scores it with every method of prediction that it allows."""
    recipe = design.recipe(job, folder)
    shutil.rmtree(recipe.out, ignore_errors=True)  # of a job that was stopped
    silence = io.StringIO()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        train(recipe)
        run = open_run(RunSettings(recipe.out, which="last", batch_size=_BATCH), "test")
    (network,) = run.members
    trained = [case for case in run.dataset.cases if case.case_id in network.trained]
    values = len(run.dataset.attributes[0].values)
    classifier = train_classifier(_images(run, trained), _values(trained), values, job.init_seed)
    counts_V = torch.bincount(_values(trained), minlength=values)
    dice: dict[str, list[float]] = {}
    guessed = 0
    labels = run.dataset.regions[SCENES[job.scene].region]
    for samples, image_BCHW in _batches(run, run.cases):
        weight_BV = classified(classifier, image_BCHW)
        guess_B = weight_BV.argmax(1)
        truth_B = torch.tensor([sample.attributes[0] for sample in samples])
        guessed += int((guess_B == truth_B).sum())
        masks = {
            way: [run.framing.restore(x.log(), s) for x, s in zip(found, samples, strict=True)]
            for way, found in _answers(run, image_BCHW, truth_B, guess_B, weight_BV, counts_V)
        }
        truth = [np.isin(sample.truth_S, labels) for sample in samples]
        for way, found in masks.items():
            for mask_S, truth_S in zip(found, truth, strict=True):
                pair = (torch.from_numpy(x)[None] for x in (np.isin(mask_S, labels), truth_S))
                dice.setdefault(way, []).extend(batch_dice(*pair))
    shutil.rmtree(recipe.out)
    groups = _values(run.cases).tolist()
    shares = run.dataset.population[run.dataset.attributes[0].name]
    size = dict(enumerate(np.bincount(groups, minlength=values).tolist()))
    rows = []
    for way, scores in dice.items():
        means = fairness.group_means(scores, groups)
        of_groups = fairness.shares_of(size, shares)
        rows.append(
            UnknownScore(
                scene=job.scene,
                method=job.method,
                seed=job.data_seed,
                learning_rate=job.learning_rate,
                way=way,
                passes=values if way in (SHARES, WEIGHED) else 1,
                es_dice=fairness.es_dice(means, of_groups),
                worst=min(means.values()),
                overall=fairness.overall(means, of_groups),
                guessed=guessed / len(run.cases),
            )
        )
    return rows


def averaged(probabilities: Sequence[Tensor], weight_BV: Tensor) -> Tensor:
    """The probabilities (B, K, H, W) of all values, weighed for each sample.

    Args:
        probabilities: those of each value (B, K, H, W).
        weight_BV: that add up to 1.

    Example:
        >>> averaged([torch.tensor([[[[0.2]]]]), torch.tensor([[[[0.6]]]])],
        ...          torch.tensor([[0.75, 0.25]])).item()
        0.30000001192092896
    """
    return torch.einsum("vbkhw,bv->bkhw", torch.stack([*probabilities]), weight_BV)


def train_classifier(image_NCHW: Tensor, value_N: Tensor, values: int, seed: int) -> nn.Module:
    """A small network that predicts the attribute from the image, trained without reweighting."""
    torch.manual_seed(seed)
    widths = (image_NCHW.shape[1], 8, 16, 32)
    layers: list[nn.Module] = []
    for cin, cout in itertools.pairwise(widths):
        layers += [nn.Conv2d(cin, cout, 3, 2, padding=1), nn.GroupNorm(4, cout), nn.ReLU()]
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], values)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=_CLASSIFIER_RATE)
    for _ in range(_CLASSIFIER_STEPS):
        chosen_B = torch.randint(len(value_N), (_CLASSIFIER_BATCH,))
        loss = F.cross_entropy(network(image_NCHW[chosen_B]), value_N[chosen_B])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def classified(classifier: nn.Module, image_BCHW: Tensor) -> Tensor:
    """The probability of each value (B, V)."""
    with torch.inference_mode():
        logits_BV: Tensor = classifier(image_BCHW)
    return logits_BV.softmax(1)


def _answers(
    run: TrainedRun,
    image_BCHW: Tensor,
    truth_B: Tensor,
    guess_B: Tensor,
    weight_BV: Tensor,
    counts_V: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    """The probabilities (B, K, H, W) by every method."""

    (network,) = run.members

    def told(value_B: Tensor) -> Tensor:
        with torch.inference_mode(), routing(value_B, record=False):
            logits_BKHW: Tensor = network.model(image_BCHW)
        return logits_BKHW.softmax(1)

    if run.unknown is None:
        yield BLIND, told(truth_B)
        return
    yield RIGHT, told(truth_B)
    yield POLICY, told(torch.full_like(truth_B, UNKNOWN))
    yield GUESS, told(guess_B)
    each = [told(torch.full_like(truth_B, value)) for value in range(len(counts_V))]
    shares_BV = (counts_V / counts_V.sum()).expand_as(weight_BV)
    yield SHARES, averaged(each, shares_BV)
    yield WEIGHED, averaged(each, weight_BV)


def _batches(run: TrainedRun, cases: Sequence[Case]) -> Iterator[tuple[list[Sample], Tensor]]:
    framed = FramedCases(run.dataset, cases, run.framing)
    for start in range(0, len(cases), _BATCH):
        items = [framed[place] for place in range(start, min(start + _BATCH, len(cases)))]
        samples, frames = zip(*items, strict=True)
        yield [*samples], stacked([frame.image_CS for frame in frames])


def _images(run: TrainedRun, cases: Sequence[Case]) -> Tensor:
    return torch.cat([image_BCHW for _, image_BCHW in _batches(run, cases)])


def _values(cases: Sequence[Case]) -> Tensor:
    return torch.tensor([case.attributes[0] for case in cases])
