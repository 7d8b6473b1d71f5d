"""Opens trained runs for prediction: one network, several together, or a cross-validation's folds.

Shapes: N cases, A attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..data import open_dataset
from ..data.cases import UNKNOWN, Case, Dataset
from ..data.framing import Framing
from ..data.patches import Windows
from ..data.splits import FOLDS, read_folds, read_splits
from ..errors import DataError, RunError, shown
from ..export.onnx_network import Twin, open_onnx
from ..recipes.recipe import Recipe
from ..training.checkpoints import Which, load_model
from ..training.runs import Task, runs_in
from ..training.state import is_finished
from .alike import require_alike


@dataclass(frozen=True)
class RunSettings:
    """Says which trained run is used, on which data, and how."""

    run: Path | tuple[Path, ...]
    """Folder of the run. If you name several, their
    networks predict together, by the mean of their
    probabilities. If you name the folder of a
    cross-validation, the networks of all folds
    predict together; for the split validation, each
    case is predicted by the fold that held it out."""
    which: Which | None = None
    """Checkpoint to load. The default is the best one,
    or the last one for a cross-validation's folder."""
    root: Path | None = None
    """Folder of the data, if they no longer lie where the run found them."""
    batch_size: int | None = None
    """Number of images, or of windows of a volume, that
    are computed at a time. The default is the number
    in training."""
    workers: int = 0
    """Number of processes that read cases."""
    device: str | None = None
    """Device that the network runs on, such as cpu or
    cuda. The default is a GPU, if there is one."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is not known.
    This is always done for a run that was trained
    without such cases."""
    onnx: Path | None = None
    """File that `export` has written from this run. ONNX
    Runtime then computes the masks on the CPU, and
    the console says in how many voxels they differ
    from PyTorch's masks."""

    @property
    def named(self) -> tuple[Path, ...]:
        """The folders that the user named."""
        return (self.run,) if isinstance(self.run, Path) else self.run

    @property
    def crossed(self) -> bool:
        """Whether it is the folder of a cross-validation."""
        return len(self.named) == 1 and runs_in(self.named[0]) != self.named

    def folder_for(self, out: Path | None, name: str) -> Path:
        """Gives the folder to write to: the user's choice, or else `name` in the run's folder.

        Raises:
            DataError: there are several runs, and nothing was chosen.
        """
        if out is None and len(self.named) != 1:
            raise DataError(
                f"out: --run has {len(self.named)} folders; name the folder to write to with --out."
            )
        return out or self.named[0] / name


@dataclass(frozen=True)
class Member:
    """A network that predicts.

    Args:
        folder: the folder of its run.
        model: the network, in eval mode on the run's device.
        trained: ids of the cases that it was trained on, and of those that were then left out.
            Empty for the split "all", which may be of other data than the run's.
    """

    folder: Path
    model: nn.Module
    trained: frozenset[str]


@dataclass(frozen=True)
class Panel:
    """One network, or several that predict together by the mean of their probabilities.

    Args:
        members: the networks, one or more.
        cases: the cases that they predict.
        fold: the fold of a cross-validation that holds out these cases; None elsewhere.
    """

    members: tuple[Member, ...]
    cases: tuple[Case, ...]
    fold: int | None = None


@dataclass(frozen=True)
class TrainedRun:
    """Trained networks, their data and the cases asked for.

    Args:
        settings: the user's settings.
        batch_size: number of images, or of windows of a volume, at a time.
        unknown: the policy that they were trained with for unknown attributes; None if they receive
            no attributes. Trained with "error", they average over the values here.
        panels: which networks predict which cases.
        twin: PyTorch's network beside the model of an exported file; None without such a file.
        device: the device that they compute on.
        dataset: the run's data set.
        framing: the way from native resolution to what the networks see, and back.
        windows: the windows in which they predict volumes; None for images.
        left_out: cases whose attribute is not known, where the user wants them left out.
        about: which networks predicted, and what these cases had to do with choosing them, in
            sentences; empty where nothing needs to be said.
    """

    settings: RunSettings
    batch_size: int
    unknown: str | None
    panels: tuple[Panel, ...]
    twin: Twin | None
    device: torch.device
    dataset: Dataset
    framing: Framing
    windows: Windows | None
    left_out: tuple[Case, ...]
    about: str

    @property
    def cases(self) -> tuple[Case, ...]:
        """All cases to be predicted, panel by panel."""
        return tuple(case for panel in self.panels for case in panel.cases)

    @property
    def members(self) -> tuple[Member, ...]:
        """All networks."""
        return tuple(member for panel in self.panels for member in panel.members)


