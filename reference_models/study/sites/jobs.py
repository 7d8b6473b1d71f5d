"""Does one job of the plan: trains a network and tests it, or adapts it to new sites.

Shapes: N cases, S sites, Z zones.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...files import write_whole
from ...metrics.region import batch_dice
from ..cost import multiply_adds
from ..methods import METHODS
from .cases import SEEN, Cases, make_cases, make_rules
from .learning import TRAINING, TUNING, Schedule, build, case_dice, probability_of, train
from .newcomer import PARTS, Extended, Part, adapt, extended
from .plan import (
    ADAPT_GRID,
    ADAPT_STEPS,
    LABELLED,
    NEW_SITES,
    NEW_TEST_CASES,
    SCENES,
    TEST_CASES,
    TUNING_SEED,
    VALIDATION_CASES,
    Job,
)
from .tables import Adaptation, SiteRun

UNKNOWN = -1
UNKNOWN_CASES = 2  # test cases of each site that are predicted as if it were unknown
# Added to a seed: of initial weights, batches and noise; and of the cases of new sites.
_INIT, _NEW = 1000, 100_000


@dataclass(frozen=True)
class Effort:
    """For how long is trained.

    Args:
        training: until validation stops rising.
        tuning: with each learning rate of the grid.
        adapting: the steps after which an adaptation is looked at.
    """

    training: Schedule = TRAINING
    tuning: Schedule = TUNING
    adapting: tuple[int, ...] = ADAPT_STEPS


class Way(NamedTuple):
    """How a network is adapted."""

    part: Part
    cases: int
    rate: float
    steps: int


class _World(NamedTuple):
    """A scene with one seed: rules, those of the new sites behind the others', and cases."""

    rules_SZ: Tensor
    trained: Cases
    validated: Cases
    tested: Cases


def run_training(job: Job, folder: Path, effort: Effort) -> SiteRun:
    """Trains, and tests what was trained "until validation stops rising", whose weights it leaves
    in the folder `networks`."""
    begun = time.process_time()
    method, world = METHODS[job.method], _world(job.scene, job.seed)
    sites = SCENES[job.scene].sites
    network = build(method, sites, _INIT + job.seed)
    learned = train(
        method,
        network,
        world.trained,
        world.validated,
        world.rules_SZ,
        rate=job.rate,
        schedule=effort.tuning if job.task == "tune" else effort.training,
        seed=_INIT + job.seed,
    )
    by_site = policy = outputs = known = None
    if job.task == "train":
        path = _path(job, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda target: save_file(network.state_dict(), target))
        by_site = _by_site(case_dice(network, world.tested, world.rules_SZ), sites)
        if method.settings.told:
            policy, outputs, known = _unknown(network, world, sites)
    return SiteRun(
        task=job.task,
        scene=job.scene,
        method=job.method,
        seed=job.seed,
        learning_rate=job.rate,
        validation=learned.validation,
        steps=learned.steps,
        stopped=learned.stopped,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        multiply_adds=multiply_adds(network.eval(), (1, SEEN, SEEN), 1),
        seconds=time.process_time() - begun,
        dice=None if by_site is None else float(np.mean(by_site)),
        worst_tenth=None if by_site is None else worst_tenth(by_site),
        policy=policy,
        outputs=outputs,
        known=known,
        by_site=by_site,
    )


def run_adaptations(
    job: Job, folder: Path, effort: Effort, chosen: Mapping[tuple[Part, int], tuple[float, int]]
) -> list[Adaptation]:
    """Adapts a trained network, which is trained again where the folder has it no longer.

    Args:
        job: of the adaptation.
        folder: with the folder `networks`.
        effort: for how long.
        chosen: learning rate and steps by part and number of labelled cases; of `TUNING_SEED`,
            where the whole grid is run, it does not matter.
    """
    scene, method = SCENES[job.scene], METHODS[job.method]
    grid = [(rate, effort.adapting) for rate in ADAPT_GRID]
    network = _trained(job, folder, effort)
    rules_SZ = _world(job.scene, job.seed).rules_SZ
    labelled = make_cases(scene.kind, "train", NEW_SITES, max(LABELLED), _NEW + job.seed)
    tested = make_cases(scene.kind, "test", NEW_SITES, NEW_TEST_CASES, _NEW + job.seed)
    start = extended(method, network, scene.sites)
    found: dict[Way | None, list[float]] = {}
    for new in range(NEW_SITES):
        own_SZ = torch.cat([rules_SZ[: scene.sites], rules_SZ[scene.sites + new, None]])
        test = _as_last(tested, new, scene.sites)
        unknown_N = torch.full_like(test.site_N, UNKNOWN)
        told_N = unknown_N if method.settings.told else None
        found.setdefault(None, []).append(float(np.mean(case_dice(network, test, own_SZ, told_N))))
        for part, cases in itertools.product(PARTS if start.own else PARTS[1:], LABELLED):
            few = _as_last(labelled, new, scene.sites).of(torch.arange(cases))
            if job.seed != TUNING_SEED:
                rate, steps = chosen[part, cases]
                grid = [(rate, (steps,))]
            for rate, wanted in grid:
                for steps, adapted in adapt(
                    method, start, part, few, own_SZ,
                    rate=rate, steps=wanted, seed=_INIT + job.seed,
                ):  # fmt: skip
                    score = float(np.mean(case_dice(adapted, test, own_SZ)))
                    found.setdefault(Way(part, cases, rate, steps), []).append(score)
    return [_row(job, start, way, by_site) for way, by_site in found.items()]


