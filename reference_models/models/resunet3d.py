"""The paper's 3D Residual U-Net with a mixture of experts after every encoder stage.

The network is that of Oh et al., ICML 2025 (arXiv:2502.00619), with the residual blocks of nnU-Net
and UNETR. Each of its five stages halves the volume, so that even the first experts receive only an
eighth of the voxels.

Shapes: B samples, C channels, K classes; D, H, W the volume's three axes in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import reduce
from monai.networks.blocks import UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import carry_routing, insert_after

MOE = ("per_block", "none")
WIDTHS = (1, 1, 2, 4, 8)  # channels of the five stages, in units of `features`
STRIDE = 2 ** len(WIDTHS)  # of the whole encoder


class ResUNet3D(nn.Module):
    """Residual blocks down to a 32nd of the volume's sides and up again, with experts on the way
    down.

    The experts receive the attributes from the open ``dmoe_layer.routing(attributes)`` scope. Every
    voxel of a stage's output is a token. The output of its experts is added to it, and the sum goes
    to the next stage and to the decoder. Weights start as PyTorch's, as in the paper; for the
    paper's released weights see :mod:`reference_models.models.weights`.

    Args:
        features: number of channels of the first stage. The five stages have 1, 1, 2, 4 and 8
            times as many.
        in_channels: number of channels of a volume.
        n_classes: number of classes K, the background included.
        moe: "per_block" (a residual mixture of experts after each of `stages`, as in the paper) or
            "none".
        stages: the encoder stages, counted from 1 to 5, that experts follow. "none" ignores it.
        attribute_sizes: as for DMoE; None makes a plain mixture of experts.
        n_experts, k, noise, unknown: as for DMoE.
        gradient_checkpointing: whether each stage and each block of the decoder is computed again
            in backward, to save memory.

    Raises:
        ValueError: `moe` or `stages` is not one of these, or a number is below 1.

    Example:
        >>> import torch
        >>> from dmoe_layer import routing
        >>> from reference_models.models.resunet3d import ResUNet3D
        >>> model = ResUNet3D(4, n_classes=2, attribute_sizes=4)
        >>> with routing(torch.tensor([3])):
        ...     model(torch.randn(1, 1, 64, 32, 32)).shape
        torch.Size([1, 2, 64, 32, 32])
    """

    def __init__(
        self,
        features: int = 24,
        *,
        in_channels: int = 1,
        n_classes: int,
        moe: str = "per_block",
        stages: Sequence[int] = (1, 2, 3, 4, 5),
        attribute_sizes: int | tuple[int, ...] | None = None,
        n_experts: int = 8,
        k: int = 2,
        noise: str = "train",
        unknown: str = "error",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if moe not in MOE:
            raise ValueError(f"moe: got {moe!r}, expected one of {', '.join(MOE)}.")
        for name, number in (
            ("features", features),
            ("in_channels", in_channels),
            ("n_classes", n_classes),
        ):
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1.")
        known = range(1, len(WIDTHS) + 1)
        if moe != "none" and (
            not stages or len({*stages}) < len(stages) or not {*stages} <= {*known}
        ):
            raise ValueError(
                f"stages: got {tuple(stages)}, expected some of {', '.join(map(str, known))}, each "
                "once; for no experts at all set moe='none'."
            )
        self.in_channels, self.gradient_checkpointing = in_channels, gradient_checkpointing
        options: dict[str, Any] = {
            "attribute_sizes": attribute_sizes,
            "n_experts": n_experts,
            "k": k,
            "noise": noise,
            "unknown": unknown,
        }
        widths = [features * width for width in WIDTHS]
        self.encoder = nn.ModuleList()
        for stage, (cin, cout) in enumerate(pairwise([in_channels, *widths]), start=1):
            block = UnetResBlock(3, cin, cout, kernel_size=3, stride=2, norm_name="instance")
            self.encoder.append(Stage(block))
            # Experts are inserted one by one, so that a seed draws blocks and experts in this
            # order.
            if moe != "none" and stage in stages:
                insert_after(self, f"encoder.{stage - 1}", **options)
        self.decoder = nn.ModuleList(
            UnetrUpBlock(
                3,
                cin,
                cout,
                kernel_size=3,
                upsample_kernel_size=2,
                norm_name="instance",
                res_block=True,
            )
            for cin, cout in pairwise(reversed(widths))
        )
        self.head = nn.ConvTranspose3d(features, n_classes, 2, stride=2, bias=False)

    def forward(self, image_BCDHW: Tensor, mask_BDHW: Tensor | None = None) -> Tensor:
        """Computes logits (B, K, D, H, W).

        Args:
            image_BCDHW: the volumes. Their sides are multiples of 32, and not all three are 32.
            mask_BDHW: bool, which voxels go to the experts; None for all. In each stage the experts
                receive the tokens that stand for at least one of these voxels; other tokens are not
                changed by them.

        Raises:
            ValueError, TypeError: image or mask has a wrong shape or type.
            dmoe_layer.MissingAttributesError: the experts need attributes, and no scope has any.
        """
        self._check(image_BCDHW, mask_BDHW)
        x_BCDHW, skips = image_BCDHW, []
        for stage in self.encoder:
            if mask_BDHW is not None:
                mask_BDHW = reduce(mask_BDHW, "b (d 2) (h 2) (w 2) -> b d h w", "any")
            x_BCDHW = self._run(stage, x_BCDHW.shape[2] // 2, x_BCDHW, mask=mask_BDHW)
            skips.append(x_BCDHW)
        skips.pop()
        for block in self.decoder:
            x_BCDHW = self._run(block, x_BCDHW.shape[2] * 2, x_BCDHW, skips.pop())
        return self.head(x_BCDHW)

    def _run(self, module: nn.Module, planes: int, *maps_BCDHW: Tensor, **options: Any) -> Tensor:
        """Computes the map of a stage or decoder block; it has ``planes`` along the first axis."""
        if planes == 2 and maps_BCDHW[0].is_cpu and torch.is_autocast_enabled("cpu"):
            # PyTorch 2.13's CPU convolutions in bfloat16 give a wrong gradient for a 3x3x3 kernel
            # over two planes. So few planes are computed in fp32 in little time.
            with torch.autocast("cpu", enabled=False):
                return self._step(module, *(x_BCDHW.float() for x_BCDHW in maps_BCDHW), **options)
        return self._step(module, *maps_BCDHW, **options)

    def _step(self, module: nn.Module, *maps_BCDHW: Tensor, **options: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # `carry_routing` routes the recomputation alike, even after the scope has closed.
            return checkpoint(carry_routing(module), *maps_BCDHW, use_reentrant=False, **options)
        return module(*maps_BCDHW, **options)

    def _check(self, image_BCDHW: Tensor, mask_BDHW: Tensor | None) -> None:
        shape = tuple(image_BCDHW.shape)
        if len(shape) != 5:
            raise ValueError(
                f"image: got shape {shape}, expected five axes: (batch, channels, and three of the "
                "volume)."
            )
        if shape[1] != self.in_channels:
            raise ValueError(
                f"image: got {shape[1]} channels, expected {self.in_channels}; make the network "
                f"with in_channels={shape[1]}."
            )
        # A single voxel is its own mean, so that its instance norm is always 0.
        if any(side < STRIDE or side % STRIDE for side in shape[2:]) or max(shape[2:]) == STRIDE:
            raise ValueError(
                f"image: got {' x '.join(map(str, shape[2:]))} voxels, expected three multiples of "
                f"{STRIDE}, at least one of them {2 * STRIDE} or more; resample or pad."
            )
        if mask_BDHW is None:
            return
        if mask_BDHW.dtype != torch.bool:
            raise TypeError(f"mask: got {mask_BDHW.dtype}, expected torch.bool.")
        if tuple(mask_BDHW.shape) != (shape[0], *shape[2:]):
            raise ValueError(
                f"mask: got shape {tuple(mask_BDHW.shape)}, expected {(shape[0], *shape[2:])}: one "
                "entry a voxel of each sample."
            )


class Stage(nn.Module):
    """A residual block of stride 2; its attribute ``moe`` holds the experts that may follow it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_module("moe", None)

    def forward(self, x_BCDHW: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Computes the block's map; only the experts use ``mask``."""
        return self.block(x_BCDHW)
