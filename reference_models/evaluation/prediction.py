"""A trained run's masks at native resolution, and `predict`, which writes them with overlays.

Shapes: B samples of a batch, C channels, K classes, S spatial axes, N cases, A attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dmoe_layer import routing

from ..data import open_dataset
from ..data.cases import UNKNOWN, Case, Dataset, Sample
from ..data.framing import Frame, Framing
from ..data.patches import Windows
from ..data.splits import read_splits
from ..errors import DataError, shown
from ..export.onnx_network import Twin, open_onnx
from ..files import write_results
from ..metrics.loads import ExpertLoads
from ..models.inference import infer
from ..report.pictures import Picture, overlay
from ..training.checkpoints import Which, load_model
from ..training.runs import Task
from .framed import FramedCases, stacked, unbroken
from .masks import write_mask


class NonFiniteOutputError(DataError):
    """Logits that are no numbers; says of which case."""


@dataclass(frozen=True)
class RunSettings:
    """Which trained run, on which of its cases, and how."""

    run: Path
    """The run's folder."""
    which: Which = "best"
    """The checkpoint to load."""
    root: Path | None = None
    """Folder of the data, if they no longer lie where the run found them."""
    batch_size: int | None = None
    """Number of images, or windows of a volume, at a time; by default as many as in training."""
    workers: int = 0
    """Number of processes that read cases."""
    device: str | None = None
    """Device that the network runs on, such as cpu or cuda; by default a GPU if there is one."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is not known; the evaluation of a run that was trained so
    does anyway."""
    onnx: Path | None = None
    """A file that `export` has written of this run: onnxruntime computes the masks, on the CPU, and
    the console says in how many voxels they differ from PyTorch's."""


@dataclass(frozen=True)
class PredictSettings(RunSettings):
    """Masks (`masks/<case id>.png` or .nii.gz, label values, native size) and overlays of a run."""

    split: Literal["train", "validation", "test", "all"] = "test"
    """The split whose cases are predicted; all: every case of the data, such as those of another
    --root. Cases of a folder need no mask to be predicted."""
    out: Path | None = None
    """Folder to write; by default predictions-<split> in the run's folder."""


@dataclass(frozen=True)
class TrainedRun:
    """A trained network, its data and the cases asked for.

    Args:
        settings: what was asked for.
        batch_size: images, or windows of a volume, at a time.
        unknown: the policy that it was trained with for unknown attributes, None if it is not told
            any. Trained with "error", it takes the average over the values here.
        model: in eval mode on `device`.
        twin: where the model is an exported file's, PyTorch's network beside it; else None.
        device: where they compute.
        dataset: the run's.
        framing: from native resolution to what the network sees, and back.
        windows: in which it answers volumes; None of images.
        trained: ids of the cases that it was trained on, and of those then left out; of the split
            "all" none, since other data than the run's may be meant.
        cases: to be predicted.
        left_out: those whose attribute is not known, where leaving them out was asked for.
    """

    settings: RunSettings
    batch_size: int
    unknown: str | None
    model: nn.Module
    twin: Twin | None
    device: torch.device
    dataset: Dataset
    framing: Framing
    windows: Windows | None
    trained: frozenset[str]
    cases: tuple[Case, ...]
    left_out: tuple[Case, ...]


def open_run(settings: RunSettings, split: str) -> TrainedRun:
    """Loads a run for prediction.

    Raises:
        RunError: there is no such run or checkpoint, or it is damaged; or the file of --onnx is not
            of this run.
        DataError: the data cannot be read or are not the run's, a device or batch size cannot be
            used, or there are cases whose attribute is not known and no route for them.
    """
    if settings.batch_size is not None and settings.batch_size < 1:
        raise DataError(f"batch_size: got {settings.batch_size}, expected 1 or more.")
    recipe, task, model = load_model(settings.run, settings.which, refuse_unknown=False)
    twin = None
    if settings.onnx is not None:
        if settings.device not in (None, "cpu"):
            raise DataError(f"device: got {settings.device}, but --onnx is run on the CPU.")
        twin = Twin(settings.onnx, model)
    device = torch.device("cpu") if twin else _device(settings.device)
    network = model if twin is None else open_onnx(twin.file, settings.run, recipe, task, model)
    data = recipe.data
    if settings.root is not None:
        data = dataclasses.replace(data, root=settings.root)
    dataset = open_dataset(data, known=task.attributes)
    if differing := task.differences(Task.of(dataset)):
        raise DataError(
            f"{settings.run}: was trained for other data: {'; '.join(differing)}. Correct the "
            "names in the data if only they differ; else train on such data."
        )
    cases = tuple(dataset.cases)
    trained: frozenset[str] = frozenset()
    if split != "all":
        splits = read_splits(settings.run / "splits.json", dataset, needed=())
        trained, chosen = frozenset(splits.train), set(getattr(splits, split))
        cases = tuple(case for case in cases if case.case_id in chosen)
    policy = recipe.model.unknown if recipe.model.told else None
    left_out: tuple[Case, ...] = ()
    if settings.leave_out_unknown or recipe.leave_out_unknown:
        left_out = tuple(case for case in cases if UNKNOWN in case.attributes)
        cases = tuple(case for case in cases if case not in left_out)
    elif policy == "error":
        _require_known(cases, split)
    if not cases:
        raise DataError(
            f"{settings.run}: no {split} case is left to predict; choose another --split."
        )
    batch_size = settings.batch_size or recipe.batch_size
    return TrainedRun(
        settings=settings,
        batch_size=batch_size,
        unknown=policy,
        model=network.to(device),
        twin=twin,
        device=device,
        dataset=dataset,
        framing=recipe.framing.build(),
        windows=recipe.framing.windows(batch_size),
        trained=trained,
        cases=cases,
        left_out=left_out,
    )


