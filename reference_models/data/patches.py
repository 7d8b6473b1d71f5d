"""The parts of a volume that a network sees at once: patches in training, windows in inference.

Shapes: S spatial axes (three), V voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .cases import IGNORED, highest_label

_VOXELS = 10_000  # stored for each label, as many as nnU-Net; they may lie anywhere in a patch
_OUTLINED = "outlined"  # the key in `find_voxels` for all voxels that are not ignored


@dataclass(frozen=True)
class Patches:
    """The patches that an epoch of training draws from each volume.

    Args:
        size: number of voxels of a patch along each axis.
        count: number of patches of each volume.
        foreground: share of the patches that contain a voxel of the foreground. First a label is
            drawn from those that the volume has, however small, and then a voxel of that label.
            The other patches lie anywhere or, in a volume with ignored voxels, around a voxel that
            is not ignored.

    Raises:
        ValueError: a size or the count is below 1, or the share is not within 0 to 1.
    """

    size: tuple[int, int, int]
    count: int = 1
    foreground: float = 1 / 3

    def __post_init__(self) -> None:
        if min(*self.size, self.count) < 1 or not 0 <= self.foreground <= 1:
            raise ValueError(
                f"size, count, foreground: got {self}, expected numbers of 1 or more and a share "
                "of 0 to 1"
            )

    def draw(
        self,
        volume: tuple[int, ...],
        voxels: Mapping[str, Tensor],
        random: np.random.Generator,
    ) -> tuple[slice, ...]:
        """Draws the position of a patch.

        Args:
            volume: number of voxels of the volume along each axis.
            voxels: what `find_voxels` found in the volume.
            random: the generator to draw from.

        Raises:
            ValueError: the volume is smaller than a patch.
        """
        if any(n < side for n, side in zip(volume, self.size, strict=True)):
            raise ValueError(
                f"volume: got {volume} voxels, expected at least a patch of {self.size}; pad it "
                "first"
            )
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
    """How inference covers a whole volume: by windows, which are blended where they overlap.

    Args:
        size: number of voxels of a window along each axis.
        overlap: overlap of neighbouring windows, as a share of their size.
        at_once: number of windows in a batch.
    """

    size: tuple[int, int, int]
    overlap: float
    at_once: int


def find_voxels(mask_S: np.ndarray) -> dict[str, np.ndarray]:
    """Finds voxels of each label except 0: int32 (V, 3) by label, at most 10,000 drawn from all.

    If some voxels are ignored, the key "outlined" gives as many of the voxels that are not.
    """
    found = {}
    kept_S = mask_S != IGNORED
    for label in range(1, highest_label(mask_S) + 1):
        found[str(label)] = _drawn(mask_S == label, label)
    if not kept_S.all():
        found[_OUTLINED] = _drawn(kept_S, IGNORED)
    return {label: voxels_V3 for label, voxels_V3 in found.items() if len(voxels_V3)}


def _drawn(where_S: np.ndarray, seed: int) -> np.ndarray:
    """Gives the voxels that are true, int32 (V, 3), at most 10,000 drawn from all."""
    flat_V = np.flatnonzero(where_S)
    if len(flat_V) > _VOXELS:
        random = np.random.default_rng(seed)
        flat_V = flat_V[random.choice(len(flat_V), _VOXELS, replace=False, shuffle=False)]
    return np.stack(np.unravel_index(flat_V, where_S.shape), axis=1).astype(np.int32)
