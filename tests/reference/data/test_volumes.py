"""A NIfTI file that is no volume, or not all of one, is refused by name; oddities are told."""

import gzip
import re

import nibabel as nib
import numpy as np
import pytest
from harness.checks import checked, errors
from harness.nifti_folders import (
    AFFINE,
    GRIDS,
    SHAPE,
    mask,
    nnunet_folder,
    read,
    save,
    set_voxel,
    voxels,
)

from reference_models.data import open_dataset
from reference_models.data.readers import open_volume
from reference_models.errors import DataError


def _bad_header(**fields):
    return lambda path, array: save(path, array, **fields)


def _with_affine(change):
    affine = AFFINE.copy()
    affine[:3] = change(affine[:3])

    def damage(path, array):
        header = nib.Nifti1Header()
        header["srow_x"], header["srow_y"], header["srow_z"] = affine[:3]
        header["sform_code"] = 1
        header.set_data_shape(array.shape)
        header.set_data_dtype(array.dtype)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        content = header.binaryblock + bytes(4) + array.tobytes(order="F")
        path.write_bytes(gzip.compress(content))

    return damage


def _bytes(change):
    def damage(path, array):
        path.write_bytes(change(path.read_bytes()))

    return damage


def _moved(x):
    affine = AFFINE.copy()
    affine[0, 3] += x
    return affine


COLOURS = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


# What is done to a file, and what is said of it.
BAD_FILES = {
    "4D": (lambda p, a: save(p, np.stack([a, a], -1)), "4 dimensions .6, 5, 4, 2."),
    "one time point": (lambda p, a: save(p, a[..., None]), "4 dimensions"),
    "2D": (lambda p, a: save(p, a[..., 0]), "2 dimensions"),
    "complex": (lambda p, a: save(p, a.astype(np.complex64)), "complex"),
    "colours": (lambda p, a: save(p, np.zeros(SHAPE, COLOURS)), "colours"),
    "NaN": (
        set_voxel((1, 2, 3), np.nan), r"1 voxels are NaN or infinite, the first at .* \(1, 2, 3\)"
    ),
    "infinite": (set_voxel((0, 0), np.inf), "4 voxels are NaN or infinite"),
    "other shape": (lambda p, a: save(p, a[:, :, 1:]), r"\(6, 5, 3\) voxels.*has \(6, 5, 4\)"),
    "elsewhere": (lambda p, a: save(p, a, _moved(0.2)), "corners are up to 0.2 voxels away"),
    "flipped": (lambda p, a: save(p, a, GRIDS["negative determinant"]), "lies elsewhere"),
    "other spacing": (lambda p, a: save(p, a, AFFINE @ np.diag([1, 1, 1.1, 1])), "lies elsewhere"),
    "singular": (_with_affine(lambda m: m * [1, 1, 0, 1]), "singular"),
    "axes alike": (_with_affine(lambda m: m[:, [0, 0, 2, 3]]), "singular"),
    "not finite": (_with_affine(lambda m: m * [1, np.nan, 1, 1]), "singular or not finite"),
    "tilted": (_with_affine(lambda m: m + np.outer([0, 0, 1], [0, 0.5, 0, 0])), "14.0° off right"),
    "in metres": (_bad_header(xyzt_units=1), "lengths are in meter, expected mm"),
    "in no unit": (_bad_header(xyzt_units=7), "lengths are in unit 7, expected mm"),
    "more than it claims": (
        _bytes(lambda b: gzip.compress(gzip.decompress(b) + bytes(5))), "5 bytes more than"
    ),
    "cut off": (_bytes(lambda b: b[:-30]), "not a readable NIfTI"),
    "cut off at once": (_bytes(lambda b: b[:60]), "not a readable NIfTI"),
    "empty": (_bytes(lambda b: b""), "not a readable NIfTI"),
    "text": (_bytes(lambda b: b"sorry"), "not a readable NIfTI"),
    "not deflated": (_bytes(gzip.decompress), "is not packed by gzip"),
    "deflated twice": (_bytes(gzip.compress), "not a readable NIfTI"),
    "a byte off": (_bytes(lambda b: b[:-8] + bytes([b[-8] ^ 1]) + b[-7:]), "not a readable NIfTI"),
    "header alone": (
        _bytes(lambda b: gzip.compress(gzip.decompress(b)[:352])), "not a readable NIfTI"
    ),
    "claims terabytes": (
        _bytes(lambda b: gzip.compress(_claiming(gzip.decompress(b)))), "cut off: its header claims"
    ),
}  # fmt: skip


BAD_LABELS = {
    "label out of range": (set_voxel((0, 0, 0), 3), "expected the labels 0 to 2 .*; got also 3;"),
    "negative label": (set_voxel((0, 0, 0), -1), "got also -1;"),
    "label of 256": (set_voxel((0, 0, 0), 256), "got also 256;"),
    "smoothed label": (set_voxel((0, 0, 0), 0.5), "whole numbers as labels, .* got 0.5;"),
    "scaled label": (_bad_header(scl_slope=0.25, scl_inter=0), "whole numbers"),
}


def _claiming(content):
    header = nib.Nifti1Header(content[:348])
    header.set_data_shape((30000, 30000, 30000))
    return header.binaryblock + content[348:]