def _require_known(cases: Sequence[Case], split: str) -> None:
    """Raises for cases whose attribute is not known."""
    if unknown := [case.case_id for case in cases if UNKNOWN in case.attributes]:
        raise DataError(
            f"{len(unknown)} of {len(cases)} {split} cases have an attribute that is not known "
            f"({shown(unknown)}), and the run was trained with unknown='error', so that there is "
            "no route for them. Leave them out with --leave-out-unknown, or train with --unknown "
            "learned."
        )


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
        DataError: a case cannot be read, or the network gives no finite numbers for it.
    """
    loader = DataLoader(
        FramedCases(run.dataset, run.cases, run.framing),
        batch_size=run.batch_size if run.framing.one_size else 1,
        num_workers=run.settings.workers,
        collate_fn=unbroken,
    )
    start = 0
    for batch in track(loader, "predicting", console=Console(stderr=True), transient=True):
        if isinstance(batch, DataError):
            raise batch
        found = _answered(run, batch, told, start, loads)
        start += len(found)
        batch.clear()  # the bar holds on to it while the next one, maybe a large volume, is read
        while found:
            yield found.pop(0)
    if run.twin is not None:
        Console(stderr=True, soft_wrap=True).print(run.twin.note(), markup=False)


def _answered(
    run: TrainedRun,
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
        found = _masks(run, run.model, asked, condition, told_NA, observe)
        if run.twin is not None:  # of the two it has experts that can be observed
            own = _masks(run, run.twin.model, asked, condition, told_NA, observe)
            run.twin.compare(found, own)
        for mask_S, (_, masks) in zip(found, answers, strict=True):
            masks[condition] = mask_S
    return answers


class _Asked(NamedTuple):
    """A batch's samples, what the network sees of them, and how many came before it."""

    samples: Sequence[Sample]
    inputs: list[Tensor]
    start: int


def _masks(
    run: TrainedRun,
    model: nn.Module,
    asked: _Asked,
    condition: str,
    told_NA: np.ndarray,
    observe: Callable[[routing], object] | None,
) -> list[np.ndarray]:
    """A network's masks of a batch, told the attributes of a condition."""
    samples, inputs, start = asked
    with torch.random.fork_rng(), torch.inference_mode():
        # For a router that is noisy in evaluation too: whatever else is run, a case gets the same
        # noise.
        torch.manual_seed(start)
        logits_BKS = infer(
            model,
            inputs,
            torch.from_numpy(told_NA[start : start + len(samples)]),
            windows=run.windows,
            device=run.device,
            observe=observe,
        )
    masks = []
    for logits_KS, sample in zip(logits_BKS, samples, strict=True):
        # By the extremes, as asking every number takes a copy of a volume's logits.
        if not torch.stack(logits_KS.aminmax()).isfinite().all():
            raise NonFiniteOutputError(
                f"{run.settings.run}: the network's output for {sample.case_id} is not finite "
                f"(attributes {condition}); its weights or this image are damaged."
            )
        masks.append(run.framing.restore(logits_KS, sample))
    return masks


def given_attributes(cases: Sequence[Case]) -> np.ndarray:
    """What the data say of each case: int64 (N, A)."""
    return np.array([case.attributes for case in cases], dtype=np.int64).reshape(len(cases), -1)


def left_out_note(cases: Sequence[Case]) -> str:
    """Why cases have no mask, and which; empty if there are none."""
    ids = [case.case_id for case in cases]
    return f"left out, since an attribute is not known: {shown(ids)}" if ids else ""


def predict(settings: PredictSettings) -> Path:
    """Writes `masks/` and `overlays/`, whole or not at all; returns the folder.

    On stderr it names the cases that are left out.

    Raises:
        DataError, RunError: as of `open_run`; `out` holds something else; or cases would get no
            mask, as the run was trained without such, and nobody asked for that here.
    """
    out = settings.out or settings.run / f"predictions-{settings.split}"
    run = open_run(settings, settings.split)
    if run.left_out and not settings.leave_out_unknown:
        raise DataError(
            f"{len(run.left_out)} {settings.split} cases would get no mask, since the run was "
            "trained without cases whose attribute is not known: "
            f"{shown([case.case_id for case in run.left_out])}. Predict the others by "
            "--leave-out-unknown."
        )
    if run.left_out:
        Console(stderr=True, soft_wrap=True).print(left_out_note(run.left_out), markup=False)

    def write(folder: Path) -> None:
        for name in ("masks", "overlays"):
            (folder / name).mkdir()
        told = {"as given": given_attributes(run.cases)}
        for sample, masks in predictions(run, told):
            mask_S = masks["as given"]
            write_mask(folder / "masks", sample, mask_S)
            picture = Picture.of(
                sample.case_id, sample.image_CS, sample.mask_S, mask_S, sample.affine
            )
            overlay_HW3 = overlay(picture, run.dataset.classes)
            Image.fromarray(overlay_HW3).save(folder / "overlays" / f"{sample.case_id}.png")

    write_results(out, write, contents=("masks", "overlays"))
    return out


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"device: {name} cannot be used here ({error}).") from error
