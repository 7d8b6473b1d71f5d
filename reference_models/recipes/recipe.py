"""The settings of a run, each of which is a flag of `train`, and the learning rate of a step."""

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

# The texts of settings are what `--help` says of their flags. It shows their line breaks as they
# are, and lines of 50 letters fit into a terminal of 80 columns.


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; the run's folder holds them as `recipe.json`."""

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
    """Folder to write the run to: its weights, settings,
    splits, history and TensorBoard files. The folder
    must not hold a run yet, unless you resume that
    run."""
    seed: int = 0
    """Seed of the initial weights, the order of the
    samples, augmentation, routing noise and dropout.
    Train with several seeds to see how far results
    vary."""

    batch_size: int = 42
    """Number of samples in a batch, over all devices
    together. The paper has 42 in 2D and 4 in 3D.
    Choose fewer if the memory does not suffice."""
    epochs: int | Literal["paper"] = "paper"
    """Number of passes over the training cases.
    - paper: 300 for fairseg, 100 for ham10000 and for
      a folder.
    - 0: no training, to evaluate --weights as they
      are."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is unknown, as
    the paper does. Otherwise choose what the network
    does with them by --unknown."""
    attribute_dropout: float = 0.0
    """Share of the training samples, 0 to 1, whose
    attributes are hidden from the network in a step.
    Use it with --unknown learned, so that the router
    of the unknown value has samples to learn from."""
    patience: int | None = None
    """Stop the training after this number of epochs
    without a better validation score. None: train all
    epochs."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer. The paper names AdamW; the paper's
    released code uses SGD. AdamW has PyTorch's betas."""
    learning_rate: float = 0.01
    """The highest learning rate, from which --schedule
    goes down. The paper has 0.01 in 2D and 5e-5 in
    3D."""
    weight_decay: float = 0.01
    """Weight decay, applied to every parameter. The
    paper does not name one; 0.01 is PyTorch's for
    AdamW."""
    momentum: float = 0.9
    """Momentum of SGD. AdamW does not use it."""
    schedule: Literal["exponential", "poly", "cosine"] = "exponential"
    """How the learning rate falls during the training.
    - exponential: by the same factor after each
      epoch, to --decay of its height in the last one
      (the paper).
    - poly: by (1 - step/steps)^0.9 (the released
      code).
    - cosine: along a half cosine, to zero."""
    decay: float = 0.01
    """What the exponential schedule leaves of the
    learning rate in the last epoch, as a share. The
    paper does not name it."""
    warmup: float = 0.0
    """Share of all steps, 0 to below 1, in which the
    learning rate first rises from near zero."""

    lambda_dice: float = 1.0
    """Weight of the Dice loss in the segmentation loss."""
    lambda_ce: float = 1.0
    """Weight of the cross-entropy in the segmentation
    loss. The paper trains with cross-entropy alone."""
    balance_weight: float = 0.0
    """Weight of the balance loss, which makes the router
    use all experts. The paper has none; 0.01 is
    usual, as in the Switch Transformer."""
    balance: Literal["load", "within", "importance"] = "load"
    """The balance loss that --balance-weight weighs.
    - load: balances the experts' loads over all
      tokens.
    - within: balances the loads of each attribute
      value by itself; every value counts the same.
    - importance: balances the sums of the gates."""
    z_weight: float = 0.0
    """Weight of the router z-loss, which keeps the
    router's scores small. The paper has none; 0.001
    is usual, as in ST-MoE."""
    fairness: Literal["none", "reweight", "group-dro", "fair-dro", "febs"] = "none"
    """How the loss weighs the groups, which are the
    values of the first attribute.
    - none: every sample counts the same.
    - reweight: every group counts the same on
      average.
    - group-dro: groups of high loss gain weight
      (Sagawa et al. 2020).
    - fair-dro: hard samples count more within each
      group.
    - febs: the Dice loss is scaled by group
      (FairSeg)."""
    group_dro_rate: float = 0.01
    """How fast group-dro changes the weights of the
    groups: its step size."""
    fair_dro_temperature: float = 1.0
    """Temperature of fair-dro, above 0. The smaller it
    is, the more the hardest samples of a group count."""
    febs_gamma: float = 1.0
    """Exponent of febs. With 0 all groups weigh the
    same; a higher one scales them further apart."""

    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Number format of the computation; weights are
    always stored in 32 bits.
    - 32: 32 bits.
    - bf16-mixed: bfloat16, which takes less memory.
    - 16-mixed: float16, which needs a GPU."""
    devices: int = 1
    """Number of processes on each machine. Each process
    uses a GPU of its own, or the CPU where there is
    no GPU."""
    nodes: int = 1
    """Number of machines that train together.
    --batch-size must be a multiple of --devices times
    --nodes."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work.
    - auto: ddp if there are several processes.
    - ddp: every process holds the whole network.
    - fsdp: every process holds a part of the
      parameters, for networks that do not fit; for
      images only."""
    workers: int = 0
    """Number of extra processes that load data for each
    training process. 0 loads in the training process;
    choose more if a GPU waits for data."""
    checkpoint_every: int = 500
    """Number of steps between two checkpoints within an
    epoch, from which --resume goes on. A checkpoint
    is also written after every epoch; 0: only then."""


_PAPER_EPOCHS = {"fairseg": 300, "ham10000": 100, "folder": 100}


def resolve(recipe: Recipe) -> Recipe:
    """Replaces "paper" in a recipe's settings by the paper's numbers, and checks all settings.

    Raises:
        RunError: a setting is out of range, or two of them do not fit together.
        DataError: no data set has that name.
    """
    data = recipe.data.data
    if recipe.epochs == "paper":
        if data not in _PAPER_EPOCHS:
            raise RunError(
                f"epochs: got 'paper', but the paper does not train on {data}; give a number of "
                "epochs."
            )
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
    """Replaces "median" spacing and "paper" patch by numbers, which depend on the data's volumes.

    Args:
        recipe: what `resolve` returned.
        median_mm, median_size: as for `FramingSettings.resolve_grid`.
    """
    framing = recipe.framing.resolve_grid(median_mm, median_size)
    return dataclasses.replace(recipe, framing=framing)


def describe_grid(recipe: Recipe) -> str | None:
    """Says how large the network's patches are and how much memory a training step takes.

    Returns:
        A sentence for volumes; None for images.

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


