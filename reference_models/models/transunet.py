"""TransUNet with a (distribution-aware) mixture of experts: the paper's 2D network and variants.

The network is from Chen et al., "TransUNet" (arXiv:2102.04306). Oh et al., ICML 2025
(arXiv:2502.00619), use it without the convolutional stem, and add one mixture of experts that all
blocks of the ViT share.

Shapes: B samples, C channels, K classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe_layer import DMoE, swap_mlps

from .resnetv2 import ResNetV2
from .vit import ViT

PATCH = 16  # side of a patch in pixels; also the stem's stride
MOE = ("shared", "per_block", "mlp", "none")


@dataclass(frozen=True)
class TransUNetConfig:
    """The sizes of a TransUNet.

    Args:
        dim, depth, heads, mlp_dim: the ViT's width, number of blocks, number of attention heads,
            and width of an MLP.
        stem_width: number of channels of the stem's root. None: there is no stem and no skips, and
            the ViT receives patches of the image.
        stem_units: number of residual units in each of the stem's stages.
        stem_groups: number of groups of the stem's group norms.
        decoder: number of channels of the decoder's first convolution and of its four blocks.
        decoder_groups: number of groups of the decoder's group norms, each of which a leaky ReLU
            follows. None: TransUNet's batch norm and ReLU.
        dropout: dropout rate of the ViT and of the experts.
        repeat_gray: whether an image of one channel is repeated to three, so that weights trained
            on photographs fit.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    stem_width: int | None = None
    stem_units: tuple[int, int, int] = (3, 4, 9)
    stem_groups: int = 32
    decoder: tuple[int, int, int, int, int] = (512, 256, 128, 64, 16)
    decoder_groups: int | None = None
    dropout: float = 0.1
    repeat_gray: bool = True


VARIANTS: Mapping[str, TransUNetConfig] = {
    "vit_b16": TransUNetConfig(),
    "r50_vit_b16": TransUNetConfig(stem_width=64),
    # Group norm makes a batch of 8 in two processes equal to a batch of 8 in one. Leaky ReLUs
    # prevent dead channels, of which there are few at full resolution.
    "small": TransUNetConfig(
        dim=64,
        depth=4,
        heads=4,
        mlp_dim=256,
        stem_width=16,
        stem_units=(1, 1, 1),
        stem_groups=4,
        decoder=(64, 32, 16, 16, 8),
        decoder_groups=4,
        repeat_gray=False,
    ),
}


