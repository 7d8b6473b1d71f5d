"""Finds the median size of a folder's images or volumes, and warns of sizes that look wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import shown
from .cases import Case
from .readers import Grid

UNLIKE = 500  # ratio of two voxels' volumes; it is 1000 if cm are taken for mm
# In mm: the median volume's longest side, and the side of its voxel (the cube root of the voxel's
# volume). A head with voxels of 1 mm that is written in cm has 20 and 0.1. Crops of clinical scans
# may be short, but then their voxels are not fine. A whole body in cm is longer than SHORT, but its
# voxels are finer than those of any clinical scan.
SHORT, FINE, FINEST = 80.0, 0.5, 0.15
LONG = 3000.0  # mm, the longest side: nobody is that tall


def median_grid(cases: Sequence[Case], grids: Sequence[Grid]) -> Grid:
    """Finds the median size and number of pixels or voxels, without the test cases.

    Test cases must not decide anything, not even the grid, unless there are no others.

    Args:
        cases: one or more cases.
        grids: the grid of each case.
    """
    own = [grid for grid, case in zip(grids, cases, strict=True) if case.split != "test"]
    sizes, counts = np.median(own or grids, axis=0)
    return Grid(sizes, counts)


def note_images(median: Grid) -> str:
    """Says how large the median image is."""
    rows, columns = median.counts
    return f"images: the median image has {rows:.0f} rows and {columns:.0f} columns"


def note_volumes(cases: Sequence[Case], grids: Sequence[Grid], median: Grid) -> list[str]:
    """Says how large the median volume is, and warns of sizes that look wrong."""
    sizes, counts = median
    voxel = " x ".join(f"{size:.3g}" for size in sizes)
    notes = [
        f"volumes: the median volume has {' x '.join(f'{n:.0f}' for n in counts)} voxels of "
        f"{voxel} mm, from left to right, back to front and below to above"
    ]
    longest, cube = float((sizes * counts).max()), float(np.prod(sizes) ** (1 / 3))
    if (longest < SHORT and cube < FINE) or cube < FINEST:
        notes.append(
            f"warning: the median volume is {longest:.3g} mm long with voxels of {voxel} mm, as if "
            "its affine were in cm or m; if so, correct the affines, since all scores in mm and "
            "the grid depend on them"
        )
    if longest > LONG:
        notes.append(
            f"warning: the median volume is {longest:.3g} mm long, as if its affine were in "
            "micrometres; if so, correct the affines, since all scores in mm and the grid depend "
            "on them"
        )
    unlike = [
        case.case_id
        for case, grid in zip(cases, grids, strict=True)
        if not 1 / UNLIKE < np.prod(grid.sizes) / np.prod(sizes) < UNLIKE
    ]
    if unlike:
        notes.append(
            f"warning: the voxels of {len(unlike)} cases are {UNLIKE} times larger or smaller than "
            f"the median voxel, as if their affines were not in mm: {shown(unlike, 10)}"
        )
    return notes
