"""Damages the files of small data sets at random and finds out what a reader makes of them.

    outcomes = fuzz(folder, 500, seed=0)   # by format: how many were refused, read, read wrongly

A damaged file is "refused" by an error that names it ("refused, unnamed" if not), or reads "the
same" as before (the damage lies where it does not matter), or "otherwise". Any other exception than
`DataError` passes through.
"""

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from harness.image_folders import fairseg_folder, ham_folder, nnunet_images
from harness.nifti_folders import mask, nnunet_folder
from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import Sample
from reference_models.data.splits import choose_splits
from reference_models.errors import DataError
from reference_models.evaluation.masks import read_mask

# Of these, checksums and the content's own rules find any damage that matters. JPEG, TIFF, unpacked
# NIfTI, .npy and text have none: a byte of theirs may be another one, and nobody can tell.
CHECKED = ("nii.gz", "mask nii.gz", "png", "mask png", "npz", "folder png", "folder mask png")


def damage(content, rng):
    """Damages the bytes of a file in one of the ways in which disks, networks and people do."""
    place = int(rng.integers(len(content)))
    length = int(rng.integers(1, 64))
    ways = (
        lambda: content[:place],
        lambda: content[:place] + bytes([content[place] ^ int(rng.integers(1, 256))])
        + content[place + 1 :],
        lambda: content[:place] + bytes(length) + content[place + length :],
        lambda: content[:place] + content[place + length :],
        lambda: content[:place] + rng.bytes(length) + content[place:],
        lambda: content + rng.bytes(length),
        lambda: rng.bytes(length),
        lambda: b"",
        lambda: content[::-1],
    )  # fmt: skip
    return ways[int(rng.integers(len(ways)))]()


def _pixels(settings):
    """Reads every case of a data set, and which split it is in."""

    def read():
        dataset = open_dataset(settings)
        splits = choose_splits(dataset, None, 0)
        found = [splits.train, splits.validation, splits.test]
        for case in dataset.cases:
            sample = dataset.load(case)
            found += [case, sample.image_CS, sample.mask_S, sample.spacing]
        return found

    return read


def _mask(path, size, header=None):
    sample = Sample("case", np.zeros((1, *size), np.float32), None, (), (1.0,) * len(size), header)
    return lambda: [read_mask(path, sample, ("background", "tumour", "node"))]


def targets(root):
    """Makes small data sets; gives, by format, a file and what reads it."""
    volumes = nnunet_folder(root / "volumes", n=4)
    folds = [{"train": ["p0", "p1"], "val": ["p2", "p3"]}]
    (volumes.root / "splits_final.json").write_text(str(folds).replace("'", '"'), encoding="utf-8")
    plain = nnunet_folder(root / "plain", n=4, file_ending=".nii")
    for path in [*plain.root.rglob("*.nii.gz")]:
        nib.save(nib.load(path), path.with_suffix(""))
        path.unlink()
    photographs, _ = ham_folder(root)
    textured = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    Image.fromarray(textured).save(photographs.root / "HAM10000_images/ISIC_0000001.jpg")
    scans = nnunet_images(root / "scans", n=4).root
    tiffs = nnunet_images(root / "tiffs", n=4, ending=".tif", mask_ending=".tif")
    eyes = root / "eyes"
    eyes.mkdir()
    fundus = fairseg_folder(eyes, n=4)
    labels = mask()
    Image.fromarray(labels[0]).save(root / "mask.png")
    np.save(root / "mask.npy", labels[0])
    nib.save(nib.Nifti1Image(labels, np.eye(4)), root / "mask.nii.gz")
    header = nib.load(root / "mask.nii.gz").header
    ham = photographs.root
    return {
        "nii.gz": (volumes.root / "imagesTr/p1_0000.nii.gz", _pixels(volumes)),
        "nii": (plain.root / "imagesTr/p1_0000.nii", _pixels(plain)),
        "png": (ham / "HAM10000_segmentations/ISIC_0000001_segmentation.png", _pixels(photographs)),
        "jpg": (ham / "HAM10000_images/ISIC_0000001.jpg", _pixels(photographs)),
        "folder png": (scans / "imagesTr/u1_0000.png", _pixels(DataSettings("folder", scans))),
        "folder mask png": (scans / "labelsTr/u1.png", _pixels(DataSettings("folder", scans))),
        "folder tif": (tiffs.root / "imagesTr/u1_0000.tif", _pixels(tiffs)),
        "npz": (eyes / "data_00002.npz", _pixels(fundus)),
        "attributes.csv": (volumes.root / "attributes.csv", _pixels(volumes)),
        "ham csv": (ham / "split/new_train.csv", _pixels(photographs)),
        "dataset.json": (volumes.root / "dataset.json", _pixels(volumes)),
        "splits_final.json": (volumes.root / "splits_final.json", _pixels(volumes)),
        "train.txt": (eyes / "train.txt", _pixels(fundus)),
        "mask nii.gz": (root / "mask.nii.gz", _mask(root / "mask.nii.gz", labels.shape, header)),
        "mask png": (root / "mask.png", _mask(root / "mask.png", labels[0].shape)),
        "mask npy": (root / "mask.npy", _mask(root / "mask.npy", labels[0].shape)),
    }


def fuzz(root, n, seed):
    """Damages `n` files, of all formats in turn; gives the outcomes by format."""
    rng = np.random.default_rng(seed)
    found: Counter = Counter()
    files = targets(Path(root))
    whole = {kind: (path.read_bytes(), read()) for kind, (path, read) in files.items()}
    for number in range(n):
        kind = [*files][number % len(files)]
        path, read = files[kind]
        content, before = whole[kind]
        path.write_bytes(damage(content, rng))
        try:
            after = read()
        except DataError as error:
            found[kind, "refused" if _named(path, str(error)) else "refused, unnamed"] += 1
        else:
            found[kind, "the same" if _equal(before, after) else "otherwise"] += 1
        finally:
            path.write_bytes(content)
    return found


def _named(path, text):
    """Whether an error names a file, or, of what names other files, what stands in it."""
    return path.name in text or path.suffix in (".csv", ".json", ".txt")


def _equal(before, after):
    return len(before) == len(after) and all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        for a, b in zip(before, after, strict=True)
    )
