"""nnU-Net's ignore label, from dataset.json to frames, patches and pictures."""

import nibabel
import numpy as np
import pytest
import torch
from harness.checks import checked, errors
from harness.image_folders import nnunet_images
from harness.nifti_folders import mask, nnunet_folder, read, save, write_layout
from PIL import Image

from reference_models.data import open_dataset
from reference_models.data.cache import FrameCache
from reference_models.data.cases import IGNORED, Sample
from reference_models.data.framing import ImageFraming, resampled_labels
from reference_models.data.grid import VolumeFraming
from reference_models.data.nnunet import read_layout
from reference_models.data.patches import Patches, find_voxels
from reference_models.errors import DataError
from reference_models.report.pictures import Picture, overlay
from reference_models.training.runs import Task

LABELS = {"background": 0, "tumour": 1, "ignore": 2}  # of masks that hold 0, 1 and 2


def test_it_is_no_class_and_no_region_and_what_has_it_is_ignored(tmp_path):
    settings = nnunet_folder(tmp_path, labels=LABELS)
    dataset = open_dataset(settings)
    assert dataset.classes == ("background", "tumour")
    assert dict(dataset.regions) == {"tumour": (1,)}
    np.testing.assert_array_equal(
        read(settings, 3).mask_S, np.where(mask(3) == 2, IGNORED, mask(3))
    )
    code, text = checked(settings)
    assert code == 0
    assert "label 2 (ignore): its pixels count in no loss and no score" in text
    # A network that was trained so predicts on data that are outlined in full.
    plain = nnunet_folder(tmp_path / "plain", labels={"background": 0, "tumour": 1})
    assert not Task.of(dataset).differences(Task.of(open_dataset(plain)))


def test_regions_stay_as_they_are_beside_it(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    nnunet_folder(tmp_path, n=3, labels=labels)
    layout = read_layout(tmp_path)
    assert layout.regions == {"whole": (1, 2), "core": (2,)}
    assert (layout.classes, layout.ignore) == (("background", "label 1", "core"), 3)
    write_layout(tmp_path, labels={"0": "background", "1": "tumour", "2": "ignore"})
    assert read_layout(tmp_path).ignore == 2


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"background": 0, "ignore": 1, "a": 2}, r"without a gap.*got \[0, 2\]"),
        (
            {"background": 0, "a": 1, "ignore": 3},
            "is 3, expected the next number after the other labels, 2;",
        ),
        (
            {"background": 0, "a": 1, "ignore": 0},
            "is 0, expected the next number after the other labels, 2;",
        ),
        ({"background": 0, "a": 1, "ignore": [2]}, r"is \[2\], expected the next number"),
        (
            {"background": 0, "a": [1, 2], "ignore": 2},
            "is 2, expected the next number after the other labels, 3;",
        ),
        ({"background": 0, "a": 1, "Ignore": 2}, "'Ignore', which nnU-Net treats as a class"),
    ],
)
def test_it_has_to_be_the_highest_label_and_one(tmp_path, labels, words):
    nnunet_folder(tmp_path, n=3, labels=labels)
    with pytest.raises(DataError, match=words):
        read_layout(tmp_path)


def test_a_mask_of_nothing_else_or_of_more_labels_is_an_error_of_its_own(tmp_path):
    settings = nnunet_folder(tmp_path, labels=LABELS)
    save(tmp_path / "labelsTr/p3.nii.gz", np.full_like(mask(), 2))
    save(tmp_path / "labelsTr/p4.nii.gz", mask(4) + 1)
    found = errors(checked(settings)[1])
    assert len(found) == 2
    assert "p3.nii.gz: all of this mask has the label ignore" in found[0]
    assert "expected the labels 0 to 2 (background, tumour, ignore), as dataset.json" in found[1]


def test_images_have_it_too(tmp_path):
    labels = {"background": 0, "nodule": 1, "ignore": 2}
    settings = nnunet_images(tmp_path, n=3, labels=labels)
    found = read(settings, 0).mask_S
    with Image.open(tmp_path / "labelsTr/u0.png") as image:
        stored = np.asarray(image)
    np.testing.assert_array_equal(found, np.where(stored == 2, IGNORED, stored))


