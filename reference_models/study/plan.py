"""Which trainings a study is made of."""

from __future__ import annotations

from dataclasses import dataclass

from .jobs import Job
from .methods import METHODS

# Every method without `rate_of` is trained with all three on the first seed, in every scene.
GRID = (0.003, 0.01, 0.03)
# Methods that are trained on one scene's data from several initial weights: what those alone do.
SPREAD_SCENE, SPREAD_METHODS = "rule", ("dense", "film", "dmoe")
INIT_SEED = 1000  # of the initial weights of the study's seed 0


@dataclass(frozen=True)
class Plan:
    """Which jobs there are.

    Args:
        scenes, methods: names of `SCENES` and `METHODS`; a method whose learning rate another one
            takes is among them.
        seeds: the seeds of the data; learning rates are chosen on the first.
    """

    scenes: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def methods_of(self, scene: str) -> tuple[str, ...]:
        """The methods that are trained on a scene."""
        return tuple(
            method
            for method in self.methods
            if not METHODS[method].scenes or scene in METHODS[method].scenes
        )

    def tuned(self) -> list[tuple[str, str]]:
        """Every scene and method for which a learning rate is chosen."""
        return [
            (scene, method)
            for scene in self.scenes
            for method in self.methods_of(scene)
            if not METHODS[method].rate_of
        ]

    def tuning(self, scene: str, method: str) -> list[Job]:
        """The jobs that choose a learning rate; the one at that rate is a main job, too."""
        return [_job(scene, method, self.seeds[0], rate) for rate in GRID]

    def depending(self, scene: str, method: str) -> list[str]:
        """The methods that are trained at the learning rate chosen for one, itself included."""
        return [m for m in self.methods_of(scene) if method in (m, METHODS[m].rate_of)]

    def main(self, scene: str, method: str, rate: float) -> list[Job]:
        """The jobs that the study is about, one a seed."""
        return [_job(scene, method, seed, rate) for seed in self.seeds]

    def spread(self, scene: str, method: str, rate: float) -> list[Job]:
        """The jobs with the first seed's data and the other seeds' initial weights."""
        if scene != SPREAD_SCENE or method not in SPREAD_METHODS:
            return []
        return [Job(scene, method, self.seeds[0], INIT_SEED + s, rate) for s in self.seeds[1:]]

    def possible(self) -> set[Job]:
        """Every job that there can be, whichever learning rates are chosen."""
        return {
            job
            for scene in self.scenes
            for method in self.methods_of(scene)
            for rate in GRID
            for job in (*self.main(scene, method, rate), *self.spread(scene, method, rate))
        }

    @property
    def count(self) -> int:
        """The number of all jobs, which is known before any learning rate is."""
        rate = GRID[0]
        jobs = {
            job
            for scene in self.scenes
            for method in self.methods_of(scene)
            for job in (*self.main(scene, method, rate), *self.spread(scene, method, rate))
        }
        jobs.update(job for pair in self.tuned() for job in self.tuning(*pair))
        return len(jobs)


def _job(scene: str, method: str, seed: int, rate: float) -> Job:
    return Job(scene, method, seed, INIT_SEED + seed, rate)
