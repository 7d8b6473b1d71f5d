"""The tables of the study, and the rows of each.

Every number of the study's pages and figures is in one of them. Numbers are written with four
decimals. A cell is empty where nothing is defined, such as an interval over a single seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from .csv_table import Table


@dataclass(frozen=True)
class _OfJob:
    """A row about one training.

    Args:
        scene, method, data_seed, init_seed: those of its `Job`.
    """

    scene: str
    method: str
    data_seed: int
    init_seed: int


@dataclass(frozen=True)
class TrialScores(_OfJob):
    """What one trained network scored under one condition, and what it cost.

    Args:
        learning_rate: that it was trained with.
        condition: which attributes the network received, a condition of `jobs`.
        told_right: share of the test cases that received the right attributes anyway; None for a
            blind network.
        overall, es_dice, worst, gap, seen, unseen: its scores, `statistics.METRICS`.
        worst_group: the group with the lowest mean Dice.
        validation: the validation score that learning rates are chosen by.
        parameters: of the network.
        multiply_adds: of a forward pass over one image.
        spread: whether the training is one of those that show how much initialisations differ.
        dice: by group ("dice_0", ...), the mean Dice.
    """

    learning_rate: Annotated[float, "g"]
    condition: str
    told_right: float | None
    overall: float
    es_dice: float
    worst: float
    worst_group: int
    gap: float
    seen: float | None
    unseen: float | None
    validation: float
    parameters: int
    multiply_adds: int
    spread: bool
    dice: Mapping[str, float]


@dataclass(frozen=True)
class Difference:
    """How two methods differ, or one method with wrong attributes and with right ones.

    Args:
        scene: where.
        a, b: the methods; "film@wrong" is film with wrong values.
        metric: of `statistics.METRICS`.
        difference: the mean over seeds of a's score minus b's.
        low, high: its 95 % interval.
        ahead: number of seeds whose difference is above 0 at the four decimals shown.
        seeds: number of seeds.
        by_seed: the difference of every seed, in the order of the seeds.
    """

    scene: str
    a: str
    b: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    ahead: int
    seeds: int
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class ScoreSummary:
    """A score of a method under a condition, over the seeds.

    Args:
        scene, method, condition, metric: which.
        mean: over the seeds.
        low, high: its 95 % interval.
        lowest, highest: of the seeds.
        seeds: number of seeds.
    """

    scene: str
    method: str
    condition: str
    metric: str
    mean: float
    low: float | None
    high: float | None
    lowest: float
    highest: float
    seeds: int


@dataclass(frozen=True)
class TriedRate:
    """A learning rate that was tried.

    Args:
        scene, method: for which.
        learning_rate: that was tried.
        validation: the validation score with it; -inf where the loss did not stay finite.
        chosen: whether this one was chosen.
        edge: whether it was, and lies at an end of the grid.
    """

    scene: str
    method: str
    learning_rate: Annotated[float, "g"]
    validation: float
    chosen: bool
    edge: bool


@dataclass(frozen=True)
class ValueLoads(_OfJob):
    """Which experts the tokens of one attribute value went to.

    Args:
        condition: which attributes the network received.
        attribute, value: the attribute's name and the number of its value.
        shares: of the tokens, one for each expert.
    """

    condition: str
    attribute: str
    value: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class LoadDistance(_OfJob):
    """How far the loads of an attribute's values lie apart.

    Args:
        attribute: its name.
        distance: `statistics.load_distance`.
    """

    attribute: str
    distance: float | None


@dataclass(frozen=True)
class SeedSpread:
    """How much ES-Dice varies with the initialisation alone, and with all of the seed.

    Args:
        scene, method, data_seed: which; the initialisations share the data of `data_seed`.
        inits, seeds: how many there are of either.
        over_inits, over_seeds: standard deviations.
    """

    scene: str
    method: str
    data_seed: int
    inits: int
    over_inits: float | None
    seeds: int
    over_seeds: float | None


@dataclass(frozen=True)
class MethodCost:
    """What a method's network costs.

    Args:
        scene: whose attributes the network reads.
        method: which.
        parameters: of the network.
        multiply_adds: of a forward pass over one image.
        milliseconds: of a training step.
        multiply_adds_of_dense, milliseconds_of_dense: the same as multiples of the dense network's.
    """

    scene: str
    method: str
    parameters: int
    multiply_adds: int
    multiply_adds_of_dense: float | None
    milliseconds: float | None
    milliseconds_of_dense: float | None


@dataclass(frozen=True)
class CaseDice:
    """A test case, and its Dice by every method.

    Args:
        scene, data_seed, init_seed: of the trainings that were tested on it.
        case: its id.
        group: the value of its first attribute.
        attributes: the values of all of them.
        seen: whether this combination of values occurs in training.
        dice: by method.
    """

    scene: str
    data_seed: int
    init_seed: int
    case: str
    group: int
    attributes: tuple[int, ...]
    seen: bool
    dice: Mapping[str, float]


TRIALS = Table("trials.csv", TrialScores)
DIFFERENCES = Table("differences.csv", Difference)
SUMMARY = Table("summary.csv", ScoreSummary)
RATES = Table("rates.csv", TriedRate)
LOADS = Table("loads.csv", ValueLoads)
LOAD_DISTANCES = Table("load_distances.csv", LoadDistance)
SPREAD = Table("spread.csv", SeedSpread)
COSTS = Table("costs.csv", MethodCost)
CASES = Table("cases.csv", CaseDice)
# What the study was made with.
MACHINE = "machine.json"
TABLES = (TRIALS, DIFFERENCES, SUMMARY, RATES, LOADS, LOAD_DISTANCES, SPREAD, COSTS, CASES)
CONTENTS = (*(table.name for table in TABLES), MACHINE)
