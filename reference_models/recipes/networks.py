"""Settings of the networks: a class for each network in `models/`, which can build it.

To add a network, write its file in `models/`, a class here, and add the class to `Recipe.model`.
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
    """Settings that all networks have."""

    axes: ClassVar[int] = 2
    """Number of spatial axes of the network's input: 2 for images, 3 for volumes."""

    aware: bool = True
    """Give the attribute to the router. With --no-aware
    the experts are the paper's baseline, a plain
    mixture of experts, whose router sees the image
    alone."""
    noise: Literal["train", "always", "never"] = "train"
    """When random noise is added to the router's scores.
    - train: in training only.
    - always: in evaluation too, as in the paper's
      released code; a mask then differs from call to
      call.
    - never: at no time."""
    unknown: Literal["error", "average", "learned"] = "error"
    """What happens to a sample whose attribute is
    unknown.
    - error: training and prediction refuse it.
    - average: the routers of all values are averaged.
    - learned: the unknown value has a router too,
      which learns from unknown samples and from
      --attribute-dropout."""
    gradient_checkpointing: bool = False
    """Compute each block a second time in the backward
    pass. That takes less memory and more time."""
    weights: Path | None = None
    """File of trained weights to start from.
    - .npz: Google's ViT-B_16 or R50+ViT-B_16, for a
      TransUNet.
    - .pth: weights of the paper's released code.
    - .safetensors: the model.safetensors of a trained
      dense U-Net, for a U-Net with experts; each
      expert starts as the dense network's MLP
      (upcycling)."""

    @property
    def told(self) -> bool:
        """Whether the network receives the attributes."""
        return self.aware

    def build(
        self,
        *,
        in_channels: int,
        n_classes: int,
        attribute_sizes: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> nn.Module:
        """Makes the network with newly initialised weights; it does not read `weights`.

        Args:
            in_channels: number of channels of an image.
            n_classes: number of classes, the background included.
            attribute_sizes: number of values of each attribute of the data.
            shape: number of pixels or voxels of the input, as in `FramingSettings.shape`.

        Raises:
            RunError: the settings make no network, or the network does not fit `shape`.
        """
        if len(shape) != self.axes:
            raise RunError(
                "model, framing: one of them is for 2D images and the other for volumes; choose "
                "two for the same kind."
            )
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
        """Makes the network of this class; `build` calls it.

        Args:
            shape: as in `build`; it has as many axes as the network.
            options: keyword arguments that all networks take.

        Raises:
            ValueError: a setting does not fit; `build` turns it into a RunError.
        """


@dataclass(frozen=True)
class TransUNetSettings(ModelSettings):
    """Settings of the TransUNet, the 2D network of the paper."""

    variant: Literal["vit_b16", "r50_vit_b16", "small"] = "vit_b16"
    """The encoder.
    - vit_b16: ViT-B/16, as in the paper's
      experiments.
    - r50_vit_b16: the full TransUNet, with a
      ResNet-50 before the ViT.
    - small: a small TransUNet that a CPU can train."""
    moe: Literal["shared", "per_block", "mlp", "none"] = "shared"
    """Where the network has experts.
    - shared: one residual layer of experts, used
      after every block (the paper).
    - per_block: a layer of experts of its own after
      each block.
    - mlp: experts replace the MLP of each block.
    - none: no experts; a dense network to compare
      with."""

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
    """Settings of the 3D Residual U-Net, the 3D network of the paper."""

    axes: ClassVar[int] = 3

    features: int = 24
    """Number of channels of the first stage. The five
    stages have 1, 1, 2, 4 and 8 times as many. The
    released code has 24."""
    moe: Literal["per_block", "none"] = "per_block"
    """Where the network has experts.
    - per_block: a residual layer of experts after
      each of --stages (the paper).
    - none: no experts; a dense network to compare
      with."""
    stages: tuple[int, ...] = (1, 2, 3, 4, 5)
    """The encoder stages, 1 to 5, that experts follow.
    The paper has experts after all five."""

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
    """Settings of the study's small 2D U-Net; only its experts use `noise`."""

    network: ClassVar[type[UNet]] = UNet
    """The class of the network. A subclass of these settings may build another one."""

    widths: tuple[int, ...] = (12, 24, 48)
    """Number of channels of each stage, multiples of 4.
    Each stage halves the image."""
    block: Literal["mlp", "channels", "film", "per_value", "moe"] = "moe"
    """What stands in each stage, and how it receives the
    attribute.
    - mlp: a dense MLP; it does not receive the
      attribute.
    - channels: a dense MLP; each attribute value is
      an extra channel of the image.
    - film: a dense MLP, whose input the attribute
      scales and shifts (FiLM). Simpler than experts;
      try it first.
    - per_value: an MLP of its own for each value.
    - moe: experts, whose router receives the
      attribute."""
    hidden: int = 8
    """Number of hidden units that a token passes through
    in all its experts together, as a multiple of the
    stage's channels. Equal numbers cost every block
    the same."""
    n_experts: int = 8
    """Number of experts in each stage; the paper has 8."""
    k: int = 2
    """Number of experts that compute each token (top-k);
    the paper has 2."""

    @property
    def told(self) -> bool:
        return self.aware and self.block != "mlp"

    def make(self, shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
        if self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: got True, which the study's small U-Net does not support; "
                "leave it out."
            )
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
