"""Volumes are read wherever their voxels lie, and in whatever way they are stored."""

import dataclasses
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from harness.checks import checked
from harness.nifti_folders import (
    AFFINE,
    GRIDS,
    NIBABEL,
    SHAPE,
    mask,
    nnunet_folder,
    read,
    save,
    voxels,
    write_layout,
)

from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import UNKNOWN, Attribute
from reference_models.data.splits import make_splits, read_splits, write_splits
from reference_models.errors import DataError


def test_a_folder_is_read_as_nnunet_lays_it_out(tmp_path):
    settings = nnunet_folder(tmp_path, channel_names={"0": "CT", "1": "PET"})
    for i in range(10):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i + 50))
    (tmp_path / "imagesTs").mkdir()
    (tmp_path / "labelsTs").mkdir()
    for name in ("a b.v2", "new"):
        for channel in range(2):
            save(tmp_path / f"imagesTs/{name}_000{channel}.nii.gz", voxels(channel))
    save(tmp_path / "labelsTs/a b.v2.nii.gz", mask())
    table = tmp_path / "attributes.csv"
    rows = [
        f"{row},{'validation' if row[1] == '3' else ''}"
        for row in table.read_text(encoding="utf-8").split()[1:]
    ]
    table.write_text(
        "\n".join(["case,T-stage,split", *rows, "a b.v2,T2,", "new,,"]), encoding="utf-8"
    )
    dataset = open_dataset(settings)
    cases = {case.case_id: case for case in dataset.cases}
    assert dataset.attributes == (Attribute("T-stage", ("T1", "T2", "T10")),)
    assert [cases[f"p{i}"].attributes for i in range(3)] == [(2,), (1,), (0,)]
    assert (dataset.axes, dataset.channels, dataset.unit) == (3, 2, "mm")
    assert dataset.classes == ("background", "tumour", "node")
    assert dataset.regions == {"tumour": (1,), "node": (2,)}
    assert [cases[name].split for name in ("p0", "p3", "a b.v2", "new")] == [
        None, "validation", "test", None
    ]  # fmt: skip
    assert [name for name, case in cases.items() if not case.labelled] == ["new"]
    assert cases["new"].attributes == (UNKNOWN,)
    assert [Path(name).name for name in cases["p0"].files] == [
        "p0_0000.nii.gz", "p0_0001.nii.gz", "p0.nii.gz"
    ]  # fmt: skip
    sample = dataset.load(cases["p4"])
    np.testing.assert_array_equal(sample.mask_S, mask(4))
    assert sample.mask_S.dtype == np.uint8
    assert sample.image_CS.shape == (2, *SHAPE)
    assert sample.image_CS.dtype == np.float32
    assert sample.spacing == (1.0, 2.0, 3.0)
    np.testing.assert_array_equal(sample.header.get_best_affine(), AFFINE)
    unlabelled = dataset.load(cases["new"])
    assert unlabelled.mask_S is None
    assert checked(settings)[0] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Ct", lambda v: (np.clip(v, -200, 300) + 200) / 500),
        ("noNorm", lambda v: v),
        ("rescale_to_0_1", lambda v: (v - v.min()) / (v.max() - v.min())),
        ("T1", lambda v: (v - v[v != 0].mean()) / v[v != 0].std()),
    ],
)
def test_intensities_are_scaled_by_the_channels_name(tmp_path, name, expected):
    settings = nnunet_folder(tmp_path, n=3, channel_names={"0": name})
    array = voxels()
    array[:2] = 0
    save(tmp_path / "imagesTr/p0_0000.nii.gz", array)
    dataset = open_dataset(dataclasses.replace(settings, ct_window=(-200, 300)))
    image_CS = dataset.load(dataset.cases[0]).image_CS
    np.testing.assert_allclose(image_CS[0], expected(array.astype(np.float64)), atol=1e-5)
    other = open_dataset(settings)
    assert other.made_with != dataset.made_with  # so that no cached frame of the one is the other's
    save(tmp_path / "imagesTr/p0_0000.nii.gz", array * 0 + 7)
    assert np.isfinite(dataset.load(dataset.cases[0]).image_CS).all()
    assert "warning: the image has a single intensity: 1 cases: p0" in checked(settings)[1]


