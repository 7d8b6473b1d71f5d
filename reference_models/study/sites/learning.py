"""Trains a network until its validation score stops rising, and computes its scores.

Shapes: N cases, S sites, Z zones, B samples of a step, K classes, H rows, W columns.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dmoe_layer import routing

from ...metrics.region import batch_dice
from ...training.objectives import Objective
from ..methods import Method
from .cases import SEEN, STORED, Cases

AT_ONCE = 200  # images of a forward pass in testing


@dataclass(frozen=True)
class Schedule:
    """For how long a network is trained.

    The learning rate rises over `warmup` steps and then stays constant. The weights that are
    validated and retained are averages over the steps before, in which the weight of a step falls
    by 1 - `decay` with each further step. They are validated every `every` steps. After `patience`
    validations in a row, none of which exceeds the best before by `rise`, training ends, and the
    best weights are taken.

    Args:
        batch_size: images of a step.
        warmup, decay, every, patience, rise: as above.
        most: steps after which training ends in any case; the page says how often that happened.
    """

    batch_size: int = 8
    warmup: int = 50
    decay: float = 0.99
    every: int = 100
    patience: int = 3
    rise: float = 0.001
    most: int = 3000


TRAINING, TUNING = Schedule(), Schedule(patience=600, rise=0.0, most=600)


@dataclass(frozen=True)
class Learned:
    """How a training went.

    Args:
        steps: until the weights that were retained.
        validation: their score.
        stopped: whether the score had stopped rising, rather than the steps run out.
    """

    steps: int
    validation: float
    stopped: bool


def build(method: Method, sites: int, seed: int) -> nn.Module:
    """A method's network, newly initialised. It accepts an unknown site, if it receives sites."""
    torch.manual_seed(seed)
    settings = dataclasses.replace(method.settings, unknown="average")
    return settings.build(in_channels=1, n_classes=2, attribute_sizes=(sites,), shape=(SEEN, SEEN))


def train(
    method: Method,
    network: nn.Module,
    trained: Cases,
    validated: Cases,
    rules_SZ: Tensor,
    *,
    rate: float,
    schedule: Schedule,
    seed: int,
) -> Learned:
    """Leaves the weights of the highest validation score in the network.

    Args:
        method: whose auxiliary losses are added.
        network: of `build`.
        trained, validated: the cases.
        rules_SZ: which zones each site outlines.
        rate: the learning rate.
        schedule: for how long.
        seed: of batches, windows, routing noise and dropout.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(schedule.decay))
    batches = endless_batches(trained, schedule.batch_size, seed)
    best, kept = Learned(0, -math.inf, stopped=False), network.state_dict()
    for step in range(1, schedule.most + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / schedule.warmup, 1)
        loss = loss_of(method, network, next(batches), rules_SZ)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(network)
        if step % schedule.every:
            continue
        score = float(np.mean(case_dice(averaged.module, validated, rules_SZ)))
        if score >= best.validation + schedule.rise:
            best = Learned(step, score, stopped=False)
            kept = copy.deepcopy(averaged.module.state_dict())
        elif step - best.steps >= schedule.patience * schedule.every:
            best = dataclasses.replace(best, stopped=True)
            break
    network.load_state_dict(kept)
    return best


def loss_of(method: Method, network: nn.Module, batch: Cases, rules_SZ: Tensor) -> Tensor:
    """The loss of a batch: Dice and cross-entropy, and what the method adds."""
    network.train()
    with routing(batch.site_N) as scope:
        logits_BKHW = network(batch.image_N1HW)
    loss, _ = _OBJECTIVE(logits_BKHW, batch.outlined(rules_SZ).long(), batch.site_N * 0)
    if weight := method.recipe.get("balance_weight"):
        loss = loss + weight * scope.load_balancing_loss(per_attribute=True)
    return loss


def endless_batches(cases: Cases, size: int, seed: int) -> Iterator[Cases]:
    """Batches of random windows, each case once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(cases), generator=generator)])
        chosen, order = order[:size], order[size:]
        top, left = torch.randint(STORED - SEEN + 1, (2,), generator=generator).tolist()
        yield cases.of(chosen).window(top, left)


def case_dice(
    network: nn.Module, cases: Cases, rules_SZ: Tensor, told_N: Tensor | None = None
) -> list[float]:
    """Every case's Dice.

    Args:
        network: of `build`.
        cases: that are predicted.
        rules_SZ: which zones each site outlines.
        told_N: the sites that the network receives; None: each case's own.
    """
    cases = cases.middle
    told_N = cases.site_N if told_N is None else told_N
    parts = [
        probability_of(network, image_B1HW, told_B) > 0.5
        for image_B1HW, told_B in zip(
            cases.image_N1HW.split(AT_ONCE), told_N.split(AT_ONCE), strict=True
        )
    ]
    return batch_dice(torch.cat(parts), cases.outlined(rules_SZ))


def probability_of(network: nn.Module, image_B1HW: Tensor, told_B: Tensor) -> Tensor:
    """The probability that each pixel is outlined (B, H, W)."""
    network.eval()
    with torch.inference_mode(), routing(told_B, record=False):
        logits_BKHW: Tensor = network(image_B1HW)
    return logits_BKHW.softmax(1)[:, 1]


_OBJECTIVE = Objective("none", lambda_dice=1.0, lambda_ce=1.0, group_counts=torch.ones(1))
