"""What a run is made of: settings that become flags, and the learning rate of a step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data import DataSettings
from ..data.datasets import find_axes
from ..errors import RunError
from .framings import ImageFramingSettings, VolumeFramingSettings, require
from .networks import ResUNet3DSettings, TransUNetSettings, UNetSettings


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of; saved with it as `recipe.json`."""

    data: Annotated[DataSettings, tyro.conf.arg(name="")]
    model: Annotated[
        TransUNetSettings | ResUNet3DSettings | UNetSettings,
        tyro.conf.arg(name=""),
        tyro.conf.AvoidSubcommands,
    ] = field(default_factory=TransUNetSettings)
    framing: Annotated[
        ImageFramingSettings | VolumeFramingSettings,
        tyro.conf.arg(name=""),
        tyro.conf.AvoidSubcommands,
    ] = field(default_factory=ImageFramingSettings)
    out: Path = Path("run")
    """The run's folder."""
    seed: int = 0
    """Seed of initial weights, order, augmentation, routing noise and dropout."""

    batch_size: int = 42
    """Samples in a batch, of all devices together."""
    epochs: int | Literal["paper"] = "paper"
    """Number of epochs. paper: 300 for FairSeg, 100 for HAM10000 and a folder; 0: none, to evaluate
    --weights as they are."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is not known, as the paper does."""
    attribute_dropout: float = 0.0
    """Share of the training samples of a step whose attributes the network is told are unknown, so
    that --unknown learned has something to learn from."""
    patience: int | None = None
    """Stop after so many epochs without a better validation score."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer; betas of AdamW are PyTorch's."""
    learning_rate: float = 0.01
    """The learning rate at its highest."""
    weight_decay: float = 0.01
    """The weight decay of every parameter."""
    momentum: float = 0.9
    """The momentum of SGD."""
    schedule: Literal["exponential", "poly", "cosine"] = "exponential"
    """How the learning rate falls. exponential: from epoch to epoch; poly: (1 - step/steps)^0.9;
    cosine: to zero."""
    decay: float = 0.01
    """What the exponential schedule leaves of the learning rate in the last epoch, as a share."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from near zero."""

    lambda_dice: float = 1.0
    """Weight of the Dice loss."""
    lambda_ce: float = 1.0
    """Weight of the cross-entropy."""
    balance_weight: float = 0.0
    """Weight of the balance loss, the mean over the layer's calls."""
    balance: Literal["load", "within", "importance"] = "load"
    """The balance loss. load: load balancing over all tokens; within: the same within each
    attribute value, all values alike; importance: of the summed gates."""
    z_weight: float = 0.0
    """Weight of the router z-loss, the mean over the layer's calls."""
    fairness: Literal["none", "reweight", "group-dro", "fair-dro", "febs"] = "none"
    """How samples of different groups are weighed; groups are those of the first attribute."""
    group_dro_rate: float = 0.01
    """Step size of the groups' weights in group-dro."""
    fair_dro_temperature: float = 1.0
    """Temperature of fair-dro: the smaller, the more a group's hardest samples count."""
    febs_gamma: float = 1.0
    """Exponent of the groups' error bounds in febs; 0 weighs all alike."""

    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Number format of the computation. Mixed: half the bits, but weights stay fp32; 16-mixed needs
    a GPU."""
    devices: int = 1
    """Number of processes a node; GPUs where there are any, else CPU processes."""
    nodes: int = 1
    """Number of machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How processes share the work. auto: ddp where there are several; fsdp: parameters are shared
    out among them."""
    workers: int = 0
    """Number of processes that load data, beside each training process."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end of each epoch besides."""