def open_run(settings: RunSettings, split: str) -> TrainedRun:
    """Loads a run, or several, for prediction.

    Raises:
        RunError: there is no such run or checkpoint, or it is damaged; a fold is not trained to its
            end; several runs are not of one kind; or the file of --onnx is not of this run.
        DataError: the data cannot be read or are not the run's, a device or batch size cannot be
            used, several runs have different cases in the split, or there are cases whose attribute
            is not known and no route for them.
    """
    if settings.batch_size is not None and settings.batch_size < 1:
        raise DataError(f"batch_size: got {settings.batch_size}, expected 1 or more.")
    folders, crossed = _folders(settings), settings.crossed
    which = settings.which or ("last" if crossed else "best")
    loaded = [load_model(folder, which, refuse_unknown=False) for folder in folders]
    for folder, other in zip(folders[1:], loaded[1:], strict=True):
        require_alike(folders[0], loaded[0], folder, other, rooted=settings.root is not None)
    recipe, task, model = loaded[0]
    networks, twin = [network for _, _, network in loaded], None
    if settings.onnx is not None:
        if len(folders) > 1:
            raise DataError(
                f"onnx: a file holds one network, but --run has {len(folders)}; name one run."
            )
        if settings.device not in (None, "cpu"):
            raise DataError(
                f"device: got {settings.device}, but --onnx computes on the CPU; omit --device."
            )
        twin = Twin(settings.onnx, model)
        networks = [open_onnx(twin.file, folders[0], recipe, task, model)]
    device = torch.device("cpu") if twin else _device(settings.device)
    data = recipe.data
    if settings.root is not None:
        data = dataclasses.replace(data, root=settings.root)
    dataset = open_dataset(data, known=task.attributes)
    if differing := task.differences(Task.of(dataset)):
        raise DataError(
            f"{folders[0]}: was trained for other data: {'; '.join(differing)}. Correct the "
            "names in the data, if only the names differ; otherwise train on such data."
        )
    one_by_one = crossed and split == "validation"
    trained, asked = _split_cases(folders, dataset, split, same=not one_by_one)
    asked = asked if one_by_one else asked[:1]
    policy = recipe.model.unknown if recipe.model.told else None
    cases = [case for part in asked for case in part]
    left_out: tuple[Case, ...] = ()
    if settings.leave_out_unknown or recipe.leave_out_unknown:
        left_out = tuple(case for case in cases if UNKNOWN in case.attributes)
        asked = [tuple(case for case in part if case not in left_out) for part in asked]
    elif policy == "error":
        _require_known(cases, split)
    if len(left_out) == len(cases):
        raise DataError(
            f"{_shown(settings.named)}: no {split} case is left to predict; choose another --split."
        )
    members = [
        Member(folder, network.to(device), ids)
        for folder, network, ids in zip(folders, networks, trained, strict=True)
    ]
    if one_by_one:
        panels = tuple(
            Panel((member,), part, fold)
            for fold, (member, part) in enumerate(zip(members, asked, strict=True))
        )
    else:
        panels = (Panel(tuple(members), asked[0]),)
    batch_size = settings.batch_size or recipe.batch_size
    return TrainedRun(
        settings=settings,
        batch_size=batch_size,
        unknown=policy,
        panels=panels,
        twin=twin,
        device=device,
        dataset=dataset,
        framing=recipe.framing.build(),
        windows=recipe.framing.windows(batch_size),
        left_out=left_out,
        about=_about(folders, which, split, recipe, one_by_one=one_by_one),
    )


