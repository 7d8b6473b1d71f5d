"""What the study is made of: jobs, one training each, and what a job leaves, a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..metrics.loads import LoadTables

# The conditions under which a trained network is tested: told each case's own attributes, those of
# another case, always wrong ones, or that they are unknown.
TOLD_RIGHT, TOLD_SHUFFLED, TOLD_WRONG, TOLD_UNKNOWN = "right", "shuffled", "wrong", "unknown"


@dataclass(frozen=True, order=True)
class Job:
    """One training.

    Args:
        scene: a name of `scenes.SCENES`.
        method: a name of `methods.METHODS`.
        data_seed: of the phantom's images; real MRI has none.
        init_seed: of initial weights, order of batches, augmentation, routing noise and dropout.
        learning_rate: of the grid.
    """

    scene: str
    method: str
    data_seed: int
    init_seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        """That of its files."""
        seeds = f"data{self.data_seed}-init{self.init_seed}"
        return f"{self.scene}-{self.method}-{seeds}-lr{self.learning_rate:g}"


@dataclass(frozen=True)
class Trial:
    """What a job leaves; as json in the study's folder.

    Args:
        job: whose.
        parameters: of the network.
        multiply_adds: of a forward pass over one image, of all that is active for it.
        validation: the last epoch's validation score, the mean over groups of their mean Dice, all
            regions; what chooses the learning rate.
        cases: ids of the test cases.
        subjects: of the test cases: cases of one subject are drawn together by the bootstrap.
        attributes: of the test cases, one tuple each; the groups are those of the first.
        seen: of the test cases, whether their combination of attribute values occurs in training;
            of one attribute all do.
        dice: by condition, a number a test case, of the scene's region. Networks that are told no
            attribute have TOLD_RIGHT alone.
        told_right: by condition, the share of the cases that were told the truth all the same.
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
