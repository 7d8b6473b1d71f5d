"""Masks at native resolution by a trained run: by one network, or by several together.

Shapes: B samples of a batch, C channels, K classes, S spatial axes, N cases, A attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from dmoe_layer import routing

from ..data.cases import Sample
from ..data.framing import Frame
from ..errors import DataError
from ..metrics.loads import ExpertLoads
from ..models.inference import infer
from .framed import FramedCases, stacked, unbroken
from .trained_run import Member, Panel, TrainedRun

_SLAB = 16  # voxels along the first axis whose probabilities are added at once


class NonFiniteOutputError(DataError):
    """Logits that are no numbers; says of which case."""


def predictions(
    run: TrainedRun, told: Mapping[str, np.ndarray], loads: Mapping[str, ExpertLoads] | None = None
) -> Iterator[tuple[Sample, dict[str, np.ndarray]]]:
    """Every case with its masks, read once and held for no longer than its batch.

    At its end it says on stderr in how many voxels an exported file's masks differ from PyTorch's.

    Args:
        run: whose cases.
        told: by condition, the attributes (N, A) that the network is told.
        loads: by condition, where to add the experts' loads.

    Yields:
        The sample and its mask by condition, uint8 at native resolution.

    Raises:
        DataError: a case cannot be read, or a network gives no finite numbers for it.
    """
    start = 0
    for panel in run.panels:
        loader = DataLoader(
            FramedCases(run.dataset, panel.cases, run.framing),
            batch_size=run.batch_size if run.framing.one_size else 1,
            num_workers=run.settings.workers,
            collate_fn=unbroken,
        )
        for batch in track(loader, "predicting", console=Console(stderr=True), transient=True):
            if isinstance(batch, DataError):
                raise batch
            found = _answered(run, panel, batch, told, start, loads)
            start += len(found)
            batch.clear()  # the bar holds on to it while the next one, maybe large, is read
            while found:
                yield found.pop(0)
    if run.twin is not None:
        Console(stderr=True, soft_wrap=True).print(run.twin.note(), markup=False)


def _answered(
    run: TrainedRun,
    panel: Panel,
    batch: Sequence[tuple[Sample, Frame]],
    told: Mapping[str, np.ndarray],
    start: int,
    loads: Mapping[str, ExpertLoads] | None,
) -> list[tuple[Sample, dict[str, np.ndarray]]]:
    """The samples of a batch, of which `start` were before, with their masks by condition."""
    samples, frames = zip(*batch, strict=True)
    inputs = [stacked([frame.image_CS for frame in frames])]
    if frames[0].body_S is not None:
        inputs.append(stacked([frame.body_S for frame in frames]))
    asked = _Asked(samples, inputs, start)
    answers: list[tuple[Sample, dict[str, np.ndarray]]] = [(sample, {}) for sample in samples]
    for condition, told_NA in told.items():
        observe = None if loads is None else loads[condition].add
        found = _masks(run, panel.members, asked, condition, told_NA, observe)
        if run.twin is not None:  # of the two it has experts that can be observed
            twins = [replace(member, model=run.twin.model) for member in panel.members]
            own = _masks(run, twins, asked, condition, told_NA, observe)
            run.twin.compare(found, own)
        for mask_S, (_, masks) in zip(found, answers, strict=True):
            masks[condition] = mask_S
    return answers


class _Asked(NamedTuple):
    """A batch's samples, what the network sees of them, and how many came before it."""

    samples: Sequence[Sample]
    inputs: list[Tensor]
    start: int


@torch.inference_mode()
def _masks(
    run: TrainedRun,
    members: Sequence[Member],
    asked: _Asked,
    condition: str,
    told_NA: np.ndarray,
    observe: Callable[[routing], object] | None,
) -> list[np.ndarray]:
    """The networks' masks of a batch, told the attributes of a condition.

    Of several networks the masks are of the mean of their probabilities. It is summed up network by
    network, and brought to native resolution as a logarithm, as logits are, so that a network and
    its copy answer as it does alone.
    """
    logits_BKS = _logits(run, members[0], asked, condition, told_NA, observe)
    if len(members) > 1:
        for part in logits_BKS.split(_SLAB, dim=2):
            part.copy_(part.log_softmax(1))
    for member in members[1:]:
        added_BKS = _logits(run, member, asked, condition, told_NA, observe)
        for total, part in zip(
            logits_BKS.split(_SLAB, dim=2), added_BKS.split(_SLAB, dim=2), strict=True
        ):
            torch.logaddexp(total, part.log_softmax(1), out=total)
    return [
        run.framing.restore(logits_KS, sample)
        for logits_KS, sample in zip(logits_BKS, asked.samples, strict=True)
    ]


def _logits(
    run: TrainedRun,
    member: Member,
    asked: _Asked,
    condition: str,
    told_NA: np.ndarray,
    observe: Callable[[routing], object] | None,
) -> Tensor:
    """A network's logits (B, K, S) of a batch.

    Raises:
        NonFiniteOutputError: a case has some that are no finite numbers.
    """
    samples, inputs, start = asked
    with torch.random.fork_rng():
        # For a router that is noisy in evaluation too: whatever else is run, a case gets the same
        # noise.
        torch.manual_seed(start)
        logits_BKS = infer(
            member.model,
            inputs,
            torch.from_numpy(told_NA[start : start + len(samples)]),
            windows=run.windows,
            device=run.device,
            observe=observe,
        )
    for logits_KS, sample in zip(logits_BKS, samples, strict=True):
        # By the extremes, as asking every number takes a copy of a volume's logits.
        if not torch.stack(logits_KS.aminmax()).isfinite().all():
            raise NonFiniteOutputError(
                f"{member.folder}: the network's output for {sample.case_id} is not finite "
                f"(attributes {condition}); its weights or this image are damaged."
            )
    return logits_BKS
