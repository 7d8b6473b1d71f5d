"""The example's folder is sound, and no split shows what another does."""

import json

import nibabel as nib
import numpy as np
import pytest
from harness.checks import checked
from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import Attribute
from reference_models.data.example import ACQUISITIONS, write_example
from reference_models.errors import DataError


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("made") / "example")


def test_the_example_is_a_sound_folder_that_trains_unbalanced(example):
    settings = DataSettings("folder", example)
    code, text = checked(settings)
    assert code == 0
    assert "warning" not in text
    dataset = open_dataset(settings)
    (attribute,) = dataset.attributes
    assert attribute == Attribute("acquisition", ("1 mm", "low field", "thick slices"))
    counts = {
        split: np.bincount([c.attributes[0] for c in dataset.cases if c.split == split]).tolist()
        for split in ("train", "validation", "test")
    }
    assert counts == {"train": [7, 1, 2], "validation": [1, 1, 1], "test": [2, 2, 2]}
    assert json.loads((example / "dataset.json").read_text(encoding="utf-8"))["numTraining"] == len(
        dataset.cases
    )
    assert "say nothing about scanners" in (example / "README.txt").read_text(encoding="utf-8")


def test_no_scan_of_the_example_shows_what_another_split_does(example):
    reach = {}
    for case in open_dataset(DataSettings("folder", example)).cases:
        image = nib.load(case.files[0])
        far = np.array(image.shape) - 0.5  # the outer faces of the voxels
        corners = [
            [x, y, z] for x in (-0.5, far[0]) for y in (-0.5, far[1]) for z in (-0.5, far[2])
        ]
        front = nib.affines.apply_affine(image.affine, corners)[:, 1]
        reach.setdefault(case.split, []).extend([front.min(), front.max()])
    (_, train), (low, validation), (test, _) = (
        (min(reach[split]), max(reach[split])) for split in ("train", "validation", "test")
    )
    assert low - train >= 8
    assert test - validation >= 8


def test_the_examples_labels_lie_where_the_templates_tissues_do(example):
    grey, white = (
        load(resolution=1) for load in (load_mni152_gm_template, load_mni152_wm_template)
    )
    tissues = [image.get_fdata(dtype=np.float32) for image in (grey, white)]
    truth_S = np.stack([1 - tissues[0] - tissues[1], *tissues]).argmax(0)
    dataset = open_dataset(DataSettings("folder", example))
    found = {}
    for case in dataset.cases:
        if case.split != "validation":
            continue
        image, mask_S = nib.load(case.files[0]), dataset.load(case).mask_S
        places = nib.affines.apply_affine(
            np.linalg.inv(grey.affine) @ image.affine, np.argwhere(mask_S >= 0)
        )
        there = truth_S[tuple(np.rint(places).astype(int).clip(0, np.array(truth_S.shape) - 1).T)]
        name = dataset.attributes[0].label(case.attributes[0])
        inside = (there > 0) | (mask_S.ravel() > 0)
        found[name] = (there == mask_S.ravel())[inside].mean()
        header = image.header
        found[f"{name} stored"] = (
            "".join(nib.aff2axcodes(image.affine)), header.get_data_dtype().str, image.dataobj.slope
        )  # fmt: skip
        brightness = image.get_fdata()
        assert 550 < np.median(brightness[mask_S == 2]) < 1050  # a share of the template's 1000
        assert np.median(brightness[mask_S == 1]) < np.median(brightness[mask_S == 2])
    # Voxels of 1 mm are the template's; of a larger one, the label is of its mean.
    assert found["1 mm"] == 1
    assert found["low field"] > 0.8
    assert found["thick slices"] > 0.7
    assert found["1 mm stored"] == ("LAS", "<i2", 1)
    assert found["thick slices stored"] == ("LPS", "<u2", 0.25)
    assert found["low field stored"] == ("PSR", ">f4", 1)


def test_the_example_is_the_same_each_time_and_replaces_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("reference_models.data.example.ACQUISITIONS", ACQUISITIONS[2:])
    first, second = (write_example(tmp_path / name) for name in ("first", "second"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 3 + 2 * 4
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    scans = [(first / name).read_bytes() for name in files if "test" in str(name)]
    assert len({*scans}) == len(scans) - 1  # two scans of one block differ, their labels do not
    (first / "mine.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.txt"):
        write_example(first)
    assert (first / "mine.txt").read_text(encoding="utf-8") == "kept"
