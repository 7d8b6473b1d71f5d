"""Real brain slices whose outline depends on a contouring protocol that the image does not show.

The images are axial slices of the MNI152 T1 template, and the labels come from its grey- and
white-matter maps; all three lie in the `nilearn` wheel, so nothing is downloaded. Every slice is
outlined by three rules, as three sites of different habits would do it: the whole brain, the grey
matter, or the white matter. The rule is the sample's attribute.

It is one averaged, left-right symmetric head. Two halves or two neighbouring slices show the same
anatomy, so the test set is a block of adjacent slices with a gap on either side.

Shapes: B samples, Z axial slices, H rows (front first), W columns (patient's left first),
A protocols.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from nilearn import datasets
from torch import Tensor
from torch.nn import functional as F

PROTOCOLS = ("brain", "grey matter", "white matter")
# How often a training slice occurs under each protocol: shares of 70, 20 and 10 %. Every slice
# occurs under every protocol, so that nothing in an image tells which one applies.
TRAIN_COPIES = (7, 2, 1)
TRAIN_SHARES = tuple(copies / sum(TRAIN_COPIES) for copies in TRAIN_COPIES)

SIZE = 96  # pixels of 2 mm: 192 mm hold the brain's 143 x 180 mm, and 96 is a multiple of 16
POOL = 2  # the template's voxels are 1 mm
# A slice counts when it shows 10 cm² of grey and 10 cm² of white matter (250 pixels of 4 mm²), so
# that no protocol leaves an empty or hardly visible mask.
MIN_PIXELS = 250
TEST_SLICES = range(76, 100)  # voxels of 1 mm: basal ganglia, thalamus and lateral ventricles
GAP_SLICES = 8  # on either side of the test block, in neither set: anatomy is smooth over 8 mm
MAX_SHIFT = 8  # pixels; training only, so that position alone does not give the outline away


@dataclass(frozen=True)
class Contours:
    """Samples in a fixed order: image, outline under one protocol, that protocol, and the slice.

    Args:
        image_B1HW: float32, each slice with mean 0 and variance 1 over its brain.
        mask_B1HW: float32, 0 or 1, never empty.
        protocol_B: int64, indices into `PROTOCOLS`.
        slice_B: int64, axial voxel indices in the 1 mm template.

    Raises:
        ValueError: the four differ in length, a mask is empty, or a protocol is unknown.
    """

    image_B1HW: Tensor
    mask_B1HW: Tensor
    protocol_B: Tensor
    slice_B: Tensor

    def __post_init__(self) -> None:
        lengths = [len(t) for t in (self.image_B1HW, self.mask_B1HW, self.protocol_B, self.slice_B)]
        if len(set(lengths)) != 1:
            raise ValueError(f"images, masks, protocols and slices differ in length: {lengths}")
        empty_B = self.mask_B1HW.flatten(1).sum(1) == 0
        if empty_B.any():
            raise ValueError(
                f"{int(empty_B.sum())} of {len(self)} masks are empty, the first in slice "
                f"{int(self.slice_B[empty_B][0])}; leave such samples out"
            )
        unknown_B = (self.protocol_B < 0) | (self.protocol_B >= len(PROTOCOLS))
        if unknown_B.any():
            got = self.protocol_B[unknown_B].unique().tolist()
            raise ValueError(f"protocols must lie in 0..{len(PROTOCOLS) - 1}, got {got}")

    def __len__(self) -> int:
        return len(self.image_B1HW)


def load_mni152() -> tuple[Contours, Contours]:
    """Training and test samples, always the same.

    Training: every slice outside the test block and its gaps, ten times, under the protocols in
    the ratio `TRAIN_COPIES`. Test: every slice of the block once under each protocol, so that the
    groups are equally large and show the same images.

    Raises:
        ValueError: the maps are not the 1 mm ones that nilearn carries, or a test slice shows too
            little tissue.
    """
    image_ZHW, tissue_ZHW = _axial_slices()
    enough_Z = np.logical_and.reduce(
        [(tissue_ZHW == tissue).sum((1, 2)) >= MIN_PIXELS for tissue in (1, 2)]
    )
    test = np.array(TEST_SLICES)
    if not enough_Z[test].all():
        raise ValueError(f"test slices {test[~enough_Z[test]].tolist()} show too little tissue")
    train = np.nonzero(enough_Z)[0]
    first, last = test[0] - GAP_SLICES, test[-1] + GAP_SLICES
    train = train[(train < first) | (train > last)]
    return (
        _contours(image_ZHW, tissue_ZHW, train, TRAIN_COPIES),
        _contours(image_ZHW, tissue_ZHW, test, (1,) * len(PROTOCOLS)),
    )


def batches(samples: Contours, *, batch_size: int, steps: int, seed: int) -> Iterator[Contours]:
    """`steps` shuffled batches, pass after pass, each sample shifted by up to `MAX_SHIFT` pixels.

    The same seed gives the same batches.

    Raises:
        ValueError: `batch_size` is below 1 or above the number of samples.
    """
    if not 1 <= batch_size <= len(samples):
        raise ValueError(f"batch_size must lie in 1..{len(samples)}, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(samples), generator=generator)
        index_B, order = order[:batch_size], order[batch_size:]
        pairs_B2HW = torch.cat([samples.image_B1HW[index_B], samples.mask_B1HW[index_B]], 1)
        pairs_B2HW = _shifted(pairs_B2HW, generator)
        yield Contours(
            pairs_B2HW[:, :1],
            pairs_B2HW[:, 1:],
            samples.protocol_B[index_B],
            samples.slice_B[index_B],
        )


def _shifted(pairs_B2HW: Tensor, generator: torch.Generator) -> Tensor:
    """Images and masks moved together; the border repeats, and it is background."""
    padded_B2HW = F.pad(pairs_B2HW, (MAX_SHIFT,) * 4, mode="replicate")
    corners_B2 = torch.randint(0, 2 * MAX_SHIFT + 1, (len(pairs_B2HW), 2), generator=generator)
    return torch.stack(
        [
            pair_2HW[:, top : top + SIZE, left : left + SIZE]
            for pair_2HW, (top, left) in zip(padded_B2HW, corners_B2.tolist(), strict=True)
        ]
    )


def _axial_slices() -> tuple[np.ndarray, np.ndarray]:
    """Normalised images and tissues (0 rest, 1 grey, 2 white), `SIZE` x `SIZE` a slice."""
    maps = [
        load(resolution=1).get_fdata(dtype=np.float32)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    ]
    shapes = [volume.shape for volume in maps]
    if shapes != [(197, 233, 189)] * 3:
        raise ValueError(f"expected three 1 mm maps of shape (197, 233, 189), got {shapes}")
    # x to the right, y to the front, z up -> slices, rows from the front, columns from the left
    t1, grey, white = (_pooled(volume.transpose(2, 1, 0)[:, ::-1]) for volume in maps)
    tissue_ZHW = np.stack([1 - grey - white, grey, white]).argmax(0)
    rows, columns = _window((tissue_ZHW > 0).any(0))
    return _normalised(t1[:, rows, columns]), tissue_ZHW[:, rows, columns]


def _pooled(volume_ZHW: np.ndarray) -> np.ndarray:
    """The mean over `POOL` x `POOL` pixels within each slice: two slices share no voxel."""
    slices, height, width = volume_ZHW.shape
    height, width = height // POOL, width // POOL
    even_ZHW = volume_ZHW[:, : height * POOL, : width * POOL]
    return even_ZHW.reshape(slices, height, POOL, width, POOL).mean((2, 4))


def _window(inside_HW: np.ndarray) -> tuple[slice, slice]:
    """The `SIZE` x `SIZE` window around the brain's bounding box, kept inside the image."""
    starts = []
    for axis in (0, 1):
        occupied = np.nonzero(inside_HW.any(1 - axis))[0]
        start = (occupied[0] + occupied[-1] + 1 - SIZE) // 2
        starts.append(int(np.clip(start, 0, inside_HW.shape[axis] - SIZE)))
    top, left = starts
    return slice(top, top + SIZE), slice(left, left + SIZE)


