"""Scores a network on the validation split by group, to choose the best checkpoint.

Shapes: B samples, C channels, S spatial axes, N attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.cases import IGNORED, Dataset
from ..data.loading import Batch
from ..data.patches import Windows
from ..metrics import fairness, region
from ..metrics.loads import ExpertLoads, LoadTables
from ..models.inference import infer
from ..report.pictures import Picture

# A case's attribute values and its mean Dice.
_CaseScore: TypeAlias = tuple[tuple[int, ...], float]


@dataclass(frozen=True)
class Validation:
    """Scores at the network's resolution; the report has scores at native resolution.

    Args:
        score: the mean Dice of each group of the first attribute, averaged over the groups, so that
            a minority counts as much as a majority. Cases with an unknown value are a group.
        dice: the mean Dice of each group by attribute and value, such as "race=Black". The Dice of
            a case is the mean over the data set's regions. Values without a case are left out.
        load: by attribute, the share of tokens that each value (row) sends to each expert (column);
            empty if there are no experts.
        examples: one case of each group of the first attribute, of those that this rank scored.
    """

    score: float
    dice: dict[str, float]
    load: LoadTables
    examples: tuple[Picture, ...]


def share_of(case_ids: tuple[str, ...], rank: int, world_size: int) -> tuple[str, ...]:
    """Gives a rank's validation cases; every rank has as many, and the first cases fill the gaps.

    With FSDP all ranks take part in every forward pass, so no rank may have one more.

    Example:
        >>> [share_of(("a", "b", "c"), rank, 2) for rank in (0, 1)]
        [('a', 'c'), ('b', 'a')]
    """
    short = -len(case_ids) % world_size
    repeated = case_ids * math.ceil(short / len(case_ids))
    return (case_ids + repeated[:short])[rank::world_size]


@torch.no_grad()
def validate(
    model: nn.Module,
    batches: Iterable[Batch],
    dataset: Dataset,
    device: torch.device,
    *,
    windows: Windows | None = None,
    affine: np.ndarray | None = None,
) -> Validation:
    """Runs the network in eval mode over a rank's share of the cases, and gathers all scores.

    A case that two ranks have counts once in the scores and twice in the load.

    Args:
        model: the network, on `device`.
        batches: this rank's share; every rank has as many batches.
        dataset: the data set of the cases.
        device: the device that computes.
        windows: as for `infer`.
        affine: the affine of the frames, as in `Framing.affine`.
    """
    was_training = model.training
    model.eval()
    scored: dict[str, _CaseScore] = {}
    examples: dict[int, Picture] = {}
    loads = ExpertLoads(dataset)
    for batch in batches:
        # Volumes stay on the CPU, where their logits are assembled.
        moved = batch.to(device if windows is None else torch.device("cpu"))
        predicted_BS = infer(
            model,
            moved.inputs,
            moved.attributes_BN,
            windows=windows,
            device=device,
            observe=loads.add,
        ).argmax(1)
        dice_B = case_dice(predicted_BS, moved.mask_BS, dataset)
        attributes = batch.attributes_BN.tolist()
        scored |= {
            case: (tuple(values), dice)
            for case, values, dice in zip(batch.case_ids, attributes, dice_B, strict=True)
        }
        for b, values in enumerate(attributes):
            if values[0] not in examples:
                examples[values[0]] = Picture.of(
                    batch.case_ids[b],
                    batch.image_BCS[b].numpy(),
                    batch.mask_BS[b].numpy(),
                    predicted_BS[b].cpu().numpy(),
                    affine,
                )
    model.train(was_training)
    scored, loads = _gathered(scored, loads, dataset)
    score, dice = _by_group(scored, dataset)
    return Validation(score, dice, loads.tables(), tuple(examples.values()))


def _gathered(
    scored: dict[str, _CaseScore], loads: ExpertLoads, dataset: Dataset
) -> tuple[dict[str, _CaseScore], ExpertLoads]:
    """Gathers the scores by case, and the loads, of all ranks."""
    if not dist.is_initialized():
        return scored, loads
    shares: list[tuple[dict[str, _CaseScore], ExpertLoads]] = [
        (scored, loads)
    ] * dist.get_world_size()
    dist.all_gather_object(shares, (scored, loads))  # from this run's own processes
    everybody = {case: result for share, _ in shares for case, result in share.items()}
    return everybody, ExpertLoads.together(dataset, [share for _, share in shares])


def _by_group(scored: dict[str, _CaseScore], dataset: Dataset) -> tuple[float, dict[str, float]]:
    """Computes the score, and the groups' mean Dice, as in `Validation`."""
    # Cases are sorted, so that sums agree to the last bit whatever the number of ranks.
    results = [scored[case] for case in sorted(scored)]
    dice: dict[str, float] = {}
    score = 0.0
    for n, attribute in enumerate(dataset.attributes):
        means = fairness.group_means([d for _, d in results], [values[n] for values, _ in results])
        dice |= {f"{attribute.name}={attribute.label(g)}": mean for g, mean in means.items()}
        if n == 0:
            score = math.fsum(means.values()) / len(means)
    return score, dice


def case_dice(predicted_BS: Tensor, truth_BS: Tensor, dataset: Dataset) -> list[float]:
    """Computes each case's Dice, averaged over the regions, over pixels that are not `IGNORED`."""
    kept_BS = truth_BS != IGNORED
    by_region = []
    for labels in dataset.regions.values():
        wanted = torch.tensor(labels, device=truth_BS.device)
        by_region.append(
            region.batch_dice(
                torch.isin(predicted_BS, wanted) & kept_BS, torch.isin(truth_BS, wanted)
            )
        )
    return [math.fsum(scores) / len(scores) for scores in zip(*by_region, strict=True)]
