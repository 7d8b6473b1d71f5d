"""Which networks are trained for the study of unknown attributes, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..jobs import Job
from ..methods import METHODS
from ..plan import INIT_SEED
from ..tables import TriedRate

SCENES_TRIED = ("rule", "appearance", "mri")
METHODS_TRIED = ("dmoe", "dmoe-learned", "film", "wide")
# None of the study's: learning rates were chosen on its seed 10.
SEEDS = (20, 21, 22, 23, 24)


def jobs(rates: Sequence[TriedRate]) -> Iterator[Job]:
    """All jobs, one seed of everything before the next.

    Args:
        rates: those that the study tried.
    """
    chosen = {(row.scene, row.method): row.learning_rate for row in rates if row.chosen}
    for seed in SEEDS:
        for scene in SCENES_TRIED:
            for method in METHODS_TRIED:
                rate = chosen[scene, METHODS[method].rate_of or method]
                yield Job(scene, method, seed, INIT_SEED + seed, rate)