class TransUNet(nn.Module):
    """A ViT on image patches or on a ResNet's features, and a decoder back to the image's size.

    The experts receive the attributes from the open ``dmoe_layer.routing(attributes)`` scope. ViT
    and experts are initialised as in their papers, and convolutions as in PyTorch. For trained
    weights see :mod:`reference_models.models.weights`.

    Args:
        variant: "vit_b16" (ViT-B/16 without skips, as in the paper's experiments), "r50_vit_b16"
            (the full TransUNet, with a ResNet-50 stem and three skips), "small" (a small network
            with stem and skips, which a CPU can train), or a TransUNetConfig.
        in_channels: number of channels of an image.
        n_classes: number of classes K, the background included.
        image_size: size of the images, a side or (rows, columns), in multiples of 16. The position
            table has this size; it is resized for images of another size.
        moe: "shared" (one residual mixture of experts, used after every block, as in the paper),
            "per_block" (a mixture of experts of its own after each block), "mlp" (experts replace
            each block's MLP, and every expert starts as that MLP) or "none".
        attribute_sizes: as for DMoE; None makes a plain mixture of experts. "none" ignores it.
        n_experts, k, noise, unknown: as for DMoE.
        gradient_checkpointing: whether each block of the ViT is computed again in backward, to
            save memory.

    Raises:
        ValueError: `variant` or `moe` is not one of these, or 16 does not divide the image size.

    Example:
        >>> import torch
        >>> from dmoe_layer import routing
        >>> from reference_models.models.transunet import TransUNet
        >>> model = TransUNet("small", in_channels=1, n_classes=2, image_size=96, attribute_sizes=3)
        >>> with routing(torch.tensor([0, 2])):
        ...     model(torch.randn(2, 1, 96, 96)).shape
        torch.Size([2, 2, 96, 96])
    """

    def __init__(
        self,
        variant: str | TransUNetConfig = "vit_b16",
        *,
        in_channels: int = 3,
        n_classes: int,
        image_size: int | tuple[int, int] = 224,
        moe: str = "shared",
        attribute_sizes: int | tuple[int, ...] | None = None,
        n_experts: int = 8,
        k: int = 2,
        noise: str = "train",
        unknown: str = "error",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(variant, str) and variant not in VARIANTS:
            raise ValueError(f"variant: got {variant!r}, expected one of {', '.join(VARIANTS)}.")
        if moe not in MOE:
            raise ValueError(f"moe: got {moe!r}, expected one of {', '.join(MOE)}.")
        for name, number in (("in_channels", in_channels), ("n_classes", n_classes)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1.")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        _check_size("image_size", size)
        config = VARIANTS[variant] if isinstance(variant, str) else variant
        self.config, self.moe_mode, self.attribute_sizes = config, moe, attribute_sizes
        self.in_channels = 3 if config.repeat_gray and in_channels == 1 else in_channels
        options: dict[str, Any] = {
            "attribute_sizes": attribute_sizes,
            "n_experts": n_experts,
            "k": k,
            "noise": noise,
            "unknown": unknown,
        }
        layers = {"shared": 1, "per_block": config.depth}.get(moe, 0)
        self.stem: ResNetV2 | None = None
        if config.stem_width is not None:
            self.stem = ResNetV2(
                self.in_channels, config.stem_width, config.stem_units, config.stem_groups
            )
        self.vit = ViT(
            self.in_channels if config.stem_width is None else 16 * config.stem_width,
            PATCH if config.stem_width is None else 1,
            (size[0] // PATCH, size[1] // PATCH),
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_dim=config.mlp_dim,
            dropout=config.dropout,
            after_block=[
                DMoE(config.dim, residual=True, dropout=config.dropout, **options)
                for _ in range(layers)
            ],
            gradient_checkpointing=gradient_checkpointing,
        )
        if moe == "mlp":
            swap_mlps(self.vit, "blocks.*.mlp", upcycle=True, **options)
        self.decoder = Decoder(config)
        self.head = nn.Conv2d(config.decoder[-1], n_classes, 3, padding=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Computes logits (B, K, H, W).

        Args:
            image_BCHW: the images, whose sides are multiples of 16. A single channel is repeated if
                the network has three.

        Raises:
            ValueError: the image has a wrong shape.
            dmoe_layer.MissingAttributesError: the experts need attributes, and no scope has any.
        """
        if image_BCHW.ndim != 4:
            shape = tuple(image_BCHW.shape)
            raise ValueError(
                f"image: got shape {shape}, expected (batch, channels, rows, columns)."
            )
        _check_size("image", tuple(image_BCHW.shape[2:]))
        if image_BCHW.shape[1] == 1 and self.in_channels == 3:
            image_BCHW = image_BCHW.expand(-1, 3, -1, -1)
        if image_BCHW.shape[1] != self.in_channels:
            raise ValueError(
                f"image: got {image_BCHW.shape[1]} channels, expected {self.in_channels}; make "
                f"the network with in_channels={image_BCHW.shape[1]}."
            )
        skips: list[Tensor] = []
        if self.stem is not None:
            image_BCHW, skips = self.stem(image_BCHW)
        return self.head(self.decoder(self.vit(image_BCHW), skips))


class Decoder(nn.Module):
    """A convolution and four blocks, each of which doubles the size, joins a skip and convolves."""

    def __init__(self, config: TransUNetConfig) -> None:
        super().__init__()
        width = config.stem_width or 0
        skips = (8 * width, 4 * width, width, 0)
        groups = config.decoder_groups
        self.entry = _convolution(config.dim, config.decoder[0], groups)
        self.blocks = nn.ModuleList(
            nn.Sequential(_convolution(cin + skip, cout, groups), _convolution(cout, cout, groups))
            for (cin, cout), skip in zip(pairwise(config.decoder), skips, strict=True)
        )

    def forward(self, x_BCHW: Tensor, skips: list[Tensor]) -> Tensor:
        x_BCHW = self.entry(x_BCHW)
        for block, skip in zip_longest(self.blocks, skips):
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=True)
            x_BCHW = block(x_BCHW if skip is None else torch.cat([x_BCHW, skip], 1))
        return x_BCHW


def _convolution(cin: int, cout: int, groups: int | None) -> nn.Sequential:
    """Makes a 3×3 convolution with its norm and activation."""
    after: tuple[nn.Module, nn.Module] = (nn.BatchNorm2d(cout), nn.ReLU())
    if groups is not None:
        after = (nn.GroupNorm(groups, cout), nn.LeakyReLU())
    return nn.Sequential(nn.Conv2d(cin, cout, 3, padding=1, bias=False), *after)


def _check_size(name: str, size: tuple[int, ...]) -> None:
    if len(size) != 2 or any(side < PATCH or side % PATCH for side in size):
        raise ValueError(
            f"{name}: got {' x '.join(map(str, size))} pixels, expected two multiples of {PATCH}, "
            "the side of a patch; resize or pad the image."
        )
