"""The parts of the study: a job is one training, and a trial is the result of a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..metrics.loads import LoadTables

# The conditions under which a trained network is tested. It receives each case's own attributes,
# those of another case, always wrong ones, or the value that means unknown.
TOLD_RIGHT, TOLD_SHUFFLED, TOLD_WRONG, TOLD_UNKNOWN = "right", "shuffled", "wrong", "unknown"


@dataclass(frozen=True, order=True)
class Job:
    """One training.

    Args:
        scene: a name of `scenes.SCENES`.
        method: a name of `methods.METHODS`.
        data_seed: seed of the phantom's images; real MRI has none.
        init_seed: seed of initial weights, order of batches, augmentation, routing noise and
            dropout.
        learning_rate: one of `plan.GRID`.
    """

    scene: str
    method: str
    data_seed: int
    init_seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """The name of its files."""
        seeds = f"data{self.data_seed}-init{self.init_seed}"
        return f"{self.scene}-{self.method}-{seeds}-lr{self.learning_rate:g}"


@dataclass(frozen=True)
class Trial:
    """The result of a job, which is stored as json in the study's folder.

    Args:
        job: the job.
        parameters: number of the network's parameters.
        multiply_adds: of a forward pass over one image, of all that is active for it.
        validation: the last epoch's validation score, the mean over groups of their mean Dice, all
            regions; what chooses the learning rate.
        cases: the ids of the test cases.
        subjects: the subject of each test case; the bootstrap draws a subject's cases together.
        attributes: the attribute values of each test case; its group is the first of them.
        seen: whether each test case's combination of values occurs in training; with one attribute
            all do.
        dice: by condition, each test case's Dice of the scene's region. A blind
            network has TOLD_RIGHT alone.
        told_right: by condition, the share of the cases that received the right attributes anyway.
        loads: by condition, the experts' loads; empty without experts.
    """

    job: Job
    parameters: int
    multiply_adds: int
    validation: float
    cases: tuple[str, ...]
    subjects: tuple[str, ...]
    attributes: tuple[tuple[int, ...], ...]
    seen: tuple[bool, ...]
    dice: Mapping[str, tuple[float, ...]]
    told_right: Mapping[str, float]
    loads: Mapping[str, LoadTables]
