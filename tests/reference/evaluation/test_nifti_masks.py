"""Masks of volumes as NIfTI files: they lie where their image does; all others are refused."""

import nibabel
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension
from PIL import Image

from reference_models.data.cases import Sample
from reference_models.errors import DataError
from reference_models.evaluation.masks import assign_masks, find_masks, read_mask, write_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def sample_of(image, case_id="case", mask=None):
    """As `Nifti` reads it."""
    header = type(image).from_bytes(image.to_bytes()).header
    spacing = tuple(nibabel.affines.voxel_sizes(image.affine).tolist())
    return Sample(case_id, np.zeros((1, *image.shape), np.float32), mask, (0,), spacing, header)


OBLIQUE = np.array([[0, 0, 3.0, 5], [-1.9, 0.6, 0, 7], [0.6, 1.9, 0, -9], [0, 0, 0, 1]])


def image_like(dtype=np.int16, kind=nibabel.Nifti1Image, endianness="<", affine=OBLIQUE):
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(dtype)
    image = kind(np.zeros((7, 5, 6), dtype), affine, header)
    image.set_sform(affine, code="scanner")
    turned = affine.copy()
    turned[:3, 3] += 1  # as after a registration, only one of the two is new
    image.set_qform(turned, code="aligned")
    image.header.set_xyzt_units("mm", "sec")
    return image


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": np.uint8},
        {"dtype": np.float32},
        {"dtype": np.float64},
        {"dtype": np.int8},
        {"dtype": np.int16, "endianness": ">"},
        {"dtype": np.float32, "endianness": ">"},
        {"dtype": np.uint16, "kind": nibabel.Nifti2Image},
    ],
    ids=str,
)
def test_a_nifti_mask_has_its_images_place_and_bytes_and_comes_back_exactly(tmp_path, options):
    image = image_like(**options)
    image.header.set_slope_inter(2.5, -1024)  # of intensities, and no business of labels
    image.header["cal_max"] = 300
    image.header.extensions.append(Nifti1Extension("comment", b"Erika Mustermann"))
    sample = sample_of(image)
    sample.header.set_slope_inter(2.5, -1024)
    before = sample.header.copy()
    mask = np.random.default_rng(0).integers(0, 4, (7, 5, 6)).astype(np.uint8)
    path = write_mask(tmp_path, sample, mask)
    assert path == tmp_path / "case.nii.gz"
    assert sample.header == before
    written = nibabel.load(path)
    assert type(written) is options.get("kind", nibabel.Nifti1Image)
    assert written.shape == mask.shape
    for form in ("sform", "qform"):
        affines = [getattr(found, f"get_{form}")(coded=True) for found in (image, written)]
        np.testing.assert_array_equal(affines[0][0], affines[1][0])
        assert affines[0][1] == affines[1][1] != 0
    assert written.header.get_data_dtype() == np.uint8
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert written.header.endianness == options.get("endianness", "<")
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    assert written.header["cal_max"] == 0
    assert not written.header.extensions
    np.testing.assert_array_equal(written.dataobj.get_unscaled(), mask)
    np.testing.assert_array_equal(read_mask(path, sample, ("0", "1", "2", "3")), mask)
    assert write_mask(tmp_path, sample, mask).read_bytes() == path.read_bytes()


def test_labels_that_the_images_type_cannot_hold_are_not_folded_into_others(tmp_path):
    sample = sample_of(image_like(np.int8))
    mask = np.full((7, 5, 6), 200, np.uint8)
    path = write_mask(tmp_path, sample, mask)
    assert nibabel.load(path).get_data_dtype() == np.uint8
    assert (read_mask(path, sample, ("class",) * 201) == 200).all()


def test_dots_belong_to_case_ids_and_a_case_has_one_mask(tmp_path):
    ids = ("1.2.840.1", "1.2.840", "c.nii", "D")
    for name in (
        "1.2.840.1.nii.gz", "1.2.840.nii", "c.nii.nii.gz", "D.NII.GZ", "dataset.json", "c.png",
        "._D.nii.gz",
    ):  # fmt: skip
        (tmp_path / name).touch()
    paths, faults = assign_masks(find_masks(tmp_path, axes=3), ids, axes=3)
    assert faults == []
    assert [paths[i].name for i in ids] == [
        "1.2.840.1.nii.gz", "1.2.840.nii", "c.nii.nii.gz", "D.NII.GZ",
    ]  # fmt: skip
    (tmp_path / "1.2.840.nii.gz").touch()
    (tmp_path / "stranger.nii").touch()
    (tmp_path / "D.NII.GZ").unlink()
    assert assign_masks(find_masks(tmp_path, axes=3), ids, axes=3)[1] == [
        "1.2.840.nii and 1.2.840.nii.gz: two masks of one case; keep one.",
        "1 of 4 cases have no mask (<case id>.nii.gz, .nii, .mha or .nrrd): D.",
        "1 masks are of no case of this split: stranger.nii.",
    ]