_PAPER_EPOCHS = {"fairseg": 300, "ham10000": 100, "folder": 100}


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with its "paper" settings as numbers.

    Raises:
        RunError: a setting is out of range, or two of them do not fit together.
        DataError: there is no data set of that name.
    """
    data = recipe.data.data
    if recipe.epochs == "paper":
        if data not in _PAPER_EPOCHS:
            raise RunError(f"epochs: got 'paper', which says nothing about {data}; give a number.")
        recipe = dataclasses.replace(recipe, epochs=_PAPER_EPOCHS[data])
    recipe = dataclasses.replace(recipe, framing=recipe.framing.resolve(data))
    _check_axes(recipe)
    _check_ranges(recipe)
    _check_together(recipe)
    return recipe


def resolve_grid(
    recipe: Recipe,
    median_mm: tuple[float, float, float] | None,
    median_size: tuple[float, float, float] | None,
) -> Recipe:
    """The recipe with what the data's volumes decide as numbers: spacing and patch.

    Args:
        recipe: resolved otherwise.
        median_mm, median_size: as of `FramingSettings.resolve_grid`.
    """
    framing = recipe.framing.resolve_grid(median_mm, median_size)
    return dataclasses.replace(recipe, framing=framing)


def describe_grid(recipe: Recipe) -> str | None:
    """Says of volumes what the network sees at once, and what memory a training step takes.

    Example:
        >>> volumes = VolumeFramingSettings((1.0, 1.0, 3.0), (128, 128, 32))
        >>> recipe = Recipe(DataSettings("folder"), ResUNet3DSettings(), volumes, batch_size=4)
        >>> describe_grid(recipe)
        'patches of 128 x 128 x 32 voxels of 1 x 1 x 3 mm; a training step takes about 0.5 GiB'
    """
    framing, model = recipe.framing, recipe.model
    if not isinstance(framing, VolumeFramingSettings) or not isinstance(model, ResUNet3DSettings):
        return None
    each = _STEP_BYTES["32" if recipe.precision == "32" else "bf16-mixed"]
    step = (
        2**-30
        * each
        * model.features
        * math.prod(framing.shape)
        * recipe.batch_size
        / recipe.devices
    )
    return (
        f"patches of {' x '.join(map(str, framing.shape))} voxels of "
        f"{' x '.join(f'{size:.3g}' for size in framing.spacing)} mm; a training step takes "
        + (f"about {step:.1f} GiB" if step >= 0.1 else "less than 0.1 GiB")
    )


# Peak bytes of a step for each voxel of the batch and each feature: of 24 features with experts,
# 128 x 128 x 128 voxels in float32 and 384 x 384 x 128 in bfloat16, as benchmarks/results has them.
_STEP_BYTES = {"32": 552305216 / 128**3 / 24, "bf16-mixed": 3279116512 / (384 * 384 * 128) / 24}


def learning_rate(recipe: Recipe, step: int, steps_an_epoch: int) -> float:
    """The learning rate of a step, counted from 0, of a resolved recipe.

    Example:
        >>> poly = Recipe(DataSettings("fairseg"), learning_rate=0.0175, schedule="poly", epochs=2)
        >>> [round(learning_rate(poly, step, steps_an_epoch=2), 5) for step in range(4)]
        [0.0175, 0.01351, 0.00938, 0.00503]
    """
    epochs = int(recipe.epochs)
    done = step / (epochs * steps_an_epoch)
    if recipe.schedule == "poly":
        factor = (1 - done) ** 0.9
    elif recipe.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = recipe.decay ** (step // steps_an_epoch / max(epochs - 1, 1))
    risen = (step + 1) / max(recipe.warmup * epochs * steps_an_epoch, 1)
    return recipe.learning_rate * factor * min(risen, 1.0)


def _check_axes(recipe: Recipe) -> None:
    """Volumes are for the 3D presets, images for the 2D ones."""
    axes = len(recipe.framing.shape)
    if axes != recipe.model.axes:
        raise RunError("model, framing: one is for 2D images and the other for volumes.")
    if find_axes(recipe.data) not in (None, axes):
        data = recipe.data
        whose = data.data if data.root is None else data.root
        kinds = ("2D images", "volumes") if axes == 3 else ("volumes", "2D images")
        raise RunError(
            f"data: {whose} has {kinds[0]}, but the preset is for {kinds[1]}; those for volumes "
            "have 3d in their names."
        )


def _check_ranges(recipe: Recipe) -> None:
    """Each setting by itself."""
    require(recipe, "epochs", int(recipe.epochs) >= 0, "0 or more")
    require(recipe, "seed", 0 <= recipe.seed < 2**64, "0 or more and less than 2**64")
    for setting in ("batch_size", "devices", "nodes"):
        require(recipe, setting, getattr(recipe, setting) >= 1, "1 or more")
    for setting in ("learning_rate", "fair_dro_temperature"):
        require(recipe, setting, 0 < getattr(recipe, setting) < math.inf, "more than 0 and finite")
    require(recipe, "decay", 0 < recipe.decay <= 1, "more than 0 and at most 1")
    weights = ("lambda_dice", "lambda_ce", "balance_weight", "z_weight", "weight_decay", "workers")
    for setting in (*weights, "checkpoint_every", "group_dro_rate", "febs_gamma"):
        require(recipe, setting, 0 <= getattr(recipe, setting) < math.inf, "0 or more and finite")
    for setting in ("warmup", "attribute_dropout", "momentum"):
        require(recipe, setting, 0 <= getattr(recipe, setting) < 1, "0 or more and less than 1")
    require(recipe, "patience", recipe.patience is None or recipe.patience >= 1, "1 or more")


def _check_together(recipe: Recipe) -> None:
    """Settings that do not go with each other."""
    dropout = recipe.attribute_dropout
    if dropout and recipe.model.unknown == "error":
        raise RunError(
            f"attribute_dropout: got {dropout}, but unknown attributes are an error; choose "
            "--unknown learned or average."
        )
    if dropout and not recipe.model.told:
        raise RunError(f"attribute_dropout: got {dropout}, but this network is told no attributes.")
    processes = recipe.devices * recipe.nodes
    require(recipe, "batch_size", not recipe.batch_size % processes, f"a multiple of {processes}")
    if not recipe.lambda_dice + recipe.lambda_ce:
        raise RunError("lambda_dice, lambda_ce: both are 0, so there is nothing to train by.")
    if recipe.fairness == "febs" and not recipe.lambda_dice:
        raise RunError(
            "fairness: febs scales the Dice loss, but lambda_dice is 0; set --lambda-dice above 0."
        )
    if recipe.leave_out_unknown and recipe.model.unknown != "error":
        raise RunError(
            f"unknown: got {recipe.model.unknown}, but the cases that it is for are left out; add "
            "--no-leave-out-unknown to train on them."
        )
    if recipe.strategy == "fsdp" and recipe.precision == "16-mixed":
        raise RunError("precision: fsdp does not go with 16-mixed; choose bf16-mixed or 32.")
    if recipe.strategy == "fsdp" and recipe.model.axes == 3:
        # Its forward passes are collective, and volumes have different numbers of windows.
        raise RunError("strategy: fsdp is not for volumes, whose network is small; choose ddp.")
