"""What is trained and tested, in which order, and on what learning rates are chosen.

The design, fixed before the first run:

- A seed is a world of its own: its rules, its cases of all splits, the networks' initial weights,
  batches and noise. Of real MRI the head is one, and the slices of the splits are the same for all.
- Every site has 4 validation cases, by which training is stopped, and 10 test cases, which nothing
  is chosen by and every network predicts once. All networks of a seed are tested on the same cases.
- Learning rates, and those and the steps of an adaptation, are chosen on seed `TUNING_SEED`, which
  no table of results counts: for every method the same grid and the same steps.
  (The grid was 0.003, 0.01 and 0.03 at first. All five methods chose the lowest in the first scene,
  so that 0.001 took the place of 0.03 there, when FiLM and dMoE had been tested on one seed.)
- A scene is tested on five seeds, and on ten if that leaves any interval of dMoE's difference from
  a rival across zero; the first two scenes on ten in any case. Every run that ends is in the csv.
- "Ahead" is said where Student's 95 % interval of the difference in the mean test Dice, paired by
  seed, leaves out zero on all the seeds of the plan. Intervals are not corrected for their number.
- All methods have the same multiply-adds for an image but for the router's, FiLM's, those of the
  first convolution's further channels and of picking one MLP of many; the table has the counts.
- Size of images and network, and for how long is trained, were settled by eight trial runs on seed
  100, which is none of the plan's.
- A new site is one that training had no case of. Where sites share rules it goes by one of these,
  elsewhere by one of its own. Each network of the first five seeds meets 2 of them, each with 40
  test cases and 30 labelled ones, of which it is given the first 1, 3, 10 or all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..statistics import student_interval
from .cases import Kind

GRID = (0.001, 0.003, 0.01)
TUNING_SEED = 0
SEEDS = (10, 11, 12, 13, 14, 15, 16, 17, 18, 19)
FIRST_SEEDS = 5  # after which it is decided whether a scene needs the others
RIVALS = ("film", "per_value", "channels", "wide")
COMPARED = ("dmoe", *RIVALS)
# dMoE with one setting changed, at dMoE's learning rate; FiLM that starts as the identity, at its.
VARIANTS: Mapping[str, str] = {
    "sharp": "dmoe",
    "dmoe-within": "dmoe",
    "noise-never": "dmoe",
    "k1": "dmoe",
    "k8": "dmoe",
    "experts4": "dmoe",
    "experts16": "dmoe",
    "film-identity": "film",
}
VALIDATION_CASES, TEST_CASES = 4, 10  # of each site

NEW_SITES, NEW_TEST_CASES = 2, 40
LABELLED = (1, 3, 10, 30)
ADAPT_GRID, ADAPT_STEPS = (0.003, 0.01, 0.03), (25, 100)

Task = Literal["tune", "train", "adapt"]


@dataclass(frozen=True)
class Scene:
    """A kind of images and who outlines them.

    Args:
        kind: of the images.
        sites: how many.
        cases: of each site, in training.
        rules: how many rules the sites share; None: each has its own.
    """

    kind: Kind
    sites: int
    cases: int
    rules: int | None

    @property
    def title(self) -> str:
        images = "phantom" if self.kind == "phantom" else "real MRI"
        rules = "each its own rule" if self.rules is None else f"{self.rules} rules"
        return f"{images}, {self.sites} sites of {self.cases} cases, {rules}"


SCENES: dict[str, Scene] = {
    "phantom-few": Scene("phantom", 40, 12, 4),
    "mri-few": Scene("mri", 40, 12, 4),
    "phantom-own": Scene("phantom", 40, 12, None),
    "mri-own": Scene("mri", 40, 12, None),
    "phantom-60x6": Scene("phantom", 60, 6, 4),
    "mri-60x6": Scene("mri", 60, 6, 4),
    "phantom-10x40": Scene("phantom", 10, 40, 4),
    "mri-10x40": Scene("mri", 10, 40, 4),
    "phantom-own-10x40": Scene("phantom", 10, 40, None),
    "mri-own-10x40": Scene("mri", 10, 40, None),
}
# Where all seeds are run, where new sites come, and where variants are tried.
MAIN = ("phantom-few", "mri-few")


@dataclass(frozen=True, order=True)
class Job:
    """One training, or the adaptations of one trained network to new sites.

    Args:
        task: "tune" is a training of `learning.TUNING`'s steps, "train" one until validation stops
            rising; "adapt" is of the network that the latter leaves.
        scene: a name of `SCENES`.
        method: a name of `METHODS`.
        seed: see above.
        rate: the learning rate of the training.
    """

    task: Task
    scene: str
    method: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.task}-{self.scene}-{self.method}-seed{self.seed}-lr{self.rate:g}"


class Plan:
    """What is to be run, by what has been.

    Args:
        scores: of every job that is done: of "tune" the validation score, of "train" the mean test
            Dice; of "adapt" it does not matter.
    """

    def __init__(self, scores: Mapping[Job, float]) -> None:
        self.scores = scores

    def rate(self, scene: str, method: str) -> float | None:
        """The learning rate chosen, the lowest of equals; None before all were tried."""
        jobs = self.tuning(scene, VARIANTS.get(method, method))
        if any(job not in self.scores for job in jobs):
            return None
        return max(jobs, key=lambda job: (self.scores[job], -job.rate)).rate

    @staticmethod
    def tuning(scene: str, method: str) -> list[Job]:
        """The jobs that choose a method's learning rate."""
        return [Job("tune", scene, method, TUNING_SEED, rate) for rate in GRID]

    def ahead(self) -> Iterator[Job]:
        """The jobs that are not done and can be begun, the most urgent first.

        Seeds are interleaved, one of all methods before the next, so that a study that is stopped
        has compared them all on as many seeds.
        """
        for seeds in (SEEDS[:FIRST_SEEDS], SEEDS):
            for scene in MAIN:
                yield from self._compared(scene, seeds)
        for scene in MAIN:
            yield from self._of(scene, COMPARED, (TUNING_SEED, *SEEDS[:FIRST_SEEDS]), "adapt")
        for scene in SCENES:
            if scene not in MAIN:
                yield from self._compared(scene, self.seeds(scene))
        for scene in MAIN:
            yield from self._of(scene, tuple(VARIANTS), SEEDS[:FIRST_SEEDS], "train")

    def seeds(self, scene: str) -> tuple[int, ...]:
        """The seeds that a scene is to be tested on, as far as that is decided."""
        if scene in MAIN:
            return SEEDS
        first = SEEDS[:FIRST_SEEDS]
        found = [self.differences(scene, "dmoe", rival, first) for rival in RIVALS]
        if any(len(of_rival) < len(first) for of_rival in found):
            return first
        limits = [student_interval(of_rival) for of_rival in found]
        across = any(pair is None or pair[0] <= 0 <= pair[1] for pair in limits)
        return SEEDS if across else first

    def differences(self, scene: str, a: str, b: str, seeds: Sequence[int] = SEEDS) -> list[float]:
        """The score of `a` minus that of `b`, of each of the seeds that both have."""
        scores = {
            (job.method, job.seed): score
            for job, score in self.scores.items()
            if job.task == "train" and job.scene == scene
        }
        return [
            scores[a, seed] - scores[b, seed]
            for seed in seeds
            if (a, seed) in scores and (b, seed) in scores
        ]

    def _compared(self, scene: str, seeds: Sequence[int]) -> Iterator[Job]:
        for method in COMPARED:
            yield from (job for job in self.tuning(scene, method) if job not in self.scores)
        yield from self._of(scene, COMPARED, seeds, "train")

    def _of(
        self, scene: str, methods: Sequence[str], seeds: Sequence[int], task: Task
    ) -> Iterator[Job]:
        for seed in seeds:
            for method in methods:
                rate = self.rate(scene, method)
                if rate is not None:
                    job = Job(task, scene, method, seed, rate)
                    if job not in self.scores:
                        yield job
