"""The paper's 3D Residual U-Net with a mixture of experts after every encoder stage.

Oh et al., ICML 2025 (arXiv:2502.00619), after nnU-Net's and UNETR's residual blocks. Five stages
halve the volume, the first one too, so that the first experts see an eighth of the voxels.

Shapes: B samples, C channels, K classes; D, H, W the volume's three axes in whatever order.
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
    """Residual blocks down to a 32nd of the volume's sides and up again, experts on the way down.

    Attributes reach the experts from the open ``dmoe_layer.routing(attributes)`` scope. Every voxel
    of a stage's output is a token; its experts' answer is added to it, and goes on to the next
    stage and across to the decoder. All starts from PyTorch's initial weights, as in the paper; for
    its released weights see :mod:`reference_models.models.weights`.

    Args:
        features: channels of the first stage; the five have 1, 1, 2, 4 and 8 times as many.
        in_channels: of a volume.
        n_classes: K, the background included.
        moe: "per_block" (a residual mixture of experts after each of `stages`: the paper) or
            "none".
        stages: which of the five encoder stages, counted from 1, experts follow. Of no meaning to
            "none".
        attribute_sizes: of DMoE: None for a plain mixture of experts.
        n_experts, k, noise, unknown: of DMoE.
        gradient_checkpointing: computes each stage and each block of the decoder again in backward,
            to save memory.

    Raises:
        ValueError: for a moe or stages that are not there, or a number below 1.

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
            # One by one, so that a seed draws blocks and experts in this order.
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
        """Logits (B, K, D, H, W).

        Args:
            image_BCDHW: sides multiples of 32, and not 32 all three.
            mask_BDHW: bool, which voxels the experts see; None for all. At each stage they see what
                stands for at least one of these, and all else passes them by unchanged.

        Raises:
            ValueError, TypeError: image or mask are not of that kind.
            dmoe_layer.MissingAttributesError: the experts need attributes and no scope has any.
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
        """A stage's or a decoder block's map, of ``planes`` planes along the first axis."""
        if planes == 2 and maps_BCDHW[0].is_cpu and torch.is_autocast_enabled("cpu"):
            # PyTorch 2.13's CPU convolutions in bfloat16 write garbage into the gradient of a 3x3x3
            # kernel over two planes. So few are soon computed in fp32.
            with torch.autocast("cpu", enabled=False):
                return self._step(module, *(x_BCDHW.float() for x_BCDHW in maps_BCDHW), **options)
        return self._step(module, *maps_BCDHW, **options)

    def _step(self, module: nn.Module, *maps_BCDHW: Tensor, **options: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Routed the same way when it is run again, even after the scope has closed.
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
        # One voxel alone is its own mean: its instance norm is 0, whatever it was.
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
    """A residual block of stride 2, and the place ``moe`` of the experts that may follow it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_module("moe", None)

    def forward(self, x_BCDHW: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The block's map; ``mask`` is for the experts."""
        return self.block(x_BCDHW)