def choose_ways(tried: list[Adaptation]) -> dict[tuple[Part, int], tuple[float, int]]:
    """Of what one network was adapted by, the best learning rate and steps by part and cases."""
    best: dict[tuple[Part, int], Adaptation] = {}
    for row in tried:
        if row.part == "none":
            continue
        key = row.part, row.cases
        if key not in best or row.dice > best[key].dice:
            best[key] = row
    return {key: (row.adapt_rate, row.steps) for key, row in best.items()}


def worst_tenth(by_site: tuple[float, ...]) -> float:
    """The mean of the lowest tenth of the sites, one at least.

    Example:
        >>> worst_tenth((0.5, 0.9, 0.7))
        0.5
    """
    return float(np.mean(sorted(by_site)[: max(len(by_site) // 10, 1)]))


@functools.lru_cache(maxsize=2)
def _world(scene_name: str, seed: int) -> _World:
    scene = SCENES[scene_name]
    total = scene.sites + NEW_SITES
    return _World(
        make_rules(scene.kind, total, scene.rules or total, seed),
        make_cases(scene.kind, "train", scene.sites, scene.cases, seed),
        make_cases(scene.kind, "validation", scene.sites, VALIDATION_CASES, seed),
        make_cases(scene.kind, "test", scene.sites, TEST_CASES, seed),
    )


def _trained(job: Job, folder: Path, effort: Effort) -> nn.Module:
    """The network that a job of "train" left."""
    training = Job("train", job.scene, job.method, job.seed, job.rate)
    path = _path(training, folder)
    if not path.exists():
        run_training(training, folder, effort)
    network = build(METHODS[job.method], SCENES[job.scene].sites, seed=0)
    network.load_state_dict(load_file(path))
    return network


def _path(job: Job, folder: Path) -> Path:
    return folder / "networks" / f"{job.name}.safetensors"


def _as_last(cases: Cases, new: int, sites: int) -> Cases:
    """The cases of one of the new sites, as those of the site that a network gets."""
    own = cases.of(cases.site_N == new)
    return Cases(own.image_N1HW, own.zones_NHW, torch.full_like(own.site_N, sites))


def _by_site(dice: list[float], sites: int) -> tuple[float, ...]:
    """Each site's mean; all have as many cases, and lie one after the other."""
    return tuple(np.reshape(dice, (sites, -1)).mean(1).tolist())


def _unknown(network: nn.Module, world: _World, sites: int) -> tuple[float, float, float]:
    """The mean Dice by the network's policy, by averaged outputs, and with the site known."""
    chosen_N = torch.arange(len(world.tested)) % TEST_CASES < UNKNOWN_CASES
    cases = world.tested.of(chosen_N)
    truth_NHW = cases.middle.outlined(world.rules_SZ)
    unknown_N = torch.full_like(cases.site_N, UNKNOWN)
    policy = case_dice(network, cases, world.rules_SZ, unknown_N)
    mean_NHW = torch.zeros(truth_NHW.shape)
    for site in range(sites):
        told_N = torch.full_like(cases.site_N, site)
        mean_NHW += probability_of(network, cases.middle.image_N1HW, told_N) / sites
    outputs = batch_dice(mean_NHW > 0.5, truth_NHW)
    known = case_dice(network, cases, world.rules_SZ)
    return float(np.mean(policy)), float(np.mean(outputs)), float(np.mean(known))


def _row(job: Job, start: Extended, way: Way | None, by_site: list[float]) -> Adaptation:
    every = sum(parameter.numel() for parameter in start.network.parameters())
    numbers = {None: 0, "own": start.numbers, "all": every}
    return Adaptation(
        scene=job.scene,
        method=job.method,
        seed=job.seed,
        learning_rate=job.rate,
        part=way.part if way else "none",
        cases=way.cases if way else 0,
        adapt_rate=way.rate if way else 0.0,
        steps=way.steps if way else 0,
        numbers=numbers[way.part if way else None],
        dice=float(np.mean(by_site)),
        by_site=tuple(by_site),
    )