def _normalised(image_ZHW: np.ndarray) -> np.ndarray:
    """Each slice by itself: mean 0 and variance 1 over its pixels that are not background."""
    inside_ZHW = image_ZHW > 0
    # Slices outside the head have no pixel and no variance; they are never samples.
    count_Z11 = np.maximum(inside_ZHW.sum((1, 2), keepdims=True), 1)
    centred_ZHW = image_ZHW - image_ZHW.sum((1, 2), keepdims=True) / count_Z11
    variance_Z11 = (centred_ZHW**2 * inside_ZHW).sum((1, 2), keepdims=True) / count_Z11
    return centred_ZHW / np.sqrt(np.maximum(variance_Z11, 1e-12))


def _contours(
    image_ZHW: np.ndarray, tissue_ZHW: np.ndarray, slices: np.ndarray, copies: tuple[int, ...]
) -> Contours:
    """Each of `slices` under each protocol, as often as `copies` says."""
    mask_AZHW = np.stack([tissue_ZHW > 0, tissue_ZHW == 1, tissue_ZHW == 2])
    protocols = np.repeat(np.arange(len(PROTOCOLS)), copies)
    slice_B = np.repeat(slices, len(protocols))
    protocol_B = np.tile(protocols, len(slices))
    return Contours(
        torch.from_numpy(image_ZHW[slice_B, None].astype(np.float32)),
        torch.from_numpy(mask_AZHW[protocol_B, slice_B, None].astype(np.float32)),
        torch.from_numpy(protocol_B),
        torch.from_numpy(slice_B),
    )
