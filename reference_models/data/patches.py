"""Which parts of a volume a network sees at once: patches in training, windows in inference.

Shapes: S spatial axes (three), V voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

_VOXELS = 10_000  # kept of a label, as many as nnU-Net keeps; each may lie anywhere in its patch


@dataclass(frozen=True)
class Patches:
    """What an epoch of training sees of each volume.

    Args:
        size: voxels of a patch.
        count: patches of each volume.
        foreground: share of the patches that are laid around a voxel of the foreground. Its label
            is drawn from those that the volume has, however small, and then the voxel. The other
            patches lie anywhere.

    Raises:
        ValueError: a size or count below 1, or a share outside of 0 to 1.
    """

    size: tuple[int, int, int]
    count: int = 1
    foreground: float = 1 / 3

    def __post_init__(self) -> None:
        if min(*self.size, self.count) < 1 or not 0 <= self.foreground <= 1:
            raise ValueError(f"sizes and counts start at 1, shares lie in 0..1, got {self}")

    def draw(
        self,
        volume: tuple[int, ...],
        voxels: Mapping[str, Tensor],
        random: np.random.Generator,
    ) -> tuple[slice, ...]:
        """Draws where a patch lies.

        Args:
            volume: voxels of it along each axis.
            voxels: as `find_voxels` found them.
            random: to be drawn from.

        Raises:
            ValueError: the volume is smaller than a patch.
        """
        if any(n < side for n, side in zip(volume, self.size, strict=True)):
            raise ValueError(f"a volume of {volume} holds no patch of {self.size}; pad it first")
        lowest = np.zeros(3, int)
        highest = np.subtract(volume, self.size)
        if voxels and random.random() < self.foreground:
            voxels_V3 = voxels[random.choice(sorted(voxels))]
            voxel = voxels_V3[random.integers(len(voxels_V3))].numpy()
            lowest = np.maximum(lowest, voxel - self.size + 1)
            highest = np.minimum(highest, voxel)
        starts = random.integers(lowest, highest, endpoint=True).tolist()
        return tuple(
            slice(start, start + side) for start, side in zip(starts, self.size, strict=True)
        )


@dataclass(frozen=True)
class Windows:
    """How a whole volume is answered: window by window, blended where they overlap.

    Args:
        size: voxels of a window.
        overlap: of neighbouring windows, as a share of their size.
        at_once: how many the network is given at a time.
    """

    size: tuple[int, int, int]
    overlap: float
    at_once: int


def find_voxels(mask_S: np.ndarray) -> dict[str, np.ndarray]:
    """Where labels other than 0 lie: by label, int32 (V, 3), at most 10,000 drawn from all."""
    found = {}
    for label in range(1, int(mask_S.max()) + 1):
        flat_V = np.flatnonzero(mask_S == label)
        if len(flat_V) > _VOXELS:
            random = np.random.default_rng(label)
            flat_V = flat_V[random.choice(len(flat_V), _VOXELS, replace=False, shuffle=False)]
        if len(flat_V):
            voxels_V3 = np.stack(np.unravel_index(flat_V, mask_S.shape), axis=1)
            found[str(label)] = voxels_V3.astype(np.int32)
    return found
