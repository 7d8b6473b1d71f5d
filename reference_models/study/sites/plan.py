"""The plan: what is trained and tested, in which order, and where learning rates are chosen.

The design was fixed before the first run:

- A seed decides everything that is random: the rules, the cases of all splits, the initial weights,
  the batches and the noise. Real MRI has only one head, and its splits are the same for all seeds.
- Every site has 4 validation cases, which decide when training stops, and 10 test cases. Nothing is
  chosen by the test cases, and every network predicts each of them once. All networks of a seed are
  tested on the same cases.
- Learning rates are chosen on seed 0, and so are the learning rate and the steps of an adaptation
  to a new site. No table of results counts that seed. All methods have the same grid and the same
  steps. (At first the grid was 0.003, 0.01 and 0.03. In the first scene all five methods chose the
  lowest rate, and 0.001 replaced 0.03. At that time FiLM and dMoE had been tested on one seed.)
- A scene is tested on five seeds. If the interval of any difference between dMoE and a rival then
  includes zero, it is tested on ten. The first two scenes are tested on ten in any case. Every run
  that ends is in the csv. (`phantom-own` was decided on five seeds. It was then continued to ten,
  since its twin `mri-own` needed ten and both together make one finding.)
- dMoE is called ahead of a rival if Student's 95 % interval of the difference in mean test Dice,
  paired by seed, excludes zero on all seeds of the plan. Intervals are not corrected for their
  number.
- All methods have the same multiply-adds for an image, except for the router, for FiLM, for further
  channels of the first convolution, and for selecting one MLP of many. The table has the counts.
- The size of images and network and the length of training were chosen in eight trial runs on seed
  100, which is no seed of the plan.
- A new site is a site without any training case. Where sites share rules it follows one of them,
  elsewhere it has a rule that no other site has. Each network of the first two scenes meets 2 new
  sites. Each has 40 test cases and 30 labelled cases, of which the network gets the first 1, 3, 10,
  or all. (At first the networks of five seeds met them. Then those of all ten did, since with five
  many intervals included zero.)
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
FIRST_SEEDS = 5  # then it is decided whether a scene needs the others
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
    """A kind of images, and the sites that outline them.

    Args:
        kind: of the images.
        sites: how many.
        cases: how many training cases each site has.
        rules: how many rules the sites share; None: each site has another rule.
    """

    kind: Kind
    sites: int
    cases: int
    rules: int | None

    @property
    def title(self) -> str:
        images = "phantom" if self.kind == "phantom" else "real MRI"
        rules = "a rule for each site" if self.rules is None else f"{self.rules} rules"
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
            yield from self._of(scene, COMPARED, (TUNING_SEED, *SEEDS), "adapt")
        for scene in MAIN:
            yield from self._of(scene, tuple(VARIANTS), SEEDS[:FIRST_SEEDS], "train")
        others = [scene for scene in SCENES if scene not in MAIN]
        for scene in others:
            yield from self._compared(scene, SEEDS[:FIRST_SEEDS])
        for scene in others:
            yield from self._compared(scene, self.seeds(scene))

    def seeds(self, scene: str) -> tuple[int, ...]:
        """The seeds that a scene is to be tested on, as far as that is decided."""
        if scene in (*MAIN, "phantom-own"):
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
