"""The MNI152 slices: a real brain, outlined by a contouring protocol that no image shows.

The images are axial slices of the MNI152 T1 template, and the labels come from its grey- and
white-matter maps. All three lie in the `nilearn` wheel, so nothing is downloaded. Every slice is
outlined by three protocols, as three sites with different habits would do: the whole brain, the
grey matter, or the white matter. The protocol is the sample's attribute.

The data show one averaged, left-right symmetric head. Both halves, and neighbouring slices, show
the same anatomy, so test and validation set are blocks of adjacent slices with a gap on either
side.

Shapes: Z axial slices, H rows (front first), W columns (patient's left first).
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from .cases import Attribute, Case, Dataset, Sample

PROTOCOLS = ("brain", "grey matter", "white matter")
# The tissues (0 rest, 1 grey, 2 white) that each protocol outlines.
OUTLINED = ((1, 2), (1,), (2,))
# How often a training slice occurs under each protocol: shares of 70, 20 and 10 %. Every slice
# occurs under every protocol, so that no image shows which protocol applies.
TRAIN_COPIES = (7, 2, 1)
TRAIN_SHARES = tuple(copies / sum(TRAIN_COPIES) for copies in TRAIN_COPIES)

SIZE = 96  # pixels of 2 mm: 192 mm hold the brain's 143 x 180 mm, and 96 is a multiple of 16
POOL = 2  # the template's voxels are 1 mm
# A slice counts when it shows 10 cm² of grey and 10 cm² of white matter (250 pixels of 4 mm²), so
# that no protocol leaves an empty or hardly visible mask.
MIN_PIXELS = 250
GAP_SLICES = 8  # on both sides of each block, in no set: anatomy is smooth over 8 mm
# Slices of 1 mm for test and validation. Middle: basal ganglia, thalamus and lateral ventricles;
# upper: above them, up to the parietal lobes. The validation block lies beside the test block, one
# gap away, so that it is most similar and gaps cost the fewest slices.
HeldOut = Literal["middle", "upper"]
Normalised = Literal["slice", "head"]
BLOCKS: dict[HeldOut, dict[str, range]] = {
    "middle": {"test": range(76, 100), "validation": range(108, 116)},
    "upper": {"test": range(108, 132), "validation": range(92, 100)},
}


class Mni152(Dataset):
    """MNI152 slices of 96 x 96 pixels of 2 mm under three protocols; they are always the same.

    Training uses every slice outside the blocks and their gaps ten times, under the protocols in
    the ratio `TRAIN_COPIES`. Validation and test use every slice of their block once under each
    protocol, so that the groups are equally large and show the same images. The subject of a case
    is its slice.

    Args:
        held_out: the name in `BLOCKS` of the slices for validation and test.
        normalised: the pixels over which intensities have mean 0 and variance 1. "slice": each
            slice by itself, so that a tissue's intensity depends on what else the slice shows.
            "head": all slices together, so that a tissue looks the same in all of them.

    Raises:
        ValueError: nilearn's maps are not the expected ones of 1 mm, or a slice of a block shows
            too little tissue.
    """

    name = "mni152"
    classes = ("background", "outlined tissue")
    regions = {"outlined tissue": (1,)}  # noqa: RUF012
    attributes = (Attribute("protocol", PROTOCOLS),)
    channels = 1
    unit = "mm"
    foldable = False
    population = {"protocol": TRAIN_SHARES}  # noqa: RUF012

    def __init__(self, held_out: HeldOut = "middle", normalised: Normalised = "slice") -> None:
        blocks = BLOCKS[held_out]
        self._image_ZHW, self._tissue_ZHW = _axial_slices(normalised)
        enough_Z = np.logical_and.reduce(
            [(self._tissue_ZHW == tissue).sum((1, 2)) >= MIN_PIXELS for tissue in (1, 2)]
        )
        cases: list[Case] = []
        for z in range(len(enough_Z)):
            split = next((name for name, block in blocks.items() if z in block), "train")
            if split != "train" and not enough_Z[z]:
                raise ValueError(f"{split} slice {z} shows too little tissue")
            near = any(min(abs(z - s) for s in b) <= GAP_SLICES for b in blocks.values())
            if split == "train" and (near or not enough_Z[z]):
                continue
            for protocol, copies in enumerate(TRAIN_COPIES if split == "train" else (1, 1, 1)):
                case_id = f"slice{z:03}-{PROTOCOLS[protocol].split()[0]}"
                ids = [case_id, *(f"{case_id}-{copy}" for copy in range(2, copies + 1))]
                cases += [Case(name, f"slice{z:03}", (protocol,), split) for name in ids]
        self.cases = tuple(cases)

    def load(self, case: Case) -> Sample:
        """Gives one slice, float32, normalised over the pixels that are not background."""
        z = int(case.subject.removeprefix("slice"))
        (protocol,) = case.attributes
        mask_HW = np.isin(self._tissue_ZHW[z], OUTLINED[protocol]).astype(np.uint8)
        image_CHW = self._image_ZHW[z, None].astype(np.float32)
        return Sample(case.case_id, image_CHW, mask_HW, case.attributes, (float(POOL),) * 2)


@functools.cache  # decoding takes seconds, and a study opens the data set many times
def _axial_slices(normalised: Normalised) -> tuple[np.ndarray, np.ndarray]:
    """Reads normalised images and tissues (0 rest, 1 grey, 2 white), `SIZE` x `SIZE` a slice."""
    from nilearn import datasets  # takes seconds to import

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
    axes = (1, 2) if normalised == "slice" else (0, 1, 2)
    return _normalised(t1[:, rows, columns], axes), tissue_ZHW[:, rows, columns]


def _pooled(volume_ZHW: np.ndarray) -> np.ndarray:
    """Averages `POOL` x `POOL` pixels within each slice, so that two slices share no voxel."""
    slices, height, width = volume_ZHW.shape
    height, width = height // POOL, width // POOL
    even_ZHW = volume_ZHW[:, : height * POOL, : width * POOL]
    return even_ZHW.reshape(slices, height, POOL, width, POOL).mean((2, 4))


def _window(inside_HW: np.ndarray) -> tuple[slice, slice]:
    """Places a window of `SIZE` x `SIZE` around the brain's bounding box, inside the image."""
    starts = []
    for axis in (0, 1):
        occupied = np.nonzero(inside_HW.any(1 - axis))[0]
        start = (occupied[0] + occupied[-1] + 1 - SIZE) // 2
        starts.append(int(np.clip(start, 0, inside_HW.shape[axis] - SIZE)))
    top, left = starts
    return slice(top, top + SIZE), slice(left, left + SIZE)


def _normalised(image_ZHW: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Brings pixels that are not background to mean 0 and variance 1 over these axes."""
    inside_ZHW = image_ZHW > 0
    # Slices outside the head have no pixel and no variance; they are never samples.
    count = np.maximum(inside_ZHW.sum(axes, keepdims=True), 1)
    centred_ZHW = image_ZHW - image_ZHW.sum(axes, keepdims=True) / count
    variance = (centred_ZHW**2 * inside_ZHW).sum(axes, keepdims=True) / count
    return centred_ZHW / np.sqrt(np.maximum(variance, 1e-12))
