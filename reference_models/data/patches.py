"""Which parts of a volume a network sees at once: patches in training, windows in inference.

Shapes: S spatial axes (three), V voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .cases import IGNORED, highest_label

_VOXELS = 10_000  # kept of a label, as many as nnU-Net keeps; each may lie anywhere in its patch
_OUTLINED = "outlined"  # among the labels of `find_voxels`: all that are not ignored


@dataclass(frozen=True)
class Patches:
    """What an epoch of training sees of each volume.

    Args:
        size: voxels of a patch.
        count: patches of each volume.
        foreground: share of the patches that are laid around a voxel of the foreground. Its label
            is drawn from those that the volume has, however small, and then the voxel. The other
            patches lie anywhere or, in a volume of which parts are ignored, around a voxel that is
            not.

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
        labels = sorted(voxels.keys() - {_OUTLINED})
        around = _OUTLINED if _OUTLINED in voxels else None
        if labels and random.random() < self.foreground:
            around = random.choice(labels)
        if around is not None:
            voxels_V3 = voxels[around]
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
    """Where labels other than 0 lie: by label, int32 (V, 3), at most 10,000 drawn from all.

    Where parts are ignored, under "outlined" as many of those voxels that are not.
    """
    found = {}
    kept_S = mask_S != IGNORED
    for label in range(1, highest_label(mask_S) + 1):
        found[str(label)] = _drawn(mask_S == label, label)
    if not kept_S.all():
        found[_OUTLINED] = _drawn(kept_S, IGNORED)
    return {label: voxels_V3 for label, voxels_V3 in found.items() if len(voxels_V3)}


def _drawn(where_S: np.ndarray, seed: int) -> np.ndarray:
    """The voxels that are true, int32 (V, 3), at most 10,000 drawn from all."""
    flat_V = np.flatnonzero(where_S)
    if len(flat_V) > _VOXELS:
        random = np.random.default_rng(seed)
        flat_V = flat_V[random.choice(len(flat_V), _VOXELS, replace=False, shuffle=False)]
    return np.stack(np.unravel_index(flat_V, where_S.shape), axis=1).astype(np.int32)
