"""What a run is made of: settings that become flags, and the learning rate of a step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data import DataSettings
from ..errors import RunError


@dataclass(frozen=True)
class ModelSettings:
    """The network, whichever it is."""

    aware: bool = True
    """No: the router is not told the attribute, the paper's plain-MoE baseline."""
    noise: Literal["train", "always", "never"] = "train"
    """When the router's scores are noisy; always: as in the paper's released code."""
    unknown: Literal["error", "average", "learned"] = "error"
    """What the network does with a sample whose attribute is not known."""
    gradient_checkpointing: bool = False
    """Recompute each block in backward: less memory, more time."""
    weights: Path | None = None
    """Trained weights to start from: Google's ViT-B_16.npz or R50+ViT-B_16.npz for a TransUNet, a
    .pth of the paper's released code, or for a U-Net of experts the model.safetensors of a dense
    one, whose MLPs all experts start as."""

    @property
    def told(self) -> bool:
        """Whether the network is told the attributes at all."""
        return self.aware


@dataclass(frozen=True)
class TransUNetSettings(ModelSettings):
    """The 2D network."""

    variant: Literal["vit_b16", "r50_vit_b16", "small"] = "vit_b16"
    """vit_b16: what the paper's experiments ran; r50_vit_b16: TransUNet in full; small: for a
    CPU."""
    moe: Literal["shared", "per_block", "mlp", "none"] = "shared"
    """shared: one residual layer after every block, the paper's; per_block: one each; mlp: in place
    of each block's MLP; none: a dense network."""

    @property
    def told(self) -> bool:
        return self.aware and self.moe != "none"


@dataclass(frozen=True)
class ResUNet3DSettings(ModelSettings):
    """The 3D network."""

    features: int = 24
    """Channels of the first stage; the five have 1, 1, 2, 4 and 8 times as many."""
    moe: Literal["per_block", "none"] = "per_block"
    """per_block: a residual layer after each of --stages, the paper's; none: a dense network."""
    stages: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Encoder stages that are followed by experts."""

    @property
    def told(self) -> bool:
        return self.aware and self.moe != "none"


@dataclass(frozen=True)
class UNetSettings(ModelSettings):
    """The study's small 2D network; `aware` and `noise` mean something to experts alone."""

    widths: tuple[int, ...] = (12, 24, 48)
    """Channels of the stages, each of which halves the image; multiples of 4."""
    block: Literal["mlp", "channels", "film", "per_value", "moe"] = "moe"
    """What each stage's MLP is. mlp: dense, told nothing; channels: the same, and the attribute is
    in further channels of the image; film: scaled and shifted by the attribute; per_value: one for
    each attribute value; moe: experts."""
    hidden: int = 8
    """Hidden units that a token passes through, of all its experts together, as a multiple of the
    stage's channels."""
    placement: Literal["mlp", "after", "beside"] = "mlp"
    """Of experts. mlp: in its place; after: half of the hidden units stay in the MLP, and a
    residual layer of experts follows it; beside: half of them stay in the MLP, whose output is
    added to the experts', an expert that is always on."""
    modulate: bool = False
    """Scale and shift what router and experts see by the attribute, as film does."""
    film_identity: bool = False
    """Start scales and shifts as 1 and 0, instead of as PyTorch's linear layers do."""
    router: Literal["own", "shared", "sharp", "blind"] = "own"
    """own: each attribute value's; sharp: the same, with scores four times as large at first;
    shared: one for all, but for a bias by attribute value; blind: one that is told none, where
    --modulate tells the experts."""
    n_experts: int = 8
    """Experts of a stage."""
    k: int = 2
    """Experts of a token, or with --merge of a sample."""
    merge: bool = False
    """Merge a sample's experts into one MLP of all the hidden units before they are applied."""

    @property
    def told(self) -> bool:
        return self.aware and self.block != "mlp"


@dataclass(frozen=True)
class SquareSettings:
    """What a 2D network sees of an image."""

    size: int = 224
    """Pixels a side that the network sees."""
    crop: int | Literal["paper", "whole"] = "paper"
    """Native pixels of the central crop; paper: 512 for FairSeg, 1024 for HAM10000."""
    augment: Literal["paper", "shift", "none"] = "paper"
    """Of training images. paper: turned, flipped and rotated as in the paper's code; shift: moved
    by up to a twelfth of the size, where all are in one pose."""


