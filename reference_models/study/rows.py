"""From the study's trials to the rows of its tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics.fairness import group_means, worst_group
from .jobs import TOLD_RIGHT, Trial
from .methods import METHODS
from .scenes import SCENES
from .statistics import METRICS, Resampled, groups_of, load_distance, scores
from .tables import (
    CaseDice,
    Difference,
    LoadDistance,
    MethodCost,
    ScoreSummary,
    SeedSpread,
    TrialScores,
    TriedRate,
    ValueLoads,
)

COMPARED = ("overall", "es_dice", "worst", "unseen")  # of `METRICS`, in differences.csv


class StudyRows:
    """The trials of a study by what they are for; each method gives the rows of one table.

    Rows are in the order of scenes, methods and seeds.

    Args:
        tuning, main, spread: the trials, as of `runner.Outcome`.
        population: by scene, each group's share in "overall".
    """

    def __init__(
        self,
        tuning: Sequence[Trial],
        main: Sequence[Trial],
        spread: Sequence[Trial],
        population: Mapping[str, Sequence[float]],
    ) -> None:
        self._tuning, self._spread = _in_order(tuning), _in_order(spread)
        self._population = population
        # By scene, method and seed: of real MRI, initialisations alone are different.
        self._main: dict[str, dict[str, dict[int, Trial]]] = {}
        for trial in _in_order(main):
            by_method = self._main.setdefault(trial.job.scene, {})
            by_method.setdefault(trial.job.method, {})[trial.job.init_seed] = trial
        self._resampled = {
            scene: Resampled(
                by_method, population[scene], one_test_set=SCENES[scene].effect is None
            )
            for scene, by_method in self._main.items()
        }
        # What the columns of `TrialScores.dice` and `CaseDice.dice` are called.
        self.groups = tuple(_group(place) for place in range(max(map(len, population.values()))))
        self.methods = tuple(m for m in METHODS if any(m in of for of in self._main.values()))

    def _main_trials(self) -> Iterator[Trial]:
        for by_method in self._main.values():
            for by_seed in by_method.values():
                yield from by_seed.values()

    def _series(self) -> Iterator[tuple[str, str, str]]:
        """Every scene, method and condition of the main trials."""
        for scene, by_method in self._main.items():
            for method, by_seed in by_method.items():
                for condition in next(iter(by_seed.values())).dice:
                    yield scene, method, condition

    def trials(self) -> Iterator[TrialScores]:
        for trial, spread in (
            *((trial, False) for trial in self._main_trials()),
            *((trial, True) for trial in self._spread),
        ):
            for condition, dice in trial.dice.items():
                means = group_means(dice, groups_of(trial))
                found = scores(trial, condition, self._population[trial.job.scene])
                score = {metric: value.item() for metric, value in found.items()}
                yield TrialScores(
                    **_job_of(trial),
                    learning_rate=trial.job.learning_rate,
                    condition=condition,
                    told_right=trial.told_right.get(condition),
                    overall=score["overall"],
                    es_dice=score["es_dice"],
                    worst=score["worst"],
                    worst_group=worst_group(means),
                    gap=score["gap"],
                    seen=score.get("seen"),
                    unseen=score.get("unseen"),
                    validation=trial.validation,
                    parameters=trial.parameters,
                    multiply_adds=trial.multiply_adds,
                    spread=spread,
                    dice={_group(group): mean for group, mean in means.items()},
                )

    def differences(self) -> Iterator[Difference]:
        for scene, resampled in self._resampled.items():
            for (a, b), metric in itertools.product(self._pairs(scene), COMPARED):
                if (found := resampled.difference(metric, a, b)) is not None:
                    yield Difference(
                        scene=scene,
                        a=_told(*a),
                        b=_told(*b),
                        metric=metric,
                        difference=found.value,
                        low=found.low,
                        high=found.high,
                        ahead=sum(round(value, 4) > 0 for value in found.by_seed),  # as it shows
                        seeds=len(found.by_seed),
                        by_seed=found.by_seed,
                    )

    def _pairs(self, scene: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """What is compared in a scene: two pairs of a method and a condition.

        All methods are compared with each other, except the ablations, which are compared with dMoE
        alone. Every method with wrong attributes is compared with itself with right ones.
        """
        methods = [*self._main[scene]][::-1]
        whole = [m for m in methods if METHODS[m].kind != "ablation"]
        pairs = [((a, TOLD_RIGHT), (b, TOLD_RIGHT)) for a, b in itertools.combinations(whole, 2)]
        if "dmoe" in methods:
            changed = [m for m in methods[::-1] if m not in whole]
            pairs += [((method, TOLD_RIGHT), ("dmoe", TOLD_RIGHT)) for method in changed]
        return pairs + [
            ((method, condition), (method, TOLD_RIGHT))
            for of_scene, method, condition in self._series()
            if of_scene == scene and condition != TOLD_RIGHT
        ]

    def summary(self) -> Iterator[ScoreSummary]:
        for (scene, method, condition), metric in itertools.product(self._series(), METRICS):
            found = self._resampled[scene].score(metric, method, condition)
            if found is not None:
                yield ScoreSummary(
                    scene=scene,
                    method=method,
                    condition=condition,
                    metric=metric,
                    mean=found.value,
                    low=found.low,
                    high=found.high,
                    lowest=min(found.by_seed),
                    highest=max(found.by_seed),
                    seeds=len(found.by_seed),
                )

    def rates(self) -> Iterator[TriedRate]:
        tried: dict[tuple[str, str], list[Trial]] = {}
        for trial in self._tuning:
            tried.setdefault((trial.job.scene, trial.job.method), []).append(trial)
        for (scene, method), trials in tried.items():
            (taken,) = {t.job.learning_rate for t in self._main[scene][method].values()}
            rates = [trial.job.learning_rate for trial in trials]
            for rate, trial in zip(rates, trials, strict=True):
                yield TriedRate(
                    scene=scene,
                    method=method,
                    learning_rate=rate,
                    validation=trial.validation,
                    chosen=rate == taken,
                    edge=rate == taken and rate in (min(rates), max(rates)),
                )

    def _routed(self) -> Iterator[Trial]:
        """Those whose tokens can go elsewhere than to all experts alike."""
        for trial in self._main_trials():
            settings = METHODS[trial.job.method].settings
            if settings.k < settings.n_experts:
                yield trial

    def loads(self) -> Iterator[ValueLoads]:
        for trial in self._routed():
            for condition, tables in trial.loads.items():
                for attribute, table_VE in tables.items():
                    for value, shares in enumerate(table_VE):
                        yield ValueLoads(
                            **_job_of(trial),
                            condition=condition,
                            attribute=attribute,
                            value=value,
                            shares=tuple(shares),
                        )

    def load_distances(self) -> Iterator[LoadDistance]:
        for trial in self._routed():
            for attribute, table_VE in trial.loads.get(TOLD_RIGHT, {}).items():
                yield LoadDistance(
                    **_job_of(trial), attribute=attribute, distance=load_distance(table_VE)
                )

    def spread(self) -> Iterator[SeedSpread]:
        by_method: dict[tuple[str, str, int], list[Trial]] = {}
        for trial in self._spread:
            key = trial.job.scene, trial.job.method, trial.job.data_seed
            by_method.setdefault(key, []).append(trial)
        for (scene, method, data_seed), trials in by_method.items():
            main = [*self._main[scene][method].values()]
            inits = [*trials, *(trial for trial in main if trial.job.data_seed == data_seed)]
            yield SeedSpread(
                scene=scene,
                method=method,
                data_seed=data_seed,
                inits=len(inits),
                over_inits=self._deviation(inits),
                seeds=len(main),
                over_seeds=self._deviation(main),
            )

    def _deviation(self, trials: Sequence[Trial]) -> float | None:
        """The standard deviation of ES-Dice; None of a single trial."""
        found = [
            scores(trial, TOLD_RIGHT, self._population[trial.job.scene])["es_dice"].item()
            for trial in trials
        ]
        return float(np.std(found, ddof=1)) if len(found) > 1 else None

    def costs(self, milliseconds: Mapping[str, float]) -> Iterator[MethodCost]:
        """Gives each method's cost in the first scene, whose attribute values the network reads.

        Args:
            milliseconds: by method, those of a training step; it may be empty.
        """
        scene, by_method = next(iter(self._main.items()))
        networks = {method: next(iter(by_seed.values())) for method, by_seed in by_method.items()}
        adds = {method: trial.multiply_adds for method, trial in networks.items()}
        for method, trial in networks.items():
            yield MethodCost(
                scene=scene,
                method=method,
                parameters=trial.parameters,
                multiply_adds=adds[method],
                multiply_adds_of_dense=_ratio(adds, method),
                milliseconds=milliseconds.get(method),
                milliseconds_of_dense=_ratio(milliseconds, method),
            )

    def cases(self) -> Iterator[CaseDice]:
        tests: dict[tuple[str, int, int], list[Trial]] = {}
        for trial in (*self._main_trials(), *self._spread):
            job = trial.job
            tests.setdefault((job.scene, job.data_seed, job.init_seed), []).append(trial)
        for (scene, data_seed, init_seed), trials in tests.items():
            first = trials[0]
            for place, case in enumerate(first.cases):
                yield CaseDice(
                    scene=scene,
                    data_seed=data_seed,
                    init_seed=init_seed,
                    case=case,
                    group=first.attributes[place][0],
                    attributes=first.attributes[place],
                    seen=first.seen[place],
                    dice={trial.job.method: trial.dice[TOLD_RIGHT][place] for trial in trials},
                )


def _in_order(trials: Sequence[Trial]) -> list[Trial]:
    """Sorts trials by scene, method and seed, scenes and methods as they are listed."""
    scenes, methods = [*SCENES], [*METHODS]
    return sorted(
        trials, key=lambda t: (scenes.index(t.job.scene), methods.index(t.job.method), t.job)
    )


def _ratio(values: Mapping[str, float], method: str) -> float | None:
    """A method's value as a multiple of that of dense, where both are there."""
    return values[method] / values["dense"] if {method, "dense"} <= {*values} else None


def _job_of(trial: Trial) -> dict[str, Any]:
    job = trial.job
    return {
        "scene": job.scene,
        "method": job.method,
        "data_seed": job.data_seed,
        "init_seed": job.init_seed,
    }


def _group(place: int) -> str:
    return f"dice_{place}"


def _told(method: str, condition: str) -> str:
    return method if condition == TOLD_RIGHT else f"{method}@{condition}"
