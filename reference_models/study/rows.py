"""From trials to the rows of the study's tables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..metrics.fairness import group_means, worst_group
from .jobs import RIGHT, Trial
from .methods import METHODS
from .scenes import SCENES
from .statistics import METRICS, Resampled, groups_of, load_distance, scores

DIFFERENCES = ("overall", "es_dice", "worst", "unseen")

Row = dict[str, Any]


class Found:
    """The trials by what they are for, in the order of scenes, methods and seeds; rows of them."""

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
        self.methods = tuple(m for m in METHODS if any(m in of for of in self._main.values()))

    def _main_trials(self) -> Iterator[Trial]:
        for by_method in self._main.values():
            for by_seed in by_method.values():
                yield from by_seed.values()

    def _series(self) -> Iterator[tuple[str, str, str]]:
        """Scene, method and condition."""
        for scene, by_method in self._main.items():
            for method, by_seed in by_method.items():
                for condition in next(iter(by_seed.values())).dice:
                    yield scene, method, condition

    def trials(self) -> Iterator[Row]:
        for trial, spread in (
            *((trial, False) for trial in self._main_trials()),
            *((trial, True) for trial in self._spread),
        ):
            for condition, dice in trial.dice.items():
                means = group_means(dice, groups_of(trial))
                found = scores(trial, condition, self._population[trial.job.scene])
                yield {
                    **_whose(trial),
                    "learning_rate": f"{trial.job.learning_rate:g}",
                    "condition": condition,
                    "told_right": trial.told_right.get(condition),
                    **{metric: value.item() for metric, value in found.items()},
                    "worst_group": worst_group(means),
                    "validation": trial.validation,
                    "parameters": trial.parameters,
                    "multiply_adds": trial.multiply_adds,
                    "spread": spread,
                    **{f"dice_{group}": mean for group, mean in means.items()},
                }

    def differences(self) -> Iterator[Row]:
        for scene, resampled in self._resampled.items():
            methods = [*self._main[scene]][::-1]
            whole = [m for m in methods if METHODS[m].kind != "ablation"]
            pairs = [((a, RIGHT), (b, RIGHT)) for a, b in itertools.combinations(whole, 2)]
            if "dmoe" in methods:
                changed = [m for m in methods[::-1] if m not in whole]
                pairs += [((method, RIGHT), ("dmoe", RIGHT)) for method in changed]
            pairs += [
                ((method, condition), (method, RIGHT))
                for of_scene, method, condition in self._series()
                if of_scene == scene and condition != RIGHT
            ]
            for (a, b), metric in itertools.product(pairs, DIFFERENCES):
                if (found := resampled.difference(metric, a, b)) is not None:
                    yield {
                        "scene": scene,
                        "a": _shown(*a),
                        "b": _shown(*b),
                        "metric": metric,
                        "difference": found.value,
                        "low": found.low,
                        "high": found.high,
                        "ahead": sum(round(value, 4) > 0 for value in found.by_seed),  # as it shows
                        "seeds": len(found.by_seed),
                        "by_seed": found.by_seed,
                    }

    def summary(self) -> Iterator[Row]:
        for (scene, method, condition), metric in itertools.product(self._series(), METRICS):
            found = self._resampled[scene].score(metric, method, condition)
            if found is not None:
                yield {
                    "scene": scene,
                    "method": method,
                    "condition": condition,
                    "metric": metric,
                    "mean": found.value,
                    "low": found.low,
                    "high": found.high,
                    "lowest": min(found.by_seed),
                    "highest": max(found.by_seed),
                    "seeds": len(found.by_seed),
                }

    def rates(self) -> Iterator[Row]:
        tried: dict[tuple[str, str], list[Trial]] = {}
        for trial in self._tuning:
            tried.setdefault((trial.job.scene, trial.job.method), []).append(trial)
        for (scene, method), trials in tried.items():
            (taken,) = {t.job.learning_rate for t in self._main[scene][method].values()}
            rates = [trial.job.learning_rate for trial in trials]
            for rate, trial in zip(rates, trials, strict=True):
                yield {
                    "scene": scene,
                    "method": method,
                    "learning_rate": f"{rate:g}",
                    "validation": trial.validation,
                    "chosen": rate == taken,
                    "edge": rate == taken and rate in (min(rates), max(rates)),
                }

    def _routed(self) -> Iterator[Trial]:
        """Those whose tokens can go elsewhere than to all experts alike."""
        for trial in self._main_trials():
            settings = METHODS[trial.job.method].settings
            if settings.k < settings.n_experts:
                yield trial

    def loads(self) -> Iterator[Row]:
        for trial in self._routed():
            for condition, tables in trial.loads.items():
                for attribute, table_VE in tables.items():
                    for value, shares in enumerate(table_VE):
                        yield {
                            **_whose(trial),
                            "condition": condition,
                            "attribute": attribute,
                            "value": value,
                            "shares": tuple(shares),
                        }

    def load_distances(self) -> Iterator[Row]:
        for trial in self._routed():
            for attribute, table_VE in trial.loads.get(RIGHT, {}).items():
                distance = load_distance(table_VE)
                yield {**_whose(trial), "attribute": attribute, "distance": distance}

    def spread(self) -> Iterator[Row]:
        """Standard deviations of ES-Dice, each over all that a method has."""
        by_method: dict[tuple[str, str, int], list[Trial]] = {}
        for trial in self._spread:
            key = trial.job.scene, trial.job.method, trial.job.data_seed
            by_method.setdefault(key, []).append(trial)
        for (scene, method, data_seed), trials in by_method.items():
            main = [*self._main[scene][method].values()]
            inits = [*trials, *(trial for trial in main if trial.job.data_seed == data_seed)]
            yield {
                "scene": scene,
                "method": method,
                "data_seed": data_seed,
                "inits": len(inits),
                "over_inits": self._deviation(inits),
                "seeds": len(main),
                "over_seeds": self._deviation(main),
            }

    def _deviation(self, trials: Sequence[Trial]) -> float | None:
        found = [
            scores(trial, RIGHT, self._population[trial.job.scene])["es_dice"].item()
            for trial in trials
        ]
        return float(np.std(found, ddof=1)) if len(found) > 1 else None

    def costs(self, milliseconds: Mapping[str, float]) -> Iterator[Row]:
        """Of the first scene: what a network has of attributes is the scene's."""
        scene, by_method = next(iter(self._main.items()))
        networks = {method: next(iter(by_seed.values())) for method, by_seed in by_method.items()}
        adds = {method: trial.multiply_adds for method, trial in networks.items()}
        for method, trial in networks.items():
            yield {
                "scene": scene,
                "method": method,
                "parameters": trial.parameters,
                "multiply_adds": adds[method],
                "multiply_adds_of_dense": _ratio(adds, method),
                "milliseconds": milliseconds.get(method),
                "milliseconds_of_dense": _ratio(milliseconds, method),
            }

    def cases(self) -> Iterator[Row]:
        tests: dict[tuple[str, int, int], list[Trial]] = {}
        for trial in (*self._main_trials(), *self._spread):
            job = trial.job
            tests.setdefault((job.scene, job.data_seed, job.init_seed), []).append(trial)
        for (scene, data_seed, init_seed), trials in tests.items():
            first = trials[0]
            for place, case in enumerate(first.cases):
                yield {
                    "scene": scene,
                    "data_seed": data_seed,
                    "init_seed": init_seed,
                    "case": case,
                    "group": first.attributes[place][0],
                    "attributes": first.attributes[place],
                    "seen": first.seen[place],
                    **{trial.job.method: trial.dice[RIGHT][place] for trial in trials},
                }


def _in_order(trials: Sequence[Trial]) -> list[Trial]:
    """By scene, method and seed, scenes and methods as they are listed."""
    scenes, methods = [*SCENES], [*METHODS]
    return sorted(
        trials, key=lambda t: (scenes.index(t.job.scene), methods.index(t.job.method), t.job)
    )


def _ratio(values: Mapping[str, float], method: str) -> float | None:
    """To that of dense, where both are there."""
    return values[method] / values["dense"] if {method, "dense"} <= {*values} else None


def _whose(trial: Trial) -> Row:
    job = trial.job
    return {
        "scene": job.scene,
        "method": job.method,
        "data_seed": job.data_seed,
        "init_seed": job.init_seed,
    }


def _shown(method: str, condition: str) -> str:
    return method if condition == RIGHT else f"{method}@{condition}"