@dataclass(frozen=True)
class VolumeSettings:
    """What a 3D network sees of a volume: patches, on one grid of voxels for all volumes."""

    spacing: tuple[float, float, float] | Literal["median"] = "median"
    """Voxels to resample to: mm from left to right, back to front and below to above; median: that
    of the data, axis by axis."""
    patch: tuple[int, int, int] = (384, 384, 128)
    """Such voxels that the network sees at once, multiples of 32, in the same order of axes."""
    patches: int = 1
    """Training patches of each volume in an epoch."""
    foreground: float = 1 / 3
    """Share of the training patches that are laid around a voxel of the foreground."""
    overlap: float = 0.5
    """Of neighbouring windows in validation and prediction, as a share of the patch."""
    body: bool = False
    """Route only the voxels of the patient's body to the experts, none of the air around it."""
    augment: Literal["paper", "none"] = "paper"
    """Of training patches. paper: flips and shifts of intensity; the paper names none, and these
    are usual."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of; saved with it as `recipe.json`."""

    data: Annotated[DataSettings, tyro.conf.arg(name="")]
    model: Annotated[
        TransUNetSettings | ResUNet3DSettings | UNetSettings,
        tyro.conf.arg(name=""),
        tyro.conf.AvoidSubcommands,
    ] = field(default_factory=TransUNetSettings)
    frame: Annotated[
        SquareSettings | VolumeSettings, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands
    ] = field(default_factory=SquareSettings)
    out: Path = Path("run")
    """The run's folder."""
    seed: int = 0
    """Of initial weights, order, augmentation, routing noise and dropout."""

    batch_size: int = 42
    """Of all devices together."""
    epochs: int | Literal["paper"] = "paper"
    """paper: 300 for FairSeg, 100 for HAM10000; 0: none, to evaluate --weights as they are."""
    leave_out_unknown: bool = False
    """Leave out the cases whose attribute is not known, as the paper does."""
    attribute_dropout: float = 0.0
    """Share of the training samples of a step whose attributes the network is told are unknown, so
    that --unknown learned has something to learn from."""
    patience: int | None = None
    """Stop after so many epochs without a better validation score."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Which optimizer; betas of AdamW are PyTorch's."""
    learning_rate: float = 0.01
    """At its highest."""
    weight_decay: float = 0.01
    """Of every parameter."""
    momentum: float = 0.9
    """Of SGD."""
    schedule: Literal["exponential", "poly", "cosine"] = "exponential"
    """exponential: from epoch to epoch; poly: (1 - step/steps)^0.9; cosine: to zero."""
    decay: float = 0.01
    """exponential: what is left of the learning rate in the last epoch."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises from near zero."""

    lambda_dice: float = 1.0
    """Weight of the Dice loss."""
    lambda_ce: float = 1.0
    """Weight of the cross-entropy."""
    balance_weight: float = 0.0
    """Weight of the balance loss, the mean over the layer's calls."""
    balance: Literal["load", "within", "importance"] = "load"
    """Which. load: load balancing over all tokens; within: the same within each attribute value,
    all values alike; importance: of the summed gates."""
    z_weight: float = 0.0
    """Weight of the router z-loss, the mean over the layer's calls."""
    fairness: Literal["none", "reweight", "group-dro", "fair-dro", "febs"] = "none"
    """How samples of different groups are weighed; groups are those of the first attribute."""
    group_dro_rate: float = 0.01
    """group-dro: step size of the groups' weights."""
    fair_dro_temperature: float = 1.0
    """fair-dro: the smaller, the more a group's hardest samples count."""
    febs_gamma: float = 1.0
    """febs: exponent of the groups' error bounds; 0 weighs all alike."""

    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    """Mixed: computed in half the bits, weights stay fp32; 16-mixed needs a GPU."""
    devices: int = 1
    """Processes a node; GPUs where there are any, else CPU processes."""
    nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """auto: ddp where there are several processes; fsdp: parameters are shared out among them."""
    workers: int = 0
    """Processes that load data, beside each training process."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is one at the end of each epoch besides."""


_PAPER_EPOCHS = {"fairseg": 300, "ham10000": 100, "nifti": 100}
_PAPER_CROPS = {"fairseg": 512, "ham10000": 1024}


