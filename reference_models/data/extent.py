"""Finds how large the images or volumes of a folder are, and notes what is odd about that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import shown
from .cases import Case
from .readers import Grid

UNLIKE = 500  # of two voxels' volumes; cm taken for mm are a factor of 1000
# mm, of the median volume's longest side and of its voxel (the cube root of its volume): a head of
# 1 mm that is written in cm has 20 and 0.1. Crops of clinical scans are small, but not both. A
# whole body in cm is longer than SHORT, but of voxels finer than any clinical scan's.
SHORT, FINE, FINEST = 80.0, 0.5, 0.15
LONG = 3000.0  # mm, of the same side: longer than anybody is


def median_grid(cases: Sequence[Case], grids: Sequence[Grid]) -> Grid:
    """Finds the median size and number of pixels or voxels, of all but the test cases.

    Test cases decide nothing, not even the grid, where there are others.

    Args:
        cases: one or more.
        grids: of each.
    """
    own = [grid for grid, case in zip(grids, cases, strict=True) if case.split != "test"]
    sizes, counts = np.median(own or grids, axis=0)
    return Grid(sizes, counts)


def note_images(median: Grid) -> str:
    """Says how large the median image is."""
    rows, columns = median.counts
    return f"images: in the median {rows:.0f} rows and {columns:.0f} columns"


def note_volumes(cases: Sequence[Case], grids: Sequence[Grid], median: Grid) -> list[str]:
    """Says how large the median volume is, and warns of sizes that cannot be meant."""
    sizes, counts = median
    voxel = " x ".join(f"{size:.3g}" for size in sizes)
    notes = [
        f"volumes: in the median {' x '.join(f'{n:.0f}' for n in counts)} voxels of {voxel} mm, "
        "from left to right, back to front and below to above"
    ]
    longest, cube = float((sizes * counts).max()), float(np.prod(sizes) ** (1 / 3))
    if (longest < SHORT and cube < FINE) or cube < FINEST:
        notes.append(
            f"warning: the median volume is {longest:.3g} mm long, of voxels of {voxel} mm, as if "
            "its affine were in cm or m; if so, correct the affines, since all scores in mm and "
            "the grid go by them"
        )
    if longest > LONG:
        notes.append(
            f"warning: the median volume is {longest:.3g} mm long, as if its affine were in "
            "micrometres; if so, correct the affines, since all scores in mm and the grid go by "
            "them"
        )
    unlike = [
        case.case_id
        for case, grid in zip(cases, grids, strict=True)
        if not 1 / UNLIKE < np.prod(grid.sizes) / np.prod(sizes) < UNLIKE
    ]
    if unlike:
        notes.append(
            f"warning: voxels {UNLIKE} times as large as the median's or as small, as if "
            f"not in mm: {len(unlike)} cases: {shown(unlike, 10)}"
        )
    return notes
