"""The tables of the study of many sites: a row for each training and for each adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ..csv_table import Table
from .plan import Job, Task


@dataclass(frozen=True)
class SiteRun:
    """The result of a training.

    Args:
        task, scene, method, seed, learning_rate: those of its `plan.Job`.
        validation: the highest validation score, the mean Dice over cases.
        steps: until the weights that were retained.
        stopped: whether the score had stopped rising, rather than the steps run out.
        parameters: of the network.
        multiply_adds: of a forward pass over one image, of all that is active for it.
        seconds: of one core's work that training and testing took.
        dice: the mean Dice of the test cases; this and all below are None of "tune", whose network
            is not tested.
        worst_tenth: the mean Dice of the tenth of the sites that has the lowest.
        policy: the mean Dice of `UNKNOWN_CASES` test cases of each site, when the network receives
            "unknown" and averages its routers or embeddings; None of a blind network, as are the
            next two.
        outputs: the same, by the average of the outputs over all sites.
        known: the same cases', when the network receives their sites.
        by_site: each site's mean Dice.
    """

    task: Task
    scene: str
    method: str
    seed: int
    learning_rate: Annotated[float, "g"]
    validation: float
    steps: int
    stopped: bool
    parameters: int
    multiply_adds: int
    seconds: float
    dice: float | None
    worst_tenth: float | None
    policy: float | None
    outputs: float | None
    known: float | None
    by_site: tuple[float, ...] | None

    @property
    def job(self) -> Job:
        return Job(self.task, self.scene, self.method, self.seed, self.learning_rate)


@dataclass(frozen=True)
class Adaptation:
    """The result of adapting a trained network to new sites.

    Args:
        scene, method, seed, learning_rate: those of the network's `plan.Job`.
        part: what was adapted: "none", of which the site is unknown; "own", what the network has of
            the new site alone; or "all".
        cases: labelled cases of each new site.
        adapt_rate, steps: learning rate and steps of the adaptation; 0 of "none".
        numbers: how many numbers were trained.
        dice: the mean Dice of the test cases of all new sites.
        by_site: each new site's.
    """

    scene: str
    method: str
    seed: int
    learning_rate: Annotated[float, "g"]
    part: Literal["none", "own", "all"]
    cases: int
    adapt_rate: Annotated[float, "g"]
    steps: int
    numbers: int
    dice: float
    by_site: tuple[float, ...]

    @property
    def job(self) -> Job:
        return Job("adapt", self.scene, self.method, self.seed, self.learning_rate)


RUNS = Table("runs.csv", SiteRun)
ADAPTATIONS = Table("adaptations.csv", Adaptation)
