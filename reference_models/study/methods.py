"""The methods that the study compares: each of them is a change of one recipe, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..recipes.networks import UNetSettings
from ..recipes.recipe import Recipe
from .candidates import CandidateSettings

# Weights of the auxiliary losses where a method has one, and group-DRO's step size: its authors'
# 0.01 is for runs of many more steps.
BALANCE, Z, GROUP_DRO_RATE = 0.01, 1e-3, 0.1
ATTRIBUTE_DROPOUT = 0.1

Kind = Literal["baseline", "robust", "dmoe", "candidate", "ablation"]


@dataclass(frozen=True)
class Method:
    """A network and how it is trained.

    Args:
        title: in words, for figures and tables.
        kind: "baseline": another network of the same multiply-adds (dense: half in the MLPs);
            "robust": the blind wide MLP, trained for its worst groups; "dmoe": the layer;
            "candidate": a change that might make a better layer; "ablation": the layer with one
            setting changed.
        settings: the settings of the network.
        recipe: further changes of the study's recipe, by name.
        scenes: the scenes on which it is trained; empty: all.
        rate_of: the method whose learning rate it takes; "": a rate is chosen for it alone.
        upcycled: whether the first half of the epochs trains a dense network, with the hidden units
            of one expert, as which all experts start the second half.
    """

    title: str
    kind: Kind
    settings: UNetSettings
    recipe: Mapping[str, Any] = field(default_factory=dict)
    scenes: tuple[str, ...] = ()
    rate_of: str = ""
    upcycled: bool = False

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe with this method's changes."""
        return dataclasses.replace(recipe, model=self.settings, **self.recipe)


_DMOE, _BLIND = UNetSettings(), UNetSettings(block="mlp")


def _candidate(title: str, **changes: Any) -> Method:
    """dMoE changed to what might be better, by settings of the candidates."""
    return Method(title, "candidate", CandidateSettings(**changes), scenes=("rule", "mri"))


def _ablation(title: str, settings: UNetSettings, upcycled: bool = False, **recipe: Any) -> Method:
    """dMoE with one setting changed, of the network or of the recipe."""
    return Method(title, "ablation", settings, recipe, ("rule",), "dmoe", upcycled)


METHODS: dict[str, Method] = {
    "dense": Method(
        "dense, half the hidden units", "baseline", UNetSettings(block="mlp", hidden=4)
    ),
    "wide": Method("blind wider MLP", "baseline", _BLIND),
    "channels": Method("attribute as input channels", "baseline", UNetSettings(block="channels")),
    "film": Method("FiLM + MLP", "baseline", UNetSettings(block="film")),
    "film-identity": Method(
        "FiLM + MLP, started as the identity",
        "baseline",
        CandidateSettings(block="film", film_identity=True),
        scenes=("rule", "mri"),
    ),
    "per_value": Method("one MLP per attribute value", "baseline", UNetSettings(block="per_value")),
    "plain": Method("plain MoE", "baseline", UNetSettings(aware=False)),
    "reweight": Method(
        "blind wider MLP, groups reweighted", "robust", _BLIND, {"fairness": "reweight"}
    ),
    "group-dro": Method(
        "blind wider MLP, GroupDRO",
        "robust",
        _BLIND,
        {"fairness": "group-dro", "group_dro_rate": GROUP_DRO_RATE},
    ),
    # By the aim of FairDRO, not by its equations; see `objectives`.
    "fair-dro": Method(
        "blind wider MLP, FairDRO's aim: tilted within groups",
        "robust",
        _BLIND,
        {"fairness": "fair-dro"},
    ),
    "dmoe": Method("dMoE", "dmoe", _DMOE),
    "dmoe-within": Method(
        "dMoE, balance loss within attribute values",
        "dmoe",
        _DMOE,
        {"balance": "within", "balance_weight": BALANCE},
    ),
    "dmoe-learned": Method(
        "dMoE, a learned router for unknown values",
        "dmoe",
        UNetSettings(unknown="learned"),
        {"attribute_dropout": ATTRIBUTE_DROPOUT},
        rate_of="dmoe",
    ),
    "merged": Method(
        "dMoE, experts merged for each sample", "dmoe", CandidateSettings(merge=True, k=8)
    ),
    "merged-k2": _candidate("dMoE, two experts merged for each sample", merge=True),
    "modulated": _candidate("dMoE, input scaled and shifted by the attribute", modulate=True),
    "film-plain": _candidate(
        "plain MoE, input scaled and shifted by the attribute", modulate=True, router="blind"
    ),
    "beside": _candidate("dMoE and a shared expert that is always on", placement="beside"),
    "sharp": _candidate("dMoE, a quarter of the router's temperature", router="sharp"),
    "noise-never": _ablation("no routing noise", UNetSettings(noise="never")),
    "noise-always": _ablation("routing noise in testing as well", UNetSettings(noise="always")),
    "k1": _ablation("1 expert for each token, twice as wide", UNetSettings(k=1)),
    "k8": _ablation("all 8 experts for each token, a quarter as wide", UNetSettings(k=8)),
    "experts2": _ablation("2 experts", UNetSettings(n_experts=2)),
    "experts4": _ablation("4 experts", UNetSettings(n_experts=4)),
    "experts16": _ablation("16 experts", UNetSettings(n_experts=16)),
    "shared-router": _ablation(
        "one router for all values, with a bias for each", CandidateSettings(router="shared")
    ),
    "after": _ablation(
        "half of the MLP, followed by experts", CandidateSettings(placement="after")
    ),
    "balance": _ablation("with the load-balancing loss", _DMOE, balance_weight=BALANCE),
    "importance": _ablation(
        "with the importance loss", _DMOE, balance="importance", balance_weight=BALANCE
    ),
    "z-loss": _ablation("with the router z-loss", _DMOE, z_weight=Z),
    "upcycled": _ablation(
        "upcycled from a dense network after half the epochs", _DMOE, upcycled=True
    ),
}