def test_frames_are_made_anew_when_it_is_named(tmp_path):
    settings = nnunet_folder(tmp_path, n=3)
    framing = VolumeFraming((1.0, 2.0, 3.0))
    kept = []
    for labels in ({"background": 0, "tumour": 1, "node": 2}, LABELS):
        write_layout(tmp_path, labels=labels)
        dataset = open_dataset(settings)
        cache = FrameCache(tmp_path / "cache", dataset, framing)
        kept.append(cache._path(dataset.cases[0]))
    assert kept[0] != kept[1]


def test_a_resampled_mask_has_it_where_most_or_half_of_the_mask_has_it():
    mask_S = np.array([[0, 0, 1, IGNORED, IGNORED, IGNORED, 1, 1]], np.uint8)
    np.testing.assert_array_equal(resampled_labels(mask_S, (1, 4)), [[0, IGNORED, IGNORED, 1]])
    mask_S = np.full((4, 4), IGNORED, np.uint8)
    sample = Sample("a", np.zeros((1, 4, 4), np.float32), mask_S, (0,), (1.0, 1.0))
    assert (ImageFraming(8).apply(sample).mask_S == IGNORED).all()


def test_patches_lie_around_what_is_not_ignored():
    mask_S = np.full((30, 8, 8), IGNORED, np.uint8)
    mask_S[20:22, 2:4, 2:4] = 0
    mask_S[21, 2, 2] = 2
    found = find_voxels(mask_S)
    assert found.keys() == {"2", "outlined"}
    assert found["2"].tolist() == [[21, 2, 2]]
    assert len(found["outlined"]) == 8
    voxels = {name: torch.from_numpy(places) for name, places in found.items()}
    random = np.random.default_rng(0)
    for foreground, wanted_S in ((0.0, mask_S != IGNORED), (1.0, mask_S == 2)):
        patches = Patches((4, 4, 4), foreground=foreground)
        for _ in range(40):
            assert wanted_S[patches.draw(mask_S.shape, voxels, random)].any()
    # So does padding, which is nobody's outline.
    header = nibabel.Nifti1Image(mask_S, np.eye(4)).header
    image_CS = np.zeros((1, *mask_S.shape), np.float32)
    sample = Sample("a", image_CS, mask_S, (0,), (1.0, 1.0, 1.0), header)
    padded = VolumeFraming((1.0, 1.0, 1.0), least=(30, 12, 8)).apply(sample).mask_S
    assert find_voxels(padded)["outlined"].tolist() == (found["outlined"] + [0, 2, 0]).tolist()
    # Without anything ignored, they lie anywhere.
    assert "outlined" not in find_voxels(np.zeros((4, 4, 4), np.uint8))


def test_pictures_show_none_of_it(tmp_path):
    truth_S = np.zeros((12, 12), np.uint8)
    truth_S[2:8, 2:8] = 1
    seen = truth_S.copy()
    truth_S[:, 9:] = IGNORED
    image_CS = np.linspace(0, 1, 144, dtype=np.float32).reshape(1, 12, 12)
    drawn = [
        overlay(Picture.of("a", image_CS, mask, seen), ("rest", "lesion"))
        for mask in (truth_S, seen)
    ]
    np.testing.assert_array_equal(*drawn)
    # The planes of a volume go through what is outlined, and not where most is ignored.
    volume_S = np.zeros((9, 9, 9), np.uint8)
    volume_S[4, 4, 4] = 1
    image_CS = volume_S[None].astype(np.float32)
    plain = Picture.of("a", image_CS, volume_S, volume_S, np.eye(4))
    ignoring = np.where(np.arange(9)[:, None, None] < 2, np.uint8(IGNORED), volume_S)
    found = Picture.of("a", image_CS, ignoring, volume_S, np.eye(4))
    np.testing.assert_array_equal(found.truth_HW, plain.truth_HW)