def test_older_folders_are_read_too(tmp_path):
    settings = nnunet_folder(
        tmp_path,
        channel_names=None,
        modality={"0": "CT"},
        labels={"1": "tumour", "2": "node", "0": "background"},
        file_ending=None,
        numTraining=11,
        training=[{"image": "./imagesTr/p0.nii.gz", "label": "./labelsTr/p0.nii.gz"}],
    )
    for path in (tmp_path / "imagesTr").iterdir():  # as the Decathlon names images
        path.rename(path.with_name(path.name.replace("_0000", "")))
    dataset = open_dataset(settings)
    assert dataset.classes == ("background", "tumour", "node")
    assert dataset.load(dataset.cases[0]).image_CS.max() == 1
    code, text = checked(settings)
    assert code == 0
    assert f"warning: {tmp_path / 'dataset.json'}: numTraining is 11, but imagesTr has 10" in text


def test_labels_that_overlap_are_regions(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    dataset = open_dataset(nnunet_folder(tmp_path, n=3, labels=labels))
    assert dataset.classes == ("background", "label 1", "core")
    assert dataset.regions == {"whole": (1, 2), "core": (2,)}


@pytest.mark.parametrize("name", GRIDS)
def test_spacing_is_of_the_stored_axes_and_the_medians_is_of_the_bodys(tmp_path, name):
    settings = nnunet_folder(tmp_path, n=3)
    for i in range(3):
        save(tmp_path / f"imagesTr/p{i}_0000.nii.gz", voxels(i), GRIDS[name])
        save(tmp_path / f"labelsTr/p{i}.nii.gz", mask(i), GRIDS[name])
    dataset = open_dataset(settings)
    sample = dataset.load(dataset.cases[1])
    stored = {"oblique": (0.7, 0.7, 4), "sagittal": (1, 2, 5)}.get(name, (1, 2, 3))
    np.testing.assert_allclose(sample.spacing, stored, rtol=1e-6)
    body = {"sagittal": (5, 1, 2)}.get(name, stored)
    np.testing.assert_allclose(dataset.spacing, body, rtol=1e-6)
    np.testing.assert_allclose(sample.header.get_best_affine(), GRIDS[name], rtol=1e-5)
    np.testing.assert_array_equal(sample.mask_S, mask(1))


def _stored(path, array, how):
    """The same numbers, written in another way."""
    if how == "big-endian":
        header = nib.Nifti1Header(endianness=">")
        header.set_data_dtype(">i2")
        nib.save(nib.Nifti1Image(array, AFFINE, header), path)
    elif how == "NIfTI-2":
        save(path, array, kind=nib.Nifti2Image)
    elif how == "slope":
        header = nib.Nifti1Header()
        header.set_data_dtype(np.int16)
        header.set_slope_inter(0.5, -1024)
        image = nib.Nifti1Image(2 * (array.astype(float) + 1024), AFFINE, header)
        image.header.set_slope_inter(0.5, -1024)
        nib.save(image, path)
    elif how == "upper case":
        save(path, array)
        path.rename(path.with_name(path.name.replace(".nii.gz", ".NII.GZ")))
    else:
        save(path, array.astype(how))


@pytest.mark.parametrize(
    "how", ["big-endian", "NIfTI-2", "slope", "upper case", "float32", "float64", "int32"]
)
def test_the_same_voxels_stored_in_another_way_are_the_same(tmp_path, how):
    settings = nnunet_folder(tmp_path, n=3)
    before = open_dataset(settings)
    before = before.load(before.cases[1])
    for path in (tmp_path / "imagesTr/p1_0000.nii.gz", tmp_path / "labelsTr/p1.nii.gz"):
        array = np.asarray(nib.load(path).dataobj).astype(np.int16)
        path.unlink()
        _stored(path, array, how)
    dataset = open_dataset(settings)
    after = dataset.load(dataset.cases[1])
    np.testing.assert_array_equal(after.image_CS, before.image_CS)
    np.testing.assert_array_equal(after.mask_S, before.mask_S)
    assert after.spacing == before.spacing
    assert checked(settings)[0] == 0


NIBABELS_OWN = {
    "anatomical.nii": None,  # big-endian 16-bit integers, from left to right reversed
    "reoriented_anat_moved.nii": None,  # big-endian floats
    "standard.nii.gz": None,
    "resampled_anat_moved.nii": "153 voxels are NaN",
    "functional.nii": "this file has 4 dimensions",
    "example4d.nii.gz": "this file has 4 dimensions",
    "example_nifti2.nii.gz": "this file has 4 dimensions",
    "row_major.dconn.nii": "not a readable NIfTI file .*Cifti2Image",
}


@pytest.mark.parametrize("name", NIBABELS_OWN)
def test_nibabels_own_files_are_read_or_refused(tmp_path, name):
    ending = ".nii.gz" if name.endswith(".gz") else ".nii"
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    write_layout(tmp_path, channel_names={"0": "noNorm"}, file_ending=ending)
    (tmp_path / "attributes.csv").write_text("case,site\nown,a", encoding="utf-8")
    path = tmp_path / f"imagesTr/own_0000{ending}"
    shutil.copy(NIBABEL / name, path)
    image = nib.load(path)
    label = np.arange(np.prod(image.shape[:3])).reshape(image.shape[:3]) % 3
    affine = getattr(image, "affine", AFFINE)
    save(tmp_path / f"labelsTr/own{ending}", label.astype(np.uint8), affine)
    settings = DataSettings("folder", tmp_path)
    if NIBABELS_OWN[name]:
        with pytest.raises(DataError, match=re.escape(f"{path}: ") + NIBABELS_OWN[name]):
            read(settings, 0)
        return
    sample = read(settings, 0)
    np.testing.assert_array_equal(sample.image_CS[0], image.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(sample.spacing, image.header.get_zooms(), rtol=1e-5)
    np.testing.assert_array_equal(sample.mask_S, label)


def test_other_data_are_read_by_the_values_that_a_run_was_trained_with(tmp_path):
    trained = (Attribute("T-stage", ("T1", "T2", "T3", "T10")),)
    settings = nnunet_folder(tmp_path, n=3, rows=["p0,x,T10", "p1,y,", "p2,z,T2"])
    table = tmp_path / "attributes.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("T-stage", "site,T-stage", 1), encoding="utf-8"
    )
    dataset = open_dataset(settings, known=trained)
    assert dataset.attributes == trained
    assert [case.attributes for case in dataset.cases] == [(3,), (UNKNOWN,), (1,)]
    table.write_text(table.read_text(encoding="utf-8").replace("T2", "T4"), encoding="utf-8")
    with pytest.raises(
        DataError,
        match=re.escape(f"{table}:4: ") + "p2: T-stage is 'T4', expected one of T1, T2, T3, T10",
    ):
        open_dataset(settings, known=trained)
    table.write_text(
        table.read_text(encoding="utf-8").replace("T-stage", "stage"), encoding="utf-8"
    )
    with pytest.raises(
        DataError, match="expected a column T-stage; the attributes in it are site, stage"
    ):
        open_dataset(settings, known=trained)


def test_cases_without_a_mask_are_in_no_split_and_are_counted_by_themselves(tmp_path):
    settings = nnunet_folder(tmp_path, n=12)
    (tmp_path / "imagesTs").mkdir()
    for i in (10, 11):
        image = tmp_path / f"imagesTr/p{i}_0000.nii.gz"
        image.rename(tmp_path / f"imagesTs/p{i}_0000.nii.gz")
        (tmp_path / f"labelsTr/p{i}.nii.gz").unlink()
    dataset = open_dataset(settings)
    splits = make_splits(dataset, 0)
    split = {*splits.train, *splits.validation, *splits.test}
    assert split == {f"p{i}" for i in range(10)}
    code, text = checked(settings)
    assert code == 0
    (row,) = [line for line in text.splitlines() if line.startswith("│ T2")]
    assert row.replace("│", " ").split()[-1] == "1"
    assert "no mask" in text
    path = tmp_path / "splits.json"
    write_splits(path, dataclasses.replace(splits, test=(*splits.test, "p10")))
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + "p10: without a mask"):
        read_splits(path, dataset)
    for i in range(10):
        (tmp_path / f"labelsTr/p{i}.nii.gz").unlink()
        image = tmp_path / f"imagesTr/p{i}_0000.nii.gz"
        image.rename(tmp_path / f"imagesTs/p{i}_0000.nii.gz")
    code, text = checked(settings)  # a folder that is there to be predicted
    assert code == 0
    assert "drawn" not in text
    assert "no training case" not in text
    assert open_dataset(settings).spacing == (1, 2, 3)


def test_the_grid_is_the_median_of_all_but_the_test_cases(tmp_path):
    rows = [f"p{i},T1,{'test' if i > 2 else ''}" for i in range(8)]
    settings = nnunet_folder(tmp_path, n=8, rows=rows)
    table = tmp_path / "attributes.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("T-stage", "T-stage,split", 1), encoding="utf-8"
    )
    for i, size in enumerate((1, 4, 2, 9, 9, 9, 9, 9)):
        for path in (tmp_path / f"imagesTr/p{i}_0000.nii.gz", tmp_path / f"labelsTr/p{i}.nii.gz"):
            save(path, mask(), np.diag([size, 1, 10 - size, 1]))
    dataset = open_dataset(settings)
    assert dataset.spacing == (2, 1, 8)
    assert (
        "volumes: the median volume has 6 x 5 x 4 voxels of 2 x 1 x 8 mm, from left"
        in dataset.notes[-1]
    )