def settle(recipe: Recipe) -> Recipe:
    """The recipe with its "paper" settings as numbers.

    Raises:
        RunError: a setting is out of range, or two of them do not fit together.
    """
    frame = recipe.frame
    if recipe.epochs == "paper":
        epochs = _known(recipe, "epochs", _PAPER_EPOCHS, "a number")
        recipe = dataclasses.replace(recipe, epochs=epochs)
    if isinstance(frame, SquareSettings) and frame.crop == "paper":
        crop = _known(recipe, "crop", _PAPER_CROPS, "a number or whole")
        recipe = dataclasses.replace(recipe, frame=dataclasses.replace(frame, crop=crop))
    _check_kind(recipe)
    _check_frame(recipe.frame)
    _require(recipe, "epochs", int(recipe.epochs) >= 0, "0 or more")
    _require(recipe, "seed", 0 <= recipe.seed < 2**64, "0 or more and less than 2**64")
    for setting in ("batch_size", "devices", "nodes"):
        _require(recipe, setting, getattr(recipe, setting) >= 1, "1 or more")
    for setting in ("learning_rate", "fair_dro_temperature"):
        _require(recipe, setting, 0 < getattr(recipe, setting) < math.inf, "more than 0 and finite")
    _require(recipe, "decay", 0 < recipe.decay <= 1, "more than 0 and at most 1")
    weights = ("lambda_dice", "lambda_ce", "balance_weight", "z_weight", "weight_decay", "workers")
    for setting in (*weights, "checkpoint_every", "group_dro_rate", "febs_gamma"):
        _require(recipe, setting, 0 <= getattr(recipe, setting) < math.inf, "0 or more and finite")
    _require(recipe, "warmup", 0 <= recipe.warmup < 1, "0 or more and less than 1")
    dropout = recipe.attribute_dropout
    _require(recipe, "attribute_dropout", 0 <= dropout < 1, "0 or more and less than 1")
    if dropout and recipe.model.unknown == "error":
        raise RunError(
            f"attribute_dropout: got {dropout}, but unknown attributes are an error; choose "
            "--unknown learned or average."
        )
    if dropout and not recipe.model.told:
        raise RunError(f"attribute_dropout: got {dropout}, but this network is told no attributes.")
    _require(recipe, "momentum", 0 <= recipe.momentum < 1, "0 or more and less than 1")
    _require(recipe, "patience", recipe.patience is None or recipe.patience >= 1, "1 or more")
    processes = recipe.devices * recipe.nodes
    _require(recipe, "batch_size", not recipe.batch_size % processes, f"a multiple of {processes}")
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
    if recipe.strategy == "fsdp" and isinstance(recipe.frame, VolumeSettings):
        # Its forward passes are collective, and volumes have different numbers of windows.
        raise RunError("strategy: fsdp is not for volumes, whose network is small; choose ddp.")
    return recipe


def on_grid(recipe: Recipe, median: tuple[float, float, float] | None) -> Recipe:
    """The recipe with the spacing "median" as numbers: those of the data, in mm."""
    if median is None or not isinstance(recipe.frame, VolumeSettings):
        return recipe
    if recipe.frame.spacing != "median":
        return recipe
    x, y, z = (float(f"{size:.6g}") for size in median)
    return dataclasses.replace(recipe, frame=dataclasses.replace(recipe.frame, spacing=(x, y, z)))


def learning_rate(recipe: Recipe, step: int, steps_an_epoch: int) -> float:
    """The learning rate of a step, counted from 0, of a settled recipe.

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


def _known(recipe: Recipe, setting: str, values: dict[str, int], expected: str) -> int:
    """The paper's value for the recipe's data."""
    name = recipe.data.data
    if name not in values:
        raise RunError(f"{setting}: got 'paper', which says nothing about {name}; give {expected}.")
    return values[name]


def _check_kind(recipe: Recipe) -> None:
    """Volumes are for the 3D presets, images for the 2D ones."""
    volumes = isinstance(recipe.frame, VolumeSettings)
    if volumes != isinstance(recipe.model, ResUNet3DSettings):
        raise RunError("model, frame: one is for 2D images and the other for volumes.")
    if volumes != (recipe.data.data == "nifti"):
        kinds = ("2D images", "volumes") if volumes else ("volumes", "2D images")
        raise RunError(
            f"data: {recipe.data.data} has {kinds[0]}, but the preset is for {kinds[1]}; those for "
            "volumes have 3d in their names."
        )


def _check_frame(frame: SquareSettings | VolumeSettings) -> None:
    if isinstance(frame, SquareSettings):
        _require(frame, "size", frame.size >= 1, "1 or more")
        _require(
            frame, "crop", frame.crop == "whole" or int(frame.crop) >= 1, "1 or more, or whole"
        )
        return
    # Five stages halve it, and the last one's instance norm needs more than one voxel.
    sides = all(side >= 1 and not side % 32 for side in frame.patch) and max(frame.patch) > 32
    _require(frame, "patch", sides, "three multiples of 32, not all of them 32")
    spacing = frame.spacing == "median" or all(0 < size < math.inf for size in frame.spacing)
    _require(frame, "spacing", spacing, "three sizes in mm above 0, or median")
    _require(frame, "patches", frame.patches >= 1, "1 or more")
    _require(frame, "foreground", 0 <= frame.foreground <= 1, "a share from 0 to 1")
    _require(frame, "overlap", 0 <= frame.overlap < 1, "0 or more and less than 1")


def _require(settings: object, setting: str, holds: bool, expected: str) -> None:
    if not holds:
        raise RunError(f"{setting}: got {getattr(settings, setting)}, expected {expected}.")
