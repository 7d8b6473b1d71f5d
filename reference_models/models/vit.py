"""The vision transformer of TransUNet, which turns patches into a feature map, with experts or not.

Shapes: B samples, C channels, H rows, W columns, D features, T tokens (one for each patch).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe_layer import carry_routing

EPSILON = 1e-6  # epsilon of the layer norms, as in Google's and the paper's networks


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
    """Attention and an MLP, each with a norm before it and a residual connection around it."""

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
    """A vision transformer over the patches of a map, without a class token.

    Args:
        in_channels: number of channels of the map.
        patch: side of a patch, in pixels of the map.
        grid: number of patches along rows and columns in the position table, which is resized for
            other maps.
        dim: number of features D.
        depth: number of blocks.
        heads: number of heads of each attention.
        mlp_dim: number of hidden units of each MLP.
        dropout: dropout rate of the embedded patches and of the MLPs.
        after_block: modules through which the output of each block goes: one module for all
            blocks, one for each block, or none.
        gradient_checkpointing: whether only the tokens between blocks are stored, and the rest is
            computed again in backward.
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
        """Computes the normalised tokens as a map (B, D, rows of patches, columns of patches)."""
        x_BDHW = self.patch_embedding(map_BCHW)
        grid = x_BDHW.shape[2:]
        x_BDHW = self.dropout(x_BDHW + resized_positions(self.positions_1DHW, grid))
        x_BTD = rearrange(x_BDHW, "b d h w -> b (h w) d")
        for n in range(len(self.blocks)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The recomputation is routed alike, even after the scope has closed.
                step = carry_routing(self._step)
                x_BTD = checkpoint(step, x_BTD, n, use_reentrant=False)
            else:
                x_BTD = self._step(x_BTD, n)
        return rearrange(self.norm(x_BTD), "b (h w) d -> b d h w", h=grid[0])

    def _step(self, x_BTD: Tensor, n: int) -> Tensor:
        x_BTD = self.blocks[n](x_BTD)
        # All blocks share the module if there is only one.
        return self.moe[n % len(self.moe)](x_BTD) if len(self.moe) else x_BTD


def resized_positions(positions_1DHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resizes a position table bilinearly with aligned corners, as Google does."""
    if positions_1DHW.shape[2:] == grid:
        return positions_1DHW
    return F.interpolate(positions_1DHW, grid, mode="bilinear", align_corners=True)


def _linear(n_in: int, n_out: int, matrices: int = 1) -> nn.Linear:
    """Makes a linear layer of one or more matrices, each initialised by Xavier as in Google's "
    "ViT."""
    linear = nn.Linear(n_in, n_out)
    for weight in linear.weight.chunk(matrices):
        nn.init.xavier_uniform_(weight)
    nn.init.zeros_(linear.bias)
    return linear
