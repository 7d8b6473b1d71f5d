"""The vision transformer of TransUNet: patches in, a feature map out, experts where they are asked.

Shapes: B samples, C channels, H rows, W columns, D features, T tokens (one a patch).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import carry_routing

EPSILON = 1e-6  # of the layer norms, as in Google's and the paper's networks


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(dim, 3 * dim, matrices=3)
        self.out = _linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x_BTD), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        y_BHTd = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(y_BHTd, "b h t d -> b t (h d)"))


class Block(nn.Module):
    """Attention and MLP, each after a norm and each added to what came in."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, EPSILON)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, EPSILON)
        self.mlp: nn.Module = nn.Sequential(
            _linear(dim, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            _linear(mlp_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class ViT(nn.Module):
    """Blocks over the patches of a feature map, without a class token.

    Args:
        in_channels: of the map.
        patch: side of a patch in that map's pixels.
        grid: patches along rows and columns that the position table is made for; it is resized
            to any other.
        dim: D.
        depth: blocks.
        heads: of each attention.
        mlp_dim: width inside a block's MLP.
        dropout: of the embedded patches and of the MLPs.
        after_block: what each block's output goes through: one module for all of them, one for
            each block, or none.
        gradient_checkpointing: keeps only what goes from block to block, and computes the rest
            again during backward.
    """

    def __init__(
        self,
        in_channels: int,
        patch: int,
        grid: tuple[int, int],
        *,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        dropout: float,
        after_block: list[nn.Module],
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.patch_embedding = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.positions_1DHW = nn.Parameter(torch.empty(1, dim, *grid))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_dim, dropout) for _ in range(depth))
        self.moe = nn.ModuleList(after_block)
        self.norm = nn.LayerNorm(dim, EPSILON)
        nn.init.normal_(self.positions_1DHW, std=0.02)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """The normalised tokens as a map: (B, D, rows of patches, columns of patches)."""
        x_BDHW = self.patch_embedding(map_BCHW)
        grid = x_BDHW.shape[2:]
        x_BDHW = self.dropout(x_BDHW + resized_positions(self.positions_1DHW, grid))
        x_BTD = rearrange(x_BDHW, "b d h w -> b (h w) d")
        for n in range(len(self.blocks)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Routed the same way when it is run again, even after the scope has closed.
                step = carry_routing(self._step)
                x_BTD = checkpoint(step, x_BTD, n, use_reentrant=False)
            else:
                x_BTD = self._step(x_BTD, n)
        return rearrange(self.norm(x_BTD), "b (h w) d -> b d h w", h=grid[0])

    def _step(self, x_BTD: Tensor, n: int) -> Tensor:
        x_BTD = self.blocks[n](x_BTD)
        # One module that all blocks share stands for each of them.
        return self.moe[n % len(self.moe)](x_BTD) if len(self.moe) else x_BTD


def resized_positions(positions_1DHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position table for another grid, bilinear with its corners kept, as Google resizes it."""
    if positions_1DHW.shape[2:] == grid:
        return positions_1DHW
    return F.interpolate(positions_1DHW, grid, mode="bilinear", align_corners=True)


def _linear(n_in: int, n_out: int, matrices: int = 1) -> nn.Linear:
    """Drawn as in Google's ViT: Xavier's bounds, for each of the matrices that it holds."""
    linear = nn.Linear(n_in, n_out)
    for weight in linear.weight.chunk(matrices):
        nn.init.xavier_uniform_(weight)
    nn.init.zeros_(linear.bias)
    return linear
