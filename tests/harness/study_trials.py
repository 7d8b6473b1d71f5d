"""Made-up trials of the study, as a full run would leave them: seeded, quick, and of no meaning."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from reference_models.study.jobs import (
    TOLD_RIGHT,
    TOLD_SHUFFLED,
    TOLD_UNKNOWN,
    TOLD_WRONG,
    Job,
    Trial,
)
from reference_models.study.methods import METHODS
from reference_models.study.results import write_tables
from reference_models.study.scenes import SCENES
from reference_models.study.statistics import Resampled

SEEDS = (10, 11, 12, 13, 14)
SHARES = (0.7, 0.2, 0.1)
GRID = (0.003, 0.006, 0.012)
SPREAD = ("dense", "film", "dmoe")

# Mean Dice of a network that is told nothing, and what telling it is worth.
_LEVELS = {
    "rule": (0.65, 0.2),
    "appearance": (0.72, 0.02),
    "none": (0.8, 0.0),
    "two": (0.55, 0.25),
    "mri": (0.7, 0.2),
}


def _methods_of(scene: str, methods: Sequence[str] = tuple(METHODS)) -> tuple[str, ...]:
    """Those that are tried in a scene: ablations in the first alone."""
    return tuple(m for m in methods if scene == "rule" or METHODS[m].kind != "ablation")


def made_population(
    scenes: Sequence[str] = tuple(SCENES), shares: tuple[float, ...] = SHARES
) -> dict[str, tuple[float, ...]]:
    """By scene, the share of every value of the first attribute; MRI has its own."""
    return {scene: SHARES if scene == "mri" else shares for scene in scenes}


def made_milliseconds(methods: Sequence[str] = tuple(METHODS)) -> dict[str, float]:
    """By method, the milliseconds of a training step."""
    return {method: 20.0 + 1.5 * place for place, method in enumerate(methods)}


def made_trials(
    scenes: Sequence[str] = tuple(SCENES),
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = SEEDS,
    *,
    shares: tuple[float, ...] = SHARES,
    cases_per_group: int = 8,
) -> dict[str, list[Trial]]:
    """What a study leaves, as `write_tables` takes it: "tuning", "main" and "spread".

    The rates that were chosen lie in the grid's middle, and dense's at its end.
    """
    trials: dict[str, list[Trial]] = {"tuning": [], "main": [], "spread": []}
    for scene in scenes:
        for method in _methods_of(scene, methods):
            rate = GRID[2 if method == "dense" else 1]
            first, *others = seeds
            jobs = {"main": [Job(scene, method, seed, 1000 + seed, rate) for seed in seeds]}
            if not METHODS[method].rate_of:
                jobs["tuning"] = [Job(scene, method, first, 1000 + first, r) for r in GRID]
            if scene == "rule" and method in SPREAD:
                jobs["spread"] = [Job(scene, method, first, 1000 + s, rate) for s in others]
            for purpose, asked in jobs.items():
                trials[purpose] += [made_trial(job, shares, cases_per_group) for job in asked]
    return trials


def write_made_tables(
    folder: Path,
    scenes: Sequence[str] = tuple(SCENES),
    methods: Sequence[str] = tuple(METHODS),
    seeds: Sequence[int] = SEEDS,
    *,
    shares: tuple[float, ...] = SHARES,
    cases_per_group: int = 8,
) -> None:
    """The tables of such a study, into a folder that is there."""
    write_tables(
        folder,
        **made_trials(scenes, methods, seeds, shares=shares, cases_per_group=cases_per_group),
        population=made_population(scenes, shares),
        milliseconds=made_milliseconds(methods),
        settings={"quick": False, "seeds": list(seeds), "shares": list(shares), "rule": "margin"},
        seconds=3600.0,
    )


def made_trial(job: Job, shares: tuple[float, ...], cases_per_group: int) -> Trial:
    """One of them: told methods are better, and worse when they are told something else."""
    subjects, attributes, seen = _test_set(job.scene, shares, cases_per_group)
    place = [*METHODS].index(job.method)
    rng = np.random.default_rng(
        [job.data_seed, job.init_seed, place, round(1e4 * job.learning_rate)]
    )
    # What is hard about a case is hard for every method.
    data_seed = 0 if job.scene == "mri" else job.data_seed
    hard_N = np.random.default_rng(data_seed).normal(0, 0.05, len(subjects))
    level, worth = _LEVELS[job.scene]
    group_N = np.array([values[0] for values in attributes])
    blind_N = level - 0.03 * group_N + hard_N + rng.normal(0, 0.02) + rng.normal(0, 0.02, len(seen))
    told = METHODS[job.method].settings.told
    gains = {TOLD_RIGHT: 1.0}
    if told:
        gains |= {TOLD_SHUFFLED: -0.5, TOLD_WRONG: -1.0, TOLD_UNKNOWN: -0.3}
    dice = {
        condition: blind_N
        + told * gain * worth * np.where(seen, 1, 0.4)
        + rng.normal(0, 0.01, len(seen))
        for condition, gain in gains.items()
    }
    loads = {}
    if METHODS[job.method].settings.block == "moe":
        names = {"two": ("site", "protocol"), "mri": ("protocol",)}.get(job.scene, ("site",))
        n_values = len(set(group_N.tolist()))
        # Of cases that are told nothing, none has a value.
        loads = {c: {} if c == TOLD_UNKNOWN else _loads(rng, names, n_values) for c in gains}
    return Trial(
        job=job,
        parameters=30_000 + 100 * place,
        multiply_adds=5_000_000 + 1000 * place,
        validation=float(
            dice[TOLD_RIGHT].mean()
            - 0.1 * (job.learning_rate != GRID[2 if job.method == "dense" else 1])
        ),
        cases=tuple(
            f"{subject}-{values[0]}" for subject, values in zip(subjects, attributes, strict=True)
        ),
        subjects=subjects,
        attributes=attributes,
        seen=seen,
        dice={condition: tuple(np.clip(d, 0, 1).tolist()) for condition, d in dice.items()},
        told_right={c: {TOLD_RIGHT: 1.0, TOLD_SHUFFLED: 0.35}.get(c, 0.0) for c in gains}
        if told
        else {},
        loads=loads,
    )


def trial(dice, attributes, *, method="dmoe", seed=10, subjects=None, seen=None, **conditions):
    """A trial with these Dice, of which no more matters."""
    names = tuple(f"case{place}" for place in range(len(dice)))
    return Trial(
        job=Job("rule", method, seed, 1000 + seed, 0.006),
        parameters=1,
        multiply_adds=1,
        validation=0.5,
        cases=names,
        subjects=names if subjects is None else tuple(subjects),
        attributes=tuple(attributes),
        seen=(True,) * len(dice) if seen is None else tuple(seen),
        dice={name: tuple(values) for name, values in {"right": dice, **conditions}.items()},
        told_right={},
        loads={},
    )


def resampled(dice_a, dice_b, attributes, *, shared=False, resamples=2000, population=(0.7, 0.3)):
    """Two methods; Dice [seed][case]."""
    trials = {
        method: {s: trial(dice, attributes, method=method, seed=s) for s, dice in enumerate(rows)}
        for method, rows in (("dmoe", dice_a), ("film", dice_b))
    }
    return Resampled(trials, population, one_test_set=shared, resamples=resamples)


def _test_set(
    scene: str, shares: tuple[float, ...], cases_per_group: int
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...], tuple[bool, ...]]:
    """Subjects, attributes, seen; of MRI every subject has a case in every group."""
    values = range(len(SHARES if scene == "mri" else shares))
    if scene == "two":
        combinations = [*product(values, range(2))]
        attributes = [combination for combination in combinations for _ in range(cases_per_group)]
        # Of the values but the first, half of the combinations are unseen.
        seen = [site == 0 or site % 2 == protocol for site, protocol in attributes]
    else:
        attributes = [(value,) for value in values for _ in range(cases_per_group)]
        seen = [True] * len(attributes)
    subjects = [f"phantom{place:05}" for place in range(len(attributes))]
    if scene == "mri":
        subjects = [f"slice{place % cases_per_group:03}" for place in range(len(attributes))]
    return tuple(subjects), tuple(attributes), tuple(seen)


def _loads(rng, names: Sequence[str], n_values: int) -> dict[str, tuple[tuple[float, ...], ...]]:
    """A row a value: `n_values` of the first attribute, two of the second."""
    return {
        name: tuple(map(tuple, rng.dirichlet(np.ones(8), 2 if place else n_values).tolist()))
        for place, name in enumerate(names)
    }
