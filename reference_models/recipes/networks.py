"""Settings of a network, which build it: a class for each of `models/`.

A new network is a file in `models/`, a class here and a place in `Recipe.model`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from ..errors import RunError
from ..models.resunet3d import ResUNet3D
from ..models.transunet import TransUNet
from ..models.unet import UNet


@dataclass(frozen=True)
class ModelSettings(ABC):
    """The network, whichever it is."""

    axes: ClassVar[int] = 2
    """Spatial axes of what the network sees: 2 of images, 3 of volumes."""

    aware: bool = True
    """Tell the router the attribute; if not, this is the paper's plain-MoE baseline."""
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

    def build(
        self,
        *,
        in_channels: int,
        n_classes: int,
        attribute_sizes: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> nn.Module:
        """The network, newly initialised; trained weights are not read.

        Args:
            in_channels: of an image.
            n_classes: the background included.
            attribute_sizes: number of values of each attribute of the data.
            shape: pixels or voxels that the network sees at once, as of `FramingSettings.shape`.

        Raises:
            RunError: there is no such network, or it does not fit what it is to see.
        """
        if len(shape) != self.axes:
            raise RunError("model, framing: one is for 2D images and the other for volumes.")
        options: dict[str, Any] = {
            "in_channels": in_channels,
            "n_classes": n_classes,
            "attribute_sizes": attribute_sizes if self.told else None,
            "noise": self.noise,
            "unknown": self.unknown,
        }
        try:
            return self.make(shape, options)
        except ValueError as error:
            raise RunError(f"model: {error}") from error

    @abstractmethod
    def make(self, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
        """The network of this class's own settings; `build` calls it.

        Args:
            shape: as of `build`, of as many axes as the network has.
            options: keyword arguments that all networks take.

        Raises:
            ValueError: what does not fit; `build` makes a RunError of it.
        """


@dataclass(frozen=True)
class TransUNetSettings(ModelSettings):
    """The 2D network."""

    variant: Literal["vit_b16", "r50_vit_b16", "small"] = "vit_b16"
    """The encoder. vit_b16: what the paper's experiments ran; r50_vit_b16: TransUNet in full;
    small: for a CPU."""
    moe: Literal["shared", "per_block", "mlp", "none"] = "shared"
    """Where experts are. shared: one residual layer after every block, the paper's; per_block: one
    each; mlp: in place of each block's MLP; none: a dense network."""

    @property
    def told(self) -> bool:
        return self.aware and self.moe != "none"

    def make(self, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
        rows, columns = shape
        return TransUNet(
            self.variant,
            image_size=(rows, columns),
            moe=self.moe,
            gradient_checkpointing=self.gradient_checkpointing,
            **options,
        )


@dataclass(frozen=True)
class ResUNet3DSettings(ModelSettings):
    """The 3D network."""

    axes: ClassVar[int] = 3

    features: int = 24
    """Channels of the first stage; the five have 1, 1, 2, 4 and 8 times as many."""
    moe: Literal["per_block", "none"] = "per_block"
    """Where experts are. per_block: a residual layer after each of --stages, the paper's; none: a
    dense network."""
    stages: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Encoder stages that are followed by experts."""

    @property
    def told(self) -> bool:
        return self.aware and self.moe != "none"

    def make(self, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
        return ResUNet3D(
            self.features,
            moe=self.moe,
            stages=self.stages,
            gradient_checkpointing=self.gradient_checkpointing,
            **options,
        )


@dataclass(frozen=True)
class UNetSettings(ModelSettings):
    """The study's small 2D network; `aware` and `noise` mean something to experts alone."""

    network: ClassVar[type[UNet]] = UNet
    """What is built: a subclass may take further options."""

    widths: tuple[int, ...] = (12, 24, 48)
    """Channels of the stages, each of which halves the image; multiples of 4."""
    block: Literal["mlp", "channels", "film", "per_value", "moe"] = "moe"
    """What each stage's MLP is. mlp: dense, told nothing; channels: the same, and the attribute is
    in further channels of the image; film: scaled and shifted by the attribute; per_value: one for
    each attribute value; moe: experts."""
    hidden: int = 8
    """Hidden units that a token passes through, of all its experts together, as a multiple of the
    stage's channels."""
    n_experts: int = 8
    """Number of experts of a stage."""
    k: int = 2
    """Number of experts that a token goes to."""

    @property
    def told(self) -> bool:
        return self.aware and self.block != "mlp"

    def make(self, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
        if self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is not for the study's small U-Net.")
        stride = 2 ** len(self.widths)
        if any(side % stride for side in shape):
            raise ValueError(f"size: got {shape[0]}, expected a multiple of {stride}.")
        return self.network(
            self.widths,
            block=self.block,
            hidden=self.hidden,
            n_experts=self.n_experts,
            k=self.k,
            **options,
        )
