"""Scores one region of one case, 2D or 3D: its overlap, and how far apart the outlines lie.

The boundary of a region is those of its pixels (voxels) that have a neighbour along an axis outside
the region; what lies beyond the image is outside. Pixels that are ignored, since nobody has said
what is there, are neither in a region nor outside: none is scored, and none makes a neighbour part
of a boundary. Shapes: S the spatial axes, P boundary pixels.

MONAI has HD95 and surface Dice as well, and a test finds the same numbers. They are computed here
because MONAI's are rounded to float32, are not a number where both masks are empty, and took twice
as long (512 x 664 pixels: 30 against 15 ms; 160 x 160 x 60 voxels: 350 against 150 ms).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree
from torch import Tensor

POLICY = (
    "Where truth and prediction are both empty, Dice, IoU and surface Dice are 1, and HD95 is 0. "
    "Where only one of them is empty, Dice, IoU and surface Dice are 0, and HD95 is not defined. "
    "The mean HD95 leaves such a case out, and the number of cases that define it stands beside it."
)
IGNORING = (
    "Pixels that the truth marks as ignored count in no score. Where a region ends at ignored "
    "pixels, it has no outline. A region without any outline counts as empty in HD95 and surface "
    "Dice."
)


class RegionScore(NamedTuple):
    """What `score_region` returns: `hd95` in the spacing's unit, sizes in pixels or voxels."""

    dice: float
    iou: float
    hd95: float | None
    surface_dice: float
    truth_size: int
    predicted_size: int


def score_region(
    predicted_S: np.ndarray,
    truth_S: np.ndarray,
    *,
    spacing: Sequence[float],
    tolerance: float,
    ignored_S: np.ndarray | None = None,
) -> RegionScore:
    """Computes all scores of one region; empty masks as `POLICY` says.

    IoU is |P ∩ T| / |P ∪ T|; for the others see `dice`, `hd95` and `surface_dice`. A region that
    fills all that is not ignored has no boundary: two of them are scored as two empty masks, and
    one and another as one empty mask in HD95 and surface Dice.

    Args:
        predicted_S: bool, 2D or 3D.
        truth_S: bool, the same shape.
        spacing: size of a pixel along each axis.
        tolerance: of the surface Dice, in the spacing's unit.
        ignored_S: bool, the same shape: pixels that count nowhere. None: every pixel counts.

    Raises:
        TypeError: a mask is not bool.
        ValueError: the shapes differ, the spacing is not one positive number an axis, or the
            tolerance is negative.

    Example:
        >>> truth, predicted = np.zeros((2, 6, 6), dtype=bool)
        >>> truth[1:4, 1:4] = predicted[1:4, 2:5] = True  # one pixel to the right
        >>> score_region(predicted, truth, spacing=(1.0, 0.5), tolerance=0.5)
        RegionScore(dice=0.6666666666666666, iou=0.5, hd95=0.5, surface_dice=1.0,
            truth_size=9, predicted_size=9)
    """
    _check(predicted_S, truth_S, spacing, tolerance)
    if ignored_S is not None:
        _check_masks("ignored", ignored_S, truth_S, np.dtype(bool))
        predicted_S, truth_S = predicted_S & ~ignored_S, truth_S & ~ignored_S
    shared = int(np.count_nonzero(predicted_S & truth_S))
    sizes = int(np.count_nonzero(truth_S)), int(np.count_nonzero(predicted_S))
    overlap = dice(shared, sum(sizes))
    iou = shared / (sum(sizes) - shared) if any(sizes) else overlap
    distances = boundary_distances(predicted_S, truth_S, spacing, ignored_S)
    if not all(map(len, distances)):  # no boundary to measure from, or to
        alike = overlap == 1
        return RegionScore(overlap, iou, 0.0 if alike else None, float(alike), *sizes)
    return RegionScore(
        overlap,
        iou,
        hd95(*distances),
        surface_dice(*distances, tolerance=tolerance),
        *sizes,
    )


def dice(shared: int, sizes: int) -> float:
    """Dice: 2 |P ∩ T| / (|P| + |T|)  (Dice, Ecology 26(3), 1945).

    Both empty is agreement and scores 1. One of the two empty scores 0, a false alarm as well as
    a miss.

    Args:
        shared: |P ∩ T|, pixels of both masks.
        sizes: |P| + |T|, the masks' pixels together.

    Example:
        >>> dice(1, 4), dice(0, 3), dice(0, 0)
        (0.5, 0.0, 1.0)
    """
    return 2 * shared / sizes if sizes else 1.0