@pytest.mark.parametrize(
    ("which", "fault"),
    [("imagesTr/p4_0001", fault) for fault in BAD_FILES]
    + [("labelsTr/p4", fault) for fault in (*BAD_FILES, *BAD_LABELS)],
)
def test_check_names_a_bad_volume_and_says_what_is_wrong(tmp_path, which, fault):
    settings = nnunet_folder(tmp_path, n=5, channel_names={"0": "CT", "1": "MR"})
    for i in range(5):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i))
    damage, words = (BAD_FILES | BAD_LABELS)[fault]
    path = tmp_path / f"{which}.nii.gz"
    array = mask() if "labels" in which else voxels()
    save(path, array, _moved(0.05))  # which is rounding
    assert checked(settings)[0] == 0
    damage(save(path, array), array)
    code, text = checked(settings)
    assert code == 1
    assert len(errors(text)) == 1
    assert str(path) in errors(text)[0]
    assert re.search(words, text)
    with pytest.raises(DataError, match=re.escape(str(path))):
        read(settings, 4)


def test_no_damaged_byte_of_a_deflated_volume_goes_unnoticed(tmp_path):
    # More than a reader takes at once, and of noise, so that no two streams stand for the same.
    whole_S = np.random.default_rng(0).integers(0, 256, (64, 64, 80)).astype(np.uint8)
    path = save(tmp_path / "p0.nii.gz", whole_S)
    volume = open_volume(str(path))
    np.testing.assert_array_equal(volume.read(), whole_S)
    content = path.read_bytes()
    end = len(content)
    for place in (*range(10, end, end // 40), *range(end - 8, end)):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(f"{path}: ") + "not a readable NIfTI"):
            volume.read()


def test_check_warns_of_what_is_odd_but_can_be_read(tmp_path, caplog):
    settings = nnunet_folder(tmp_path)
    image = nib.Nifti1Image(voxels(), AFFINE)
    image.set_qform(GRIDS["oblique"], code=1)
    nib.save(image, tmp_path / "imagesTr/p0_0000.nii.gz")
    for path in (tmp_path / "imagesTr/p1_0000.nii.gz", tmp_path / "labelsTr/p1.nii.gz"):
        nib.save(nib.Nifti1Image(voxels() % 3, None), path)
    save(tmp_path / "imagesTr/p2_0000.nii.gz", voxels(), pixdim=[1, 3, 3, 3, 1, 1, 1, 1])
    save(tmp_path / "imagesTr/p3_0000.nii.gz", voxels() + 1024)
    save(tmp_path / "labelsTr/p4.nii.gz", mask() * 0)
    path = tmp_path / "imagesTr/p5_0000.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = np.float32(-1).tobytes()  # pixdim[1]
    path.write_bytes(gzip.compress(content))
    (tmp_path / "imagesTr/p5.dcm").write_text("another format", encoding="utf-8")
    code, text = checked(settings)
    assert code == 0
    for warning in (
        "sform and qform disagree; the sform is used: 1 cases: p0",
        "the header has neither sform nor qform, so that it is not known which side is left; the "
        "first axis is assumed to run from right to left: 1 cases: p1",
        "pixdim and sform disagree on the voxels' size; the sform is used: 1 cases: p2",
        "header: pixdim[1,2,3] should be positive: 1 cases: p5",
        "no voxel of the CT is below 0 HU, as if it were shifted or scaled already: 2 cases: "
        "p1, p3",
        "the mask has no tumour: 1 cases: p4",
        "the mask has no node: 1 cases: p4",
        f"{tmp_path / 'imagesTr'}: files that do not end in .nii.gz are left out: p5.dcm",
    ):
        assert f"warning: {warning}\n" in text
    assert "a single intensity" not in text
    assert "as if their affines were not in mm" not in text
    assert not caplog.records  # nibabel's own remarks name no file
    assert read(settings, 0).spacing == (1, 2, 3)  # of the sform


def test_check_warns_of_an_empty_channel_and_of_a_volume_in_cm(tmp_path):
    settings = nnunet_folder(tmp_path, n=5, channel_names={"0": "CT", "1": "MR"})
    for i in range(5):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i) * (i != 3))
    for path in tmp_path.glob("*Tr/p2*"):
        save(path, np.asarray(nib.load(path).dataobj), AFFINE * [0.1, 0.1, 0.1, 1])
    code, text = checked(settings)
    assert code == 0
    assert "warning: channel 0001 has a single intensity: 1 cases: p3\n" in text
    assert (
        "warning: the voxels of 1 cases are 500 times larger or smaller than the median voxel, as "
        "if their affines were not in mm: p2\n"
    ) in text


def test_check_names_all_that_is_wrong_in_one_run(tmp_path):
    settings = nnunet_folder(tmp_path, n=30)
    bad = [tmp_path / f"imagesTr/p{i}_0000.nii.gz" for i in range(16)]
    for i, path in enumerate(bad):
        (set_voxel((0, 0, 0), np.nan) if i % 2 else BAD_FILES["cut off at once"][0])(path, voxels())
    (tmp_path / "labelsTr/p20.nii.gz").unlink()
    table = tmp_path / "attributes.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("p21,T10", "p21,").replace("p22,T2", "p99,T2"),
        encoding="utf-8",
    )
    code, text = checked(settings)
    assert code == 1
    lines = errors(text)
    assert len(lines) == 19
    for name in (
        *bad,
        tmp_path / "labelsTr/p20.nii.gz",
        f"{table}:24: 'p99'",
        f"{table}: there is no row",
    ):
        assert sum(str(name) in line for line in lines) == 1
    assert "warning: T-stage is unknown: 1 cases: p21" in text
    with pytest.raises(DataError, match="more; the command `check` names them all"):
        open_dataset(settings)
