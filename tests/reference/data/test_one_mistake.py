"""One mistake in a folder of volumes is one error, which names the cause and no consequence."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from harness.checks import checked, errors
from harness.nifti_folders import AFFINE, SHAPE, mask, nnunet_folder, save, voxels, write_layout

from reference_models.data import DataSettings, open_dataset
from reference_models.errors import DataError


def _rename(pattern, change):
    def apply(root):
        for path in [*root.glob(pattern)]:
            path.rename(path.with_name(change(path.name)))

    return apply


def _packed(pack, ending):
    def apply(root):
        for path in [*root.glob("*Tr/*.nii.gz")]:
            content = path.read_bytes()
            path.unlink()
            stem = path.name.removesuffix(".nii.gz")
            path.with_name(stem + ending).write_bytes(pack(content))
        write_layout(root, file_ending=ending)

    return apply


def _channels(number):
    return lambda root: write_layout(
        root, channel_names={str(i): name for i, name in enumerate(["CT", "PET", "T1"][:number])}
    )


def _four_dimensions(root):
    _rename("imagesTr/*", lambda name: name.replace("_0000", ""))(root)
    _channels(3)(root)
    for path in root.glob("imagesTr/*"):
        save(path, np.zeros((*SHAPE, 3), np.int16))


MISTAKES = {
    "labels of another name": (
        _rename("labelsTr/*", lambda name: name.replace(".nii", "_seg.nii")),
        "labelsTr/p0_seg.nii.gz: no case has this name; a mask must have the name of its case",
    ),
    "labels with a channel": (
        _rename("labelsTr/*", lambda name: name.replace(".nii", "_0000.nii")),
        "labelsTr/p0_0000.nii.gz: no case has this name",
    ),
    "one label missing": (
        lambda root: (root / "labelsTr/p2.nii.gz").unlink(),
        "labelsTr/p2.nii.gz: there is no such mask; move images without a mask",
    ),
    "all labels missing": (
        lambda root: [path.unlink() for path in (root / "labelsTr").iterdir()],
        "labelsTr/p0.nii.gz: there is no such mask; move images without a mask",
    ),
    "one channel too many in dataset.json": (
        _channels(2), "imagesTr/p0_0001.nii.gz: there is no such file (channel PET)"
    ),
    "4D images": (_four_dimensions, "imagesTr/p0.nii.gz: expected a file for each of the 3"),
    "gzip called .nii": (
        _packed(lambda content: content, ".nii"),
        "imagesTr/p0_0000.nii: this file is packed by gzip",
    ),
    "not gzip and called so": (
        _packed(gzip.decompress, ".nii.gz"),
        "imagesTr/p0_0000.nii.gz: this file is not packed by gzip",
    ),
    "another file_ending": (
        lambda root: write_layout(root, file_ending=".nii"), "ends in .nii.gz, but the file_ending"
    ),
    "images elsewhere": (
        lambda root: (root / "imagesTr").rename(root / "images"), "no .nii.gz file in its folder"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_mistake_in_a_folder_is_one_error(tmp_path, mistake):
    settings = nnunet_folder(tmp_path, n=6)
    change, words = MISTAKES[mistake]
    change(tmp_path)
    code, text = checked(settings)
    assert code == 1
    (line,) = errors(text)
    assert words in line.replace("\\", "/")
    if mistake not in ("one label missing", "images elsewhere"):
        assert "(the same holds for 5 more: " in line or "(the same holds for 11 more: " in line


def test_labels_are_not_taken_for_those_of_a_case_with_a_longer_number(tmp_path):
    settings = nnunet_folder(tmp_path, n=11)
    (tmp_path / "labelsTr/p1.nii.gz").unlink()
    (tmp_path / "imagesTr/p10_0000.nii.gz").unlink()
    lines = errors(checked(settings)[1])
    assert len(lines) == 2  # a label and an image; p10's row is a consequence
    assert any(
        "labelsTr/p10.nii.gz: this mask has no image" in line.replace("\\", "/") for line in lines
    )


def test_an_image_that_is_missing_is_one_error_whatever_else_names_its_case(tmp_path):
    settings = nnunet_folder(tmp_path, n=10)
    (tmp_path / "imagesTr/p3_0000.nii.gz").unlink()
    names = [f"p{i}" for i in range(10)]
    (tmp_path / "splits_final.json").write_text(
        json.dumps([{"train": names[2:], "val": names[:2]}]), encoding="utf-8"
    )
    (line,) = errors(checked(settings)[1])
    assert "labelsTr/p3.nii.gz: this mask has no image" in line.replace("\\", "/")


def test_cases_to_be_predicted_need_no_row(tmp_path):
    settings = nnunet_folder(tmp_path, n=10)
    (tmp_path / "imagesTs").mkdir()
    for name in ("new", "next"):
        save(tmp_path / f"imagesTs/{name}_0000.nii.gz", voxels())
    code, text = checked(settings)
    assert code == 0
    assert (
        "2 cases without a mask have no row, so that their attributes are unknown: new, next"
        in text
    )
    cases = {case.case_id: case for case in open_dataset(settings).cases}
    assert cases["new"].attributes == (-1,)
    assert not cases["new"].labelled
    (tmp_path / "labelsTs").mkdir()
    save(tmp_path / "labelsTs/new.nii.gz", mask())  # which is scored, so that its group counts
    with pytest.raises(DataError, match="no row for case new"):
        open_dataset(settings)


def test_the_folder_above_names_those_in_it(tmp_path):
    nnunet_folder(tmp_path / "Dataset007_Pancreas", n=2)
    with pytest.raises(DataError, match=r"but these folders have one.*Dataset007_Pancreas"):
        open_dataset(DataSettings("folder", tmp_path))


def test_check_says_how_each_channel_is_scaled(tmp_path):
    settings = nnunet_folder(tmp_path, n=4, channel_names={"0": "rgb_to_0_1", "1": "T1"})
    for i in range(4):
        colours = np.random.default_rng(i).integers(0, 256, SHAPE)
        colours[0, 0, 0] = 255
        save(tmp_path / f"imagesTr/p{i}_0000.nii.gz", colours.astype(np.int16))
        save(tmp_path / f"imagesTr/p{i}_0001.nii.gz", voxels(i))
    code, text = checked(settings)
    assert code == 0
    assert "channel 0000 (rgb_to_0_1): divided by 255\n" in text
    assert "channel 0001 (T1): brought to mean 0 and variance 1" in text
    dataset = open_dataset(settings)
    image_CS = dataset.load(dataset.cases[0]).image_CS
    expected = np.asarray(nib.load(tmp_path / "imagesTr/p0_0000.nii.gz").dataobj) / 255
    np.testing.assert_allclose(image_CS[0], expected, atol=1e-6)
    path = save(tmp_path / "imagesTr/p2_0000.nii.gz", voxels())
    (line,) = errors(checked(settings)[1])
    assert f"{path}: expected intensities of 0 to 255 in channel rgb_to_0_1, got -" in line


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("size", [0, np.nan])
def test_a_spacing_that_is_not_known_is_an_error_unless_an_sform_has_it(tmp_path, kind, size):
    settings = nnunet_folder(tmp_path, n=4)
    path = tmp_path / "imagesTr/p1_0000.nii.gz"
    for form, refused in (("qform", True), ("neither", True), ("sform", False)):
        image = kind(voxels(1), AFFINE)
        image.set_qform(AFFINE, code="scanner" if form == "qform" else "unknown")
        image.set_sform(AFFINE, code="scanner" if form == "sform" else "unknown")
        content = bytearray(image.to_bytes())
        # In the bytes, as some tools write it: nibabel puts a size right when it saves.
        stored = np.array(size, image.header["pixdim"].dtype)
        offset = {nib.Nifti1Image: 76, nib.Nifti2Image: 104}[kind] + 3 * stored.itemsize
        content[offset : offset + stored.itemsize] = stored.tobytes()
        path.write_bytes(gzip.compress(bytes(content)))
        affine = nib.load(path).affine
        save(
            tmp_path / "labelsTr/p1.nii.gz",
            mask(1),
            affine if np.isfinite(affine).all() else AFFINE,
        )
        found = errors(checked(settings)[1])
        if refused:
            (line,) = found
            assert str(path) in line
            assert "size of its voxels is not known" in line or "singular or not finite" in line
        else:
            assert found == []


@pytest.mark.parametrize(
    ("scale", "words"),
    [(1, None), (0.1, "in cm or m"), (0.001, "in cm or m"), (1000, "in micrometres")],
)
def test_a_cohort_that_is_not_in_mm_is_warned_of(tmp_path, scale, words):
    settings = nnunet_folder(tmp_path, n=4)
    affine = np.diag([scale, scale, 2 * scale, 1])
    for i in range(4):
        save(tmp_path / f"imagesTr/p{i}_0000.nii.gz", np.zeros((40, 40, 20), np.int16), affine)
        save(tmp_path / f"labelsTr/p{i}.nii.gz", np.zeros((40, 40, 20), np.uint8), affine)
    code, text = checked(settings)
    assert code == 0
    assert ("as if its affine were" in text) == (words is not None)
    assert words is None or words in text


def test_a_whole_body_in_cm_is_warned_of_though_it_is_long(tmp_path):
    settings = nnunet_folder(tmp_path, n=4)
    for size, warned in ((0.1, True), (0.2, False)):
        affine = np.diag([size, size, size, 1])
        for i in range(4):
            save(tmp_path / f"imagesTr/p{i}_0000.nii.gz", np.zeros((4, 4, 990), np.int16), affine)
            save(tmp_path / f"labelsTr/p{i}.nii.gz", np.zeros((4, 4, 990), np.uint8), affine)
        assert ("as if its affine were in cm or m" in checked(settings)[1]) == warned


def test_json_that_nests_without_end_is_named(tmp_path):
    settings = nnunet_folder(tmp_path, n=3)
    path = tmp_path / "dataset.json"
    path.write_text("[" * 100_000, encoding="utf-8")
    (line,) = errors(checked(settings)[1])
    assert line.startswith(f"error: {path}: not readable json (RecursionError")
    path.write_text(json.dumps({"labels": {"a": [{}]}}), encoding="utf-8")
    assert len(errors(checked(settings)[1])) == 1