def batch_dice(prediction: Tensor, truth: Tensor) -> list[float]:
    """Computes each case's `dice`, on the masks' device; no case is left out.

    Args:
        prediction: bool, (cases, ...).
        truth: bool, the same shape.

    Returns:
        One number a case.

    Raises:
        TypeError: one of them is not bool.
        ValueError: the shapes differ.

    Example:
        >>> truth = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
        >>> prediction = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)
        >>> [round(score, 3) for score in batch_dice(prediction, truth)]
        [0.667, 1.0, 0.0]
    """
    _check_masks("prediction", prediction, truth, torch.bool)
    shared = (prediction & truth).flatten(1).sum(1).tolist()
    sizes = (prediction.flatten(1).sum(1) + truth.flatten(1).sum(1)).tolist()
    return [dice(common, size) for common, size in zip(shared, sizes, strict=True)]


def boundary_distances(
    predicted_S: np.ndarray,
    truth_S: np.ndarray,
    spacing: Sequence[float],
    ignored_S: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Measures how far each boundary pixel of one mask is from the nearest of the other.

    Args:
        predicted_S, truth_S: bool, neither with a pixel that is ignored.
        spacing, ignored_S: as in `score_region`.

    Returns:
        From the predicted boundary to the true one (P,), and back (P',); float64. Where one of the
        two has no pixel, neither has a distance.
    """
    predicted_P2, truth_P2 = (
        _boundary(mask, ignored_S) * np.asarray(spacing) for mask in (predicted_S, truth_S)
    )
    if not len(predicted_P2) or not len(truth_P2):
        return np.empty(0), np.empty(0)
    # A tree over the boundary alone is exact, and needs no distance at any other pixel.
    to_truth_P, _ = KDTree(truth_P2).query(predicted_P2)
    to_predicted_P, _ = KDTree(predicted_P2).query(truth_P2)
    return to_truth_P, to_predicted_P


def hd95(to_truth_P: np.ndarray, to_predicted_P: np.ndarray) -> float:
    """95 % Hausdorff distance: the larger of the two directions' 95th percentiles.

    Percentiles interpolate linearly, and every boundary pixel counts once.

    Example:
        >>> hd95(np.array([0.0, 0.0, 1.0]), np.array([2.0, 2.0]))
        2.0
    """
    return float(max(np.percentile(to_truth_P, 95), np.percentile(to_predicted_P, 95)))


def surface_dice(to_truth_P: np.ndarray, to_predicted_P: np.ndarray, *, tolerance: float) -> float:
    """Normalised surface Dice: the share of both boundaries that lies within the tolerance.

    (|{p : d(p, T) ≤ τ}| + |{t : d(t, P) ≤ τ}|) / (|∂P| + |∂T|), Nikolov et al., JMIR 23(7), 2021,
    with a boundary measured by its number of pixels.

    Example:
        >>> surface_dice(np.array([0.0, 0.0, 1.0]), np.array([2.0]), tolerance=1.0)
        0.75
    """
    distances = np.concatenate([to_truth_P, to_predicted_P])
    # Three pixels of 0.1 mm are 0.30000000000000004 mm, and within a tolerance of 0.3 mm.
    return float(np.mean(distances <= tolerance * (1 + 1e-9)))


def _boundary(mask_S: np.ndarray, ignored_S: np.ndarray | None) -> np.ndarray:
    """Finds the boundary's pixels, (P, axes); looks at the mask's bounding box only."""
    axes = range(mask_S.ndim)
    used = [np.flatnonzero(mask_S.any(tuple({*axes} - {axis}))) for axis in axes]
    if not len(used[0]):
        return np.empty((0, mask_S.ndim))
    # With the pixels around it, which may be ignored.
    starts = [max(at[0] - 1, 0) for at in used]
    box = tuple(slice(start, at[-1] + 2) for start, at in zip(starts, used, strict=True))
    box_S = mask_S[box]
    within_S = binary_erosion(box_S if ignored_S is None else box_S | ignored_S[box])
    return np.argwhere(box_S & ~within_S) + starts


def _check(
    predicted_S: np.ndarray, truth_S: np.ndarray, spacing: Sequence[float], tolerance: float
) -> None:
    """Raises what `score_region` says."""
    _check_masks("predicted", predicted_S, truth_S, np.dtype(bool))
    if len(spacing) != truth_S.ndim or not all(0 < size < np.inf for size in spacing):
        raise ValueError(
            f"spacing: got {tuple(spacing)}, expected {truth_S.ndim} positive numbers, one an axis."
        )
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance: got {tolerance}, expected a distance of 0 or more.")


def _check_masks(
    name: str,
    predicted: np.ndarray | Tensor,
    truth: np.ndarray | Tensor,
    boolean: np.dtype | torch.dtype,
) -> None:
    """Raises unless both masks are bool and of one shape; `name` is the first one's argument."""
    for argument, mask in ((name, predicted), ("truth", truth)):
        if mask.dtype != boolean:
            raise TypeError(
                f"{argument}: got {mask.dtype}, expected {boolean}; compare first (> 0, == label)."
            )
    if predicted.shape != truth.shape:
        raise ValueError(
            f"{name}: got shape {tuple(predicted.shape)}, expected that of truth, "
            f"{tuple(truth.shape)}."
        )
