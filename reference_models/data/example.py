"""Writes an example folder of volumes like a hospital's, made of the MNI152 head, to practise on.

The attribute is the acquisition: three acquisitions are simulated from the 1 mm template in the
`nilearn` wheel, so that nothing is downloaded. The labels are grey and white matter from the
template's maps. The difference between the groups is made here and known, and there is one averaged
head: scores on this folder show that the pipeline works, and nothing about fairness.

Training, validation and test show different blocks of the head, from back to front, with a gap
between them. Left and right halves would not be independent, since they look alike. Scans of one
block differ in noise, shading and field of view.

Shapes: S the three axes of an image.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nilearn import datasets
from scipy import ndimage

from ..files import write_results

SEED = 0
GAP = 8  # mm between two blocks; a scan shows its own block only
# Millimetres of the template from its back: the occipital to the central lobe, its front part, and
# the frontal lobe. Across and upwards the brain and a margin.
BLOCKS = {"train": (28, 132), "validation": (140, 160), "test": (168, 200)}
ACROSS, UPWARDS = (18, 178), (0, 160)
# Length in mm, from back to front, of a training scan, which lies anywhere in its block. The other
# blocks are scanned whole. Some training scans are as short as those, since instance norm depends
# on how much of a patch is padding.
SPANS = (20, 72)
WHITE = 1000  # intensity of the template's brightest voxel


@dataclass(frozen=True)
class Acquisition:
    """How a scan is made.

    Args:
        name: the value of the attribute.
        scans: number of scans of the training, validation and test block.
        voxel: size of a voxel in mm, left to right, back to front and below to above.
        blur: standard deviation in mm of the point spread, in addition to that of the voxel.
        noise: standard deviation, as a share of the brightest voxel.
        shading: how far the sensitivity of the coil goes up and down, as a share.
        roll: angle in degrees by which the head is turned about the axis from back to front.
        axes: the directions of the stored axes.
        dtype: the type of the stored numbers.
        slope: the factor that turns stored numbers into intensities.
    """

    name: str
    scans: tuple[int, int, int]
    voxel: tuple[float, float, float]
    blur: float
    noise: float
    shading: float
    roll: float
    axes: str
    dtype: str
    slope: float


ACQUISITIONS = (
    Acquisition("1 mm", (7, 1, 2), (1, 1, 1), 0, 0.02, 0.1, 0, "LAS", "<i2", 1),
    Acquisition("thick slices", (2, 1, 2), (1, 1, 5), 0, 0.02, 0.1, 0, "LPS", "<u2", 0.25),
    Acquisition("low field", (1, 1, 2), (2, 3, 2), 1.5, 0.06, 0.4, 10, "PSR", ">f4", 1),
)
LABELS = {"background": 0, "grey matter": 1, "white matter": 2}
NOTE = (
    "These data are made from the MNI152 template: one averaged head, with simulated acquisitions "
    "and labels from its tissue maps. They show how a folder is laid out and that the pipeline "
    "runs; scores on them say nothing about scanners, patients or fairness. What to expect: each "
    "image shows by itself how it was acquired, so that a network that receives the attribute "
    "gains no more than another seed does. Train a dense network to compare with by --moe none. "
    "Low field may score lowest, since its scans are blurred, noisy and turned, and only one "
    "training scan in ten is of low field. Its router has learned from that scan alone, so that "
    "the router of another acquisition may do better. The two test scans of an acquisition show "
    "one block of one head, so that intervals describe noise only, and say nothing about other "
    "heads."
)


def write_example(folder: Path) -> Path:
    """Writes the folder, which is always the same, completely or not at all, and returns it.

    `attributes.csv` has the acquisition, the block as subject, and the split. Of ten training scans
    seven are of 1 mm, two of thick slices, and one of low field.

    Raises:
        DataError: `folder` holds something else.
    """
    maps = [
        load(resolution=1)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    ]

    def write(target: Path) -> None:
        for name in ("imagesTr", "labelsTr"):
            (target / name).mkdir()
        rows: list[tuple[str, str, str, str]] = []
        for place, acquisition in enumerate(ACQUISITIONS):
            for split, scans in zip(BLOCKS, acquisition.scans, strict=True):
                for scan in range(scans):
                    rng = np.random.default_rng([SEED, place, len(rows)])
                    image, label = _scan(maps, acquisition, BLOCKS[split], rng)
                    case_id = f"{split}-{acquisition.name.replace(' ', '-')}-{scan + 1}"
                    nib.save(image, target / "imagesTr" / f"{case_id}_0000.nii.gz")
                    nib.save(label, target / "labelsTr" / f"{case_id}.nii.gz")
                    rows.append((case_id, acquisition.name, f"block of {split}", split))
        with (target / "attributes.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("case", "acquisition", "subject", "split"), *rows])
        content = {
            "channel_names": {"0": "T1"},
            "labels": LABELS,
            "file_ending": ".nii.gz",
            "numTraining": len(rows),
            "description": NOTE,
        }
        (target / "dataset.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (target / "README.txt").write_text(NOTE + "\n", encoding="utf-8")

    write_results(folder, write, contents=_CONTENTS)
    return folder


_CONTENTS = ("imagesTr", "labelsTr", "attributes.csv", "dataset.json", "README.txt")


def _scan(
    maps: list[nib.Nifti1Image],
    acquisition: Acquisition,
    block: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """Makes one scan of a block, and its label.

    Args:
        maps: the template, its grey and its white matter, in voxels of 1 mm.
        acquisition: the acquisition of the scan.
        block: start and end of the block, in mm from the back.
        rng: draws the position of the scan, its shading and its noise.
    """
    length = block[1] - block[0]
    span = length if length <= SPANS[1] else int(rng.integers(*SPANS, endpoint=True))
    start = int(rng.integers(block[0], block[1] - span, endpoint=True))
    box = (ACROSS, (start, start + span), UPWARDS)
    template = [volume.slicer[tuple(slice(*side) for side in box)] for volume in maps]
    size = np.array(acquisition.voxel, float)
    shape, to_box = _grid(acquisition, box)
    # A voxel averages over its box, which has the variance of a uniform distribution.
    own = np.sqrt((size**2 - 1) / 12)
    t1_S, grey_S, white_S = (
        ndimage.affine_transform(
            ndimage.gaussian_filter(
                volume.get_fdata(dtype=np.float32),
                np.hypot(own, acquisition.blur if volume is template[0] else 0),
            ),
            to_box,
            output_shape=shape,
            order=1,
        )
        for volume in template
    )
    label_S = np.stack([1 - grey_S - white_S, grey_S, white_S]).argmax(0).astype(np.uint8)
    signal_S = t1_S * (1 + acquisition.shading * _ramp(shape, rng))
    # In magnetic resonance the image is the magnitude of a complex signal with two noisy parts.
    real_S, imaginary_S = rng.normal(0, acquisition.noise, (2, *shape))
    image_S = WHITE * np.hypot(signal_S + real_S, imaginary_S)
    origin = np.array([low for low, _ in box])
    affine = maps[0].affine @ nib.affines.from_matvec(np.eye(3), origin) @ to_box
    image = _stored(image_S, affine, acquisition.axes, acquisition.dtype, acquisition.slope)
    return image, _stored(label_S, affine, acquisition.axes, "<u1", 1)


def _grid(
    acquisition: Acquisition, box: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], np.ndarray]:
    """Gives the shape of a scan's grid, and the affine from its indices to millimetres in the box.

    The grid is turned about the middle of the box.
    """
    size = np.array(acquisition.voxel, float)
    shape = tuple(int((high - low) // step) for (low, high), step in zip(box, size, strict=True))
    sine, cosine = np.sin(np.radians(acquisition.roll)), np.cos(np.radians(acquisition.roll))
    turn = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
    middle = np.array([(high - low - 1) / 2 for low, high in box])
    origin = middle - turn * size @ ((np.array(shape) - 1) / 2)
    return shape, nib.affines.from_matvec(turn * size, origin)


def _ramp(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Makes a ramp from -1 in one corner to 1 in the opposite one, with random steepness by "
    "axis."""
    ramp_S = np.zeros(shape)
    for axis, weight in enumerate(rng.dirichlet([1, 1, 1])):
        others = [other for other in range(3) if other != axis]
        ramp_S += np.expand_dims(np.linspace(-1, 1, shape[axis]), others) * weight
    return ramp_S


def _stored(
    voxels_S: np.ndarray, affine: np.ndarray, axes: str, dtype: str, slope: float
) -> nib.Nifti1Image:
    """Makes the NIfTI image of a scan, with its stored axes, type of numbers and slope."""
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm")
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    image = nib.Nifti1Image(voxels_S / slope, affine, header).as_reoriented(turn)
    image.set_qform(image.affine, code="aligned")
    image.set_sform(image.affine, code="aligned")
    image.header.set_slope_inter(slope, 0)
    return image
