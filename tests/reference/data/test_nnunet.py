"""nnU-Net's folders and dataset.json: what makes up no case, or no task, is refused by name."""

import builtins
import dataclasses
import re

import numpy as np
import pytest
from harness.checks import checked, errors
from harness.nifti_folders import (
    nnunet_folder,
    save,
    voxels,
    write_layout,
)

from reference_models.data import open_dataset
from reference_models.errors import DataError


def _rename(old, new):
    return lambda root: (root / old).rename(root / new)


def _remove(name):
    return lambda root: (root / name).unlink()


def _copy(old, new):
    def change(root):
        (root / new).parent.mkdir(exist_ok=True)
        (root / new).write_bytes((root / old).read_bytes())

    return change


BAD_FOLDERS = {
    "no label": (_remove("labelsTr/p3.nii.gz"), "{root}/labelsTr/p3.nii.gz: there is no such mask"),
    "no image": (
        _remove("imagesTr/p3_0000.nii.gz"),
        "{root}/labelsTr/p3.nii.gz: this mask has no image",
    ),
    "no first channel": (
        _rename("imagesTr/p3_0000.nii.gz", "imagesTr/p3_0001.nii.gz"),
        "{root}/imagesTr/p3_0001.nii.gz: its name says channel 0001, but",
    ),
    "one channel too many": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTr/p3_0001.nii.gz"),
        "p3_0001.nii.gz: its name says channel 0001, but {root}/dataset.json names 1 channels",
    ),
    "also not deflated": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTr/p3_0000.nii"),
        "{root}/imagesTr/p3_0000.nii: this file ends in .nii, but the file_ending of",
    ),
    "two spellings": (
        _copy("labelsTr/p3.nii.gz", "labelsTr/p3.NII.GZ"), "the same name as"
    ),
    "with and without channel": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTr/p3.nii.gz"), "the same channel as"
    ),
    "trained and tested on": (
        _copy("imagesTr/p3_0000.nii.gz", "imagesTs/p3_0000.nii.gz"),
        "{root}/imagesTs/p3_0000.nii.gz: its case has images in {root}/imagesTr already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_check_names_files_that_make_up_no_case(tmp_path, fault):
    settings = nnunet_folder(tmp_path)
    change, words = BAD_FOLDERS[fault]
    change(tmp_path)
    code, text = checked(settings)
    assert code == 1
    (line,) = [line for line in errors(text) if "attributes.csv" not in line]
    assert words.format(root=tmp_path.as_posix()) in line.replace("\\", "/")


def test_a_channel_that_is_missing_is_named_and_so_is_a_4d_image_without_channels(tmp_path):
    settings = nnunet_folder(tmp_path, n=4, channel_names={"0": "T1", "1": "T2"})
    for i in (0, 2, 3):
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i))
    path = tmp_path / "imagesTr/p2_0000.nii.gz"
    path.rename(path.with_name("p2.nii.gz"))
    with pytest.raises(DataError) as raised:
        open_dataset(settings)
    images, said = tmp_path / "imagesTr", str(raised.value)
    assert f"{images / 'p1_0001.nii.gz'}: there is no such file (channel T2)" in said
    assert f"{images / 'p2.nii.gz'}: expected a file for each of the 2" in said


def test_hidden_files_and_other_peoples_files_are_no_cases(tmp_path):
    settings = nnunet_folder(tmp_path)
    for name in ("._p0_0000.nii.gz", ".DS_Store", "notes.txt"):
        (tmp_path / "imagesTr" / name).write_bytes(b"of macOS")
    assert len(open_dataset(settings).cases) == 10
    assert "files that do not end in .nii.gz are left out: notes.txt\n" in checked(settings)[1]


BAD_LAYOUTS = {
    "none": (None, "no such file; write one"),
    "trailing comma": ('{"labels": {"background": 0,},}', "not readable json .*line 1"),
    "a list": ("[]", "expected an object"),
    "a dataset key": ({"dataset": {}}, "the key 'dataset' lists files"),
    "other ending": (
        {"file_ending": ".dcm"},
        "is '.dcm', expected one of .nii.gz, .nii, .mha",
    ),
    "no channels": ({"channel_names": None}, "expected channel_names that name"),
    "empty channels": ({"channel_names": {}}, "channel_names is empty"),
    "channels from 1": ({"channel_names": {"1": "CT"}}, "expected channel_names that name"),
    "no labels": ({"labels": None}, "expected labels such as"),
    "a gap": ({"labels": {"background": 0, "tumour": 2}}, r"without a gap.*got \[0, 2\]"),
    "background alone": ({"labels": {"background": 0}}, "at least 0 and 1"),
    "ignore": ({"labels": {"background": 0, "a": 1, "ignore": 3}}, "ignore label"),
    "fraction": (
        {"labels": {"background": 0, "tumour": 1.5}},
        "'tumour' is 1.5, expected a whole number",
    ),
    "text": (
        {"labels": {"background": 0, "tumour": "one"}},
        "'tumour' is 'one', expected a whole number",
    ),
    "two names": ({"labels": {"background": 0, "a": 1, "b": 1}}, "two names have the same labels"),
    "no background": ({"labels": {"all": [0, 1], "a": 1}}, "expected a name for 0 alone"),
    "one name twice": (
        {"labels": {"0": "background", "1": "a", "2": "a"}},
        "two labels have the same name",
    ),
    "257 labels": ({"labels": {str(i): f"l{i}" for i in range(257)}}, "at most 255"),
}


@pytest.mark.parametrize("fault", BAD_LAYOUTS)
def test_a_dataset_json_that_cannot_be_used_is_refused(tmp_path, fault):
    settings = nnunet_folder(tmp_path, n=3)
    content, words = BAD_LAYOUTS[fault]
    path = tmp_path / "dataset.json"
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        write_layout(tmp_path, **content)
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + ".*" + words):
        open_dataset(settings)
    assert checked(settings)[0] == 1


def test_a_folder_without_images_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    settings = nnunet_folder(tmp_path, n=3)
    path = tmp_path / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(open_dataset(settings).cases) == 3
    (tmp_path / "imagesTr").rename(tmp_path / "images")
    with pytest.raises(
        DataError,
        match=re.escape(f"{tmp_path}: ") + r"there is no \.nii\.gz file in its folder imagesTr",
    ):
        open_dataset(settings)
    for low, high in ((250, -175), (0, 0), (np.nan, 1), (-np.inf, 1)):
        with pytest.raises(DataError, match="ct_window"):
            open_dataset(dataclasses.replace(settings, ct_window=(low, high)))


def test_without_simpleitk_its_files_are_refused_in_one_sentence(tmp_path, monkeypatch):
    settings = nnunet_folder(tmp_path, n=4, file_ending=".mha")
    for path in [*tmp_path.glob("*Tr/*.nii.gz")]:
        path.rename(path.with_name(path.name.replace(".nii.gz", ".mha")))
    real = builtins.__import__

    def without(name, *rest):
        if name == "SimpleITK":
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    (line,) = errors(checked(settings)[1])
    assert line == (
        "error: .mha files need SimpleITK, which cannot be imported here (No module named "
        "'SimpleITK'); install it by `pip install SimpleITK`, or convert the files to .nii.gz"
    )
