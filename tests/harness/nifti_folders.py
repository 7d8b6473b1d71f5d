"""Small folders of NIfTI volumes, as nnU-Net lays them out, for the tests of their reading."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from reference_models.data import DataSettings, open_dataset

NIBABEL = Path(nib.__file__).parent / "tests" / "data"
SHAPE = (6, 5, 4)
AFFINE = nib.affines.from_matvec(np.diag([1.0, 2.0, 3.0]), [-10, 5, 7])


def voxels(number=0):
    """Hounsfield units: air to bone."""
    return np.random.default_rng(number).integers(-1000, 900, SHAPE).astype(np.int16)


def mask(number=0):
    return np.random.default_rng(number).integers(0, 3, SHAPE).astype(np.uint8)


def save(path, array, affine=AFFINE, kind=nib.Nifti1Image, **fields):
    image = kind(array, affine)
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def nnunet_folder(root, n=10, rows=None, **changes):
    """`n` labelled CTs with T-stages T1, T2 and T10 in turn."""
    for name in ("imagesTr", "labelsTr"):
        (root / name).mkdir(parents=True)
    for i in range(n):
        save(root / f"imagesTr/p{i}_0000.nii.gz", voxels(i))
        save(root / f"labelsTr/p{i}.nii.gz", mask(i))
    write_layout(root, **changes)
    rows = rows or [f"p{i},T{(10, 2, 1)[i % 3]}" for i in range(n)]
    (root / "attributes.csv").write_text("\n".join(["case,T-stage", *rows]), encoding="utf-8")
    return DataSettings("folder", root)


def set_voxel(index, value):
    """What sets one voxel, or some, of an array and saves it at a path."""

    def damage(path, array):
        array = array.astype(np.float32)
        array[index] = value
        save(path, array)

    return damage


def write_layout(root, **changes):
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "tumour": 1, "node": 2},
        "file_ending": ".nii.gz",
    } | changes
    content = {name: value for name, value in content.items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


def read(settings, place):
    dataset = open_dataset(settings)
    return dataset.load(dataset.cases[place])


ROTATION = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
GRIDS = {
    "oblique": nib.affines.from_matvec(ROTATION @ np.diag([0.7, 0.7, 4]), [3, -40, 9]),
    "negative determinant": nib.affines.from_matvec(np.diag([-1, 2, 3]), [1, 2, 3]),
    "sagittal": nib.affines.from_matvec([[0, 0, 5.0], [-1, 0, 0], [0, 2.0, 0]], [1, 2, 3]),
}