# Peak bytes of a step for each voxel of the batch and each feature. Measured for 24 features with
# experts: 128 x 128 x 128 voxels in float32, 384 x 384 x 128 in bfloat16 (benchmarks/results).
_STEP_BYTES = {"32": 552305216 / 128**3 / 24, "bf16-mixed": 3279116512 / (384 * 384 * 128) / 24}


def learning_rate(recipe: Recipe, step: int, steps_an_epoch: int) -> float:
    """Gives the learning rate of a step, counted from 0; the recipe is a resolved one.

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
    """Raises a RunError unless network, framing and data are all for images or for volumes."""
    axes = len(recipe.framing.shape)
    if axes != recipe.model.axes:
        raise RunError(
            "model, framing: one of them is for 2D images and the other for volumes; choose two "
            "for the same kind."
        )
    if find_axes(recipe.data) not in (None, axes):
        data = recipe.data
        whose = data.data if data.root is None else data.root
        kinds = ("2D images", "volumes") if axes == 3 else ("volumes", "2D images")
        raise RunError(
            f"data: {whose} has {kinds[0]}, but the preset is for {kinds[1]}; choose another "
            "preset. Presets for volumes have 3d in their names."
        )


def _check_ranges(recipe: Recipe) -> None:
    """Raises a RunError if a setting is out of its range."""
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
    """Raises a RunError if two settings contradict each other."""
    dropout = recipe.attribute_dropout
    if dropout and recipe.model.unknown == "error":
        raise RunError(
            f"attribute_dropout: got {dropout}, but the network refuses unknown attributes "
            "(--unknown error); choose --unknown learned or average."
        )
    if dropout and not recipe.model.told:
        raise RunError(
            f"attribute_dropout: got {dropout}, but this network receives no attributes; leave it "
            "out."
        )
    processes = recipe.devices * recipe.nodes
    require(recipe, "batch_size", not recipe.batch_size % processes, f"a multiple of {processes}")
    if not recipe.lambda_dice + recipe.lambda_ce:
        raise RunError(
            "lambda_dice, lambda_ce: both are 0, so that there is no loss; set one of them above 0."
        )
    if recipe.fairness == "febs" and not recipe.lambda_dice:
        raise RunError(
            "fairness: febs scales the Dice loss, but lambda_dice is 0; set --lambda-dice above 0."
        )
    if recipe.leave_out_unknown and recipe.model.unknown != "error":
        raise RunError(
            f"unknown: got {recipe.model.unknown}, but the cases with an unknown attribute are "
            "left out; add --no-leave-out-unknown to train on them."
        )
    if recipe.strategy == "fsdp" and recipe.precision == "16-mixed":
        raise RunError(
            "precision: got 16-mixed, which the strategy fsdp does not support; choose bf16-mixed "
            "or 32."
        )
    if recipe.strategy == "fsdp" and recipe.model.axes == 3:
        # All processes take part in each of its forward passes, but volumes differ in the number of
        # windows.
        raise RunError("strategy: got fsdp, which is for images only; choose ddp for volumes.")