def _folders(settings: RunSettings) -> list[Path]:
    """The folder of each network that is asked for.

    Raises:
        DataError: none is named, or one twice.
        RunError: a fold of a cross-validation is not trained to its end.
    """
    folders = [folder for named in settings.named for folder in runs_in(named)]
    if not folders or len({*folders}) < len(folders):
        raise DataError(f"run: got {_shown(folders) or 'nothing'}; name each folder once.")
    for named in settings.named:
        if (folds := runs_in(named)) == (named,):
            continue
        short = [f.name for f in folds if not (f / "recipe.json").exists() or not is_finished(f)]
        if short:
            raise RunError(
                f"{named}: of its {len(folds)} folds, {shown(short)} did not come to the end of "
                "the training. Run cross-validate again with the same flags, or name with --run "
                "the folders of those folds that you want to predict with."
            )
    return folders


def _split_cases(
    folders: Sequence[Path], dataset: Dataset, split: str, *, same: bool
) -> tuple[list[frozenset[str]], list[tuple[Case, ...]]]:
    """Each network's training cases, and the cases that it is asked for.

    Args:
        folders: of the networks' runs.
        dataset: whose cases.
        split: one of the splits, or "all".
        same: whether all networks have to be asked for the same cases.

    Raises:
        DataError: they have to, and have other cases in this split; or they do not, as folds, and
            one was trained on other cases than its fold.
    """
    if split == "all":
        return [frozenset()] * len(folders), [tuple(dataset.cases)] * len(folders)
    try:
        splits = [read_splits(folder / "splits.json", dataset, needed=()) for folder in folders]
    except DataError as error:
        raise DataError(
            f"{error}; if these are other data, predict --split all takes all of their cases"
        ) from error
    chosen = [frozenset(getattr(each, split)) for each in splits]
    for folder, ids in zip(folders, chosen, strict=True):
        if same and ids != chosen[0]:
            raise DataError(
                f"{folder}: has other {split} cases than {folders[0]} ("
                f"{shown(sorted(ids ^ chosen[0]), 3)}). Networks that predict together need the "
                "same cases. Choose --split test or all, or name a cross-validation's folder with "
                "--split validation, so that each case is predicted by the fold that held it out."
            )
    file = folders[0].parent / FOLDS
    folds = [] if same else zip(folders, splits, read_folds(file), strict=True)
    for folder, own, meant in folds:
        if [[*own.train], [*own.validation]] != [meant["train"], meant["val"]]:
            raise DataError(
                f"{folder}: was trained on other cases than {file} says, so its predictions "
                "cannot be pooled with the others'. Remove the folder, and train that fold again "
                "with the same flags as the others."
            )
    return (
        [frozenset(each.train) for each in splits],
        [tuple(case for case in dataset.cases if case.case_id in ids) for ids in chosen],
    )


def _require_known(cases: Sequence[Case], split: str) -> None:
    """Raises for cases whose attribute is not known."""
    if unknown := [case.case_id for case in cases if UNKNOWN in case.attributes]:
        raise DataError(
            f"{len(unknown)} of {len(cases)} cases ({split}) have an attribute that is not known "
            f"({shown(unknown)}), and the run was not trained for unknown values, so it has "
            "no router for them. Leave them out with --leave-out-unknown, or train with --unknown "
            "learned."
        )


def _about(
    folders: Sequence[Path], which: Which, split: str, recipe: Recipe, *, one_by_one: bool
) -> str:
    """Says which networks predict, and what these cases had to do with choosing them."""
    sentences = []
    if one_by_one:
        sentences.append(
            f"Each case was predicted by the one of {len(folders)} folds that it was held out "
            f"from, with that fold's {which} checkpoint."
        )
    elif len(folders) > 1:
        sentences.append(
            f"{len(folders)} networks predicted each case together, by the mean of their "
            f"probabilities (the {which} checkpoints of {_shown(folders)})."
        )
    if split == "validation" and which == "best":
        sentences.append(
            "The scores of these cases chose the checkpoint out of all epochs, so new cases can be "
            "expected to score lower; --which last takes the final checkpoint."
        )
    elif split == "validation":
        early = (
            ""
            if recipe.patience is None
            else f"; but they could end the training early (--patience {recipe.patience}), so new "
            "cases may score a little lower"
        )
        sentences.append(
            "The scores of these cases chose the best checkpoint. The last one, which is used "
            f"here, was not chosen by them, as in nnU-Net{early}."
        )
    return " ".join(sentences)


def _shown(folders: Sequence[Path]) -> str:
    return shown([str(folder) for folder in folders])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            f"device: {name} cannot be used here ({error}); choose another, such as cpu."
        ) from error
