"""A .mha or .nrrd file is the volume that the same image is as NIfTI, or it is refused by name."""

import re

import nibabel as nib
import numpy as np
import pytest
from harness.checks import checked, errors
from harness.nifti_folders import GRIDS, mask, nnunet_folder, voxels, write_layout

from reference_models.data import open_dataset
from reference_models.data.cases import Sample
from reference_models.data.readers import open_volume
from reference_models.errors import DataError
from reference_models.evaluation.masks import read_mask

sitk = pytest.importorskip("SimpleITK")
LPS = np.diag([-1.0, -1.0, 1.0])  # ITK's axes point left and back where NIfTI's point right, front


def itk_image(array_S, affine):
    """The array on the grid that a NIfTI affine gives, as SimpleITK has it."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_S.T))
    spacing = nib.affines.voxel_sizes(affine)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((LPS @ affine[:3, 3]).tolist())
    image.SetDirection((LPS @ affine[:3, :3] / spacing).ravel().tolist())
    return image


def converted(root, ending, packed=True):
    """The folder's NIfTI files as files of another ending."""
    for path in [*root.glob("*Tr/*.nii.gz")]:
        image = nib.load(path)
        there = path.with_name(path.name.replace(".nii.gz", ending))
        sitk.WriteImage(itk_image(np.asarray(image.dataobj), image.affine), str(there), packed)
        path.unlink()
    write_layout(root, file_ending=ending)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_folder_is_read_as_the_same_folder_of_nifti_files(tmp_path, ending, grid):
    settings = nnunet_folder(tmp_path, n=4)
    for path in tmp_path.glob("*Tr/*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), GRIDS[grid]), path)
    before = open_dataset(settings)
    expected = [before.load(case) for case in before.cases]
    converted(tmp_path, ending)
    after = open_dataset(settings)
    np.testing.assert_allclose(after.spacing, before.spacing, rtol=1e-6)
    assert (after.axes, after.unit, after.size) == (3, "mm", before.size)
    for case, nifti in zip(after.cases, expected, strict=True):
        sample = after.load(case)
        np.testing.assert_array_equal(sample.image_CS, nifti.image_CS)
        np.testing.assert_array_equal(sample.mask_S, nifti.mask_S)
        np.testing.assert_allclose(sample.affine, nifti.affine, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(sample.spacing, nifti.spacing, rtol=1e-6)
        assert sample.image_CS.flags.writeable
    code, text = checked(settings)
    assert code == 0
    assert "which side is left" not in text


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_simpleitks_own_nifti_file_has_the_same_place_and_voxels(tmp_path, ending):
    image = itk_image(voxels(), GRIDS["oblique"])
    read = []
    for name in (f"a{ending}", "a.nii.gz"):
        sitk.WriteImage(image, str(tmp_path / name))
        read.append(open_volume(str(tmp_path / name)))
    np.testing.assert_allclose(read[0].affine, read[1].affine, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(read[0].read(), read[1].read())


def _text(old, new):
    def damage(path):
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))

    return damage


def _written(image):
    return lambda path: sitk.WriteImage(image, str(path))


def _shortened(path):
    path.write_bytes(path.read_bytes()[:-9])


_NO_SIZE = "size of its voxels is not known"
_SPACE = b"space directions: (1,0,0) (0,1,0) (0,0,1)"
BAD = {
    "2D": (".mha", _written(sitk.Image(4, 5, sitk.sitkInt16)), r"has 2 dimensions \(4, 5\)"),
    "4D": (".nrrd", _written(sitk.Image([6, 5, 4, 2], sitk.sitkInt16)), "has 4 dimensions"),
    "colours": (
        ".mha", _written(sitk.Image([6, 5, 4], sitk.sitkVectorUInt8, 3)), "vector of 8-bit"
    ),
    "complex": (".nrrd", _written(sitk.Image([6, 5, 4], sitk.sitkComplexFloat32)), "are complex"),
    "no spacing, mha": (".mha", _text(b"ElementSpacing = 1 1 1\n", b""), _NO_SIZE),
    "no spacing, nrrd": (".nrrd", _text(_SPACE + b"\n", b""), f"{_NO_SIZE}, since"),
    "spacing of 0": (".mha", _text(b"ElementSpacing = 1", b"ElementSpacing = 0"), "is singular"),
    "spacing of 0, nrrd": (".nrrd", _text(b"(1,0,0)", b"(0,0,0)"), "singular or not finite"),
    "tilted": (".nrrd", _text(b"(0,1,0)", b"(0,1,1)"), "45.0° off right angles"),
    "in metres": (
        ".nrrd", _text(b"space origin", b'space units: "m" "m" "m"\nspace origin'), "are in m, exp"
    ),
    "voxels elsewhere": (".mha", _text(b"LOCAL", b"a.raw"), "its voxels are in another file"),
    "claims terabytes": (".mha", _text(b"6 5 4", b"30000 30000 30000"), "cut off: its header"),
    "cut off": (".mha", _shortened, "cut off: its header claims"),
    "cut off, nrrd": (".nrrd", _shortened, "cut off: its header claims"),
    "empty": (".nrrd", lambda path: path.write_bytes(b""), "not a readable .nrrd file"),
    "text": (".mha", lambda path: path.write_bytes(b"sorry"), "not a readable .mha file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_file_that_is_no_volume_is_refused_by_name(tmp_path, fault):
    ending, damage, words = BAD[fault]
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(np.ascontiguousarray(voxels().T)), str(path))
    open_volume(str(path)).read()
    damage(path)
    with pytest.raises(DataError, match=re.escape(f"{path}: ") + ".*" + words):
        open_volume(str(path)).read()


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_no_damaged_byte_of_packed_voxels_goes_unnoticed(tmp_path, ending):
    whole_S = np.random.default_rng(0).integers(0, 256, (24, 24, 20)).astype(np.uint8)
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(whole_S), str(path), True)
    np.testing.assert_array_equal(open_volume(str(path)).read(), whole_S.T)
    content = path.read_bytes()
    for place in range(600, len(content) - 8, len(content) // 30):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(f"{path}: not a readable {ending} file")):
            open_volume(str(path)).read()


def test_a_header_that_does_not_say_which_side_is_left_is_told(tmp_path):
    for ending, old, new in (
        (".mha", b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b""),
        (".nrrd", b"left-posterior-superior", b"scanner-xyz"),
    ):
        path = tmp_path / f"a{ending}"
        sitk.WriteImage(sitk.GetImageFromArray(voxels()), str(path))
        assert open_volume(str(path)).oddities() == []
        _text(old, new)(path)
        assert "which side is left" in open_volume(str(path)).oddities()[0]


def test_masks_of_another_tool_are_read_on_their_images_grid(tmp_path):
    header = nib.Nifti1Image(mask(), GRIDS["oblique"]).header
    sample = Sample("a", np.zeros((1, *mask().shape), np.float32), None, (), (1.0,) * 3, header)
    path = tmp_path / "a.mha"
    classes = ("background", "tumour", "node")
    sitk.WriteImage(itk_image(mask(), GRIDS["oblique"]), str(path), True)
    np.testing.assert_array_equal(read_mask(path, sample, classes), mask())
    sitk.WriteImage(itk_image(mask(), GRIDS["sagittal"]), str(path), True)
    with pytest.raises(DataError, match=r"a\.mha: lies elsewhere than its image"):
        read_mask(path, sample, classes)


def test_a_cut_volume_of_a_folder_is_one_error(tmp_path):
    settings = nnunet_folder(tmp_path, n=4)
    converted(tmp_path, ".nrrd", packed=False)
    path = tmp_path / "imagesTr/p2_0000.nrrd"
    path.write_bytes(path.read_bytes()[:-30])
    (line,) = errors(checked(settings)[1])
    assert line.startswith(
        f"error: {path}: this file is cut off: its header claims 240 bytes of voxels, but"
    )
