"""Writes a folder as a radiotherapy group would have it, made of the MNI152 head, to practise on.

The attribute is the acquisition: three that are simulated from the 1 mm template that the `nilearn`
wheel holds, so that nothing is downloaded. The labels are grey and white matter, outlined on the
template's maps. The shift between the groups is made here and known, and it is one averaged head:
what is measured on this folder proves that the pipeline works, and nothing about fairness.

Training, validation and test show different blocks of the head, from back to front, with a gap
between them; halves of it would not do, since left and right look alike. Scans of one block differ
in noise, shading and field of view.

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
GAP = 8  # mm between two blocks; scans are made of their block alone
# Millimetres of the template from its back: the occipital to the central lobe, its front part, and
# the frontal lobe. Across and upwards the brain and a margin.
BLOCKS = {"train": (28, 132), "validation": (140, 160), "test": (168, 200)}
ACROSS, UPWARDS = (18, 178), (0, 160)
# mm from back to front in a training scan, somewhere in its block; the other blocks are scanned
# whole. Some as short as those, since instance norm sees how much of a patch is padding.
SPANS = (20, 72)
WHITE = 1000  # intensity of the template's brightest voxel


@dataclass(frozen=True)
class Acquisition:
    """How a scan is made.

    Args:
        name: value of the attribute.
        scans: of the training, validation and test block.
        voxel: mm from left to right, back to front and below to above.
        blur: standard deviation, mm, of the point spread beyond the voxel's own.
        noise: standard deviation, as a share of the brightest voxel.
        shading: of the coil: how far its sensitivity goes up and down.
        roll: degrees by which the head lies turned about the axis from back to front.
        axes: which way the stored axes point.
        dtype: of the stored numbers.
        slope: what they are multiplied by to give intensities.
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
    "Made from the MNI152 template: one averaged head, with simulated acquisitions and labels "
    "from its tissue maps. It shows how a folder is laid out and that the pipeline runs; scores "
    "on it say nothing about scanners, patients or fairness. What to expect: images show by "
    "themselves how they were acquired, so that telling the network gains no more than another "
    "seed does; a dense one, to compare, is trained by --moe none. Low field may be the lowest, as "
    "it is blurred, noisy and turned, and one training scan in ten; its router has seen that scan "
    "alone, and another's may do better. The two test scans of an acquisition show one block of "
    "one head, so that intervals are of noise alone and say nothing of other heads."
)


def write_example(folder: Path) -> Path:
    """Writes the nnU-Net folder, always the same, whole or not at all; returns it.

    `attributes.csv` has the acquisition, the block as subject, and the split. Seven tenths of the
    training scans are of 1 mm, two of thick slices and one of low field.

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
        acquisition: how it is scanned.
        block: where it starts and ends, mm from the back.
        rng: draws where the scan lies, its shading and its noise.
    """
    length = block[1] - block[0]
    span = length if length <= SPANS[1] else int(rng.integers(*SPANS, endpoint=True))
    start = int(rng.integers(block[0], block[1] - span, endpoint=True))
    box = (ACROSS, (start, start + span), UPWARDS)
    template = [volume.slicer[tuple(slice(*side) for side in box)] for volume in maps]
    size = np.array(acquisition.voxel, float)
    shape, to_box = _grid(acquisition, box)
    # A voxel is a mean over its box, whose variance is that of a uniform distribution.
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
    # The magnitude of a complex signal whose two parts are noisy, as magnetic resonance has it.
    real_S, imaginary_S = rng.normal(0, acquisition.noise, (2, *shape))
    image_S = WHITE * np.hypot(signal_S + real_S, imaginary_S)
    origin = np.array([low for low, _ in box])
    affine = maps[0].affine @ nib.affines.from_matvec(np.eye(3), origin) @ to_box
    image = _stored(image_S, affine, acquisition.axes, acquisition.dtype, acquisition.slope)
    return image, _stored(label_S, affine, acquisition.axes, "<u1", 1)


def _grid(
    acquisition: Acquisition, box: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape of a scan's voxels, and the affine from their indices to the box's millimetres.

    The grid lies turned in the box, with the box's middle as its own.
    """
    size = np.array(acquisition.voxel, float)
    shape = tuple(int((high - low) // step) for (low, high), step in zip(box, size, strict=True))
    sine, cosine = np.sin(np.radians(acquisition.roll)), np.cos(np.radians(acquisition.roll))
    turn = np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
    middle = np.array([(high - low - 1) / 2 for low, high in box])
    origin = middle - turn * size @ ((np.array(shape) - 1) / 2)
    return shape, nib.affines.from_matvec(turn * size, origin)


def _ramp(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A slope from -1 in one corner to 1 in the opposite one, steeper along one axis or another."""
    ramp_S = np.zeros(shape)
    for axis, weight in enumerate(rng.dirichlet([1, 1, 1])):
        others = [other for other in range(3) if other != axis]
        ramp_S += np.expand_dims(np.linspace(-1, 1, shape[axis]), others) * weight
    return ramp_S


def _stored(
    voxels_S: np.ndarray, affine: np.ndarray, axes: str, dtype: str, slope: float
) -> nib.Nifti1Image:
    """The NIfTI image of some voxels, with the axes, numbers and slope that a scan is stored in."""
    header = nib.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(dtype)
    header.set_xyzt_units("mm")
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    image = nib.Nifti1Image(voxels_S / slope, affine, header).as_reoriented(turn)
    image.set_qform(image.affine, code="aligned")
    image.set_sform(image.affine, code="aligned")
    image.header.set_slope_inter(slope, 0)
    return image