def test_another_tools_mask_may_have_another_type_and_rounded_affines(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (7, 5, 6)).astype(np.uint8)
    sample, rounded = sample_of(image_like()), OBLIQUE.copy()
    rounded[:3, 3] += 0.02
    for number, (dtype, slope) in enumerate([(np.float32, 1), (np.int32, 1), (np.uint8, 0.1)]):
        image = nibabel.Nifti1Image(mask.astype(dtype), rounded)
        if slope != 1:  # labels of tenths: not exact in the header's float32
            image = nibabel.Nifti1Image(mask * np.uint8(10), rounded)
            image.header.set_slope_inter(slope, 0)
        path = tmp_path / f"{number}.nii"
        nibabel.save(image, path)
        np.testing.assert_array_equal(read_mask(path, sample, ("a", "b", "c")), mask)


def test_a_mask_that_is_none_of_this_image_is_refused_by_name(tmp_path):
    mask = (np.arange(210).reshape(7, 5, 6) % 3).astype(np.uint8)
    sample, classes = sample_of(image_like()), ("air", "organ", "tumour")

    def save(name, array, affine=OBLIQUE, kind=nibabel.Nifti1Image):
        nibabel.save(kind(array, affine), tmp_path / name)

    elsewhere, turned = OBLIQUE.copy(), OBLIQUE @ np.diag([-1.0, 1, 1, 1])
    elsewhere[0, 3] += 1
    save("elsewhere.nii", mask, elsewhere)
    save("turned.nii.gz", mask, turned)
    save("size.nii.gz", mask[1:])
    save("time.nii.gz", mask[..., None])
    save("grey.nii.gz", mask * np.uint8(80))
    save("negative.nii.gz", mask.astype(np.int16) - 1)
    save("scores.nii.gz", mask.astype(np.float32) * 0.3)
    save("nan.nii.gz", np.where(mask == 0, np.nan, 1).astype(np.float32))
    save("cut.nii", mask)
    (tmp_path / "cut.nii").write_bytes((tmp_path / "cut.nii").read_bytes()[:-20])
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    Image.fromarray(mask[0]).save(tmp_path / "picture.png")
    (tmp_path / "picture.png").rename(tmp_path / "picture.nii.gz")
    for name, words in {
        "elsewhere.nii": "lies elsewhere than its image: its corners are up to 0.3 voxels",
        "turned.nii.gz": "lies elsewhere",
        "size.nii.gz": r"got size \(6, 5, 6\), expected the image's size, \(7, 5, 6\)",
        "time.nii.gz": "has 4 dimensions",
        "grey.nii.gz": (
            "got label 80, 160, expected labels and not grey levels. The labels are "
            r"0 air, 1 organ\."
        ),
        "negative.nii.gz": "got label -1",
        "scores.nii.gz": "got fractions, expected labels: the argmax",
        "nan.nii.gz": "NaN",
        "cut.nii": "could the file be damaged",
        "empty.nii.gz": "not a readable NIfTI file",
        "picture.nii.gz": "not a readable NIfTI file",
    }.items():
        with pytest.raises(DataError, match=words) as caught:
            read_mask(tmp_path / name, sample, classes)
        assert name in str(caught.value)


def test_a_damaged_byte_of_a_packed_mask_does_not_change_labels_unnoticed(tmp_path):
    sample = sample_of(image_like())
    mask = np.random.default_rng(0).integers(0, 2, (7, 5, 6)).astype(np.uint8)
    whole = write_mask(tmp_path, sample, mask).read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "damaged.nii.gz").write_bytes(damaged)
        try:
            read = read_mask(tmp_path / "damaged.nii.gz", sample, ("background", "organ"))
        except DataError:
            continue
        assert (read == mask).all(), place
