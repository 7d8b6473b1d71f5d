"""A folder of 2D images in nnU-Net's layout is read as a folder of volumes is, or says why not."""

import re
import zlib

import numpy as np
import pytest
from harness.checks import checked, errors
from harness.image_folders import echoes, nnunet_images, nodule, write_image_layout
from PIL import Image, TiffImagePlugin

from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import UNKNOWN, Attribute
from reference_models.data.images import image_size, read_image, read_labels
from reference_models.data.splits import make_splits
from reference_models.errors import DataError

RGB = {"0": "R", "1": "G", "2": "B"}
UNSCALED = {"channel_names": {"0": "noNorm"}}


def load(settings, case_id="u0"):
    dataset = open_dataset(settings)
    (case,) = [case for case in dataset.cases if case.case_id == case_id]
    return dataset.load(case)


@pytest.mark.parametrize("ending", [".png", ".tif", ".tiff", ".bmp"])
def test_a_folder_of_images_is_read_by_its_ending(tmp_path, ending):
    settings = nnunet_images(tmp_path, ending=ending, mask_ending=ending, **UNSCALED)
    dataset = open_dataset(settings)
    assert (dataset.name, dataset.axes, dataset.unit, dataset.channels) == ("folder", 2, "px", 1)
    assert (dataset.spacing, dataset.size) == (None, None)
    assert dataset.attributes == (Attribute("site", ("A", "B")),)
    sample = load(settings, "u3")
    np.testing.assert_array_equal(sample.image_CS[0], echoes(3))
    np.testing.assert_array_equal(sample.mask_S, nodule(3))
    assert (sample.image_CS.dtype, sample.mask_S.dtype) == (np.float32, np.uint8)
    assert (sample.spacing, sample.header, sample.affine) == ((1.0, 1.0), None, None)
    code, text = checked(settings)
    assert code == 0
    assert "images: the median image has 20 rows and 30 columns" in text
    assert "channel 0000 (noNorm): not changed" in text


def test_jpegs_have_masks_of_a_kind_that_keeps_labels(tmp_path):
    settings = nnunet_images(tmp_path, n=6, ending=".jpg", mask_ending=".tif")
    (tmp_path / "labelsTr/u1.tif").unlink()
    Image.fromarray(nodule(1)).save(tmp_path / "labelsTr/u1.PNG")
    assert checked(settings)[0] == 0
    np.testing.assert_array_equal(load(settings, "u1").mask_S, nodule(1))
    for path in (tmp_path / "labelsTr").iterdir():
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        path.unlink()
    (line,) = errors(checked(settings)[1])
    assert (
        "u0.jpg: this mask is a JPEG, which changes labels; export it again as .png or .tif" in line
    )
    assert "(the same holds for 5 more: " in line


@pytest.mark.parametrize("how", ["named .png", "packed in a .tif"])
def test_a_mask_that_is_a_jpeg_inside_is_refused(tmp_path, how):
    settings = nnunet_images(tmp_path, n=4)
    path = tmp_path / "labelsTr/u2.png"
    if how == "named .png":
        Image.fromarray(nodule(2)).save(path, format="JPEG")
    else:
        path.unlink()
        path = path.with_suffix(".tif")
        Image.fromarray(nodule(2)).save(path, compression="jpeg")
    (line,) = errors(checked(settings)[1])
    assert line.startswith(
        f"error: {path}: cannot be read (it is compressed as JPEG, which changes"
    )


def test_colours_are_in_one_file_or_a_channel_a_file(tmp_path):
    one, three = (
        nnunet_images(tmp_path / name, n=4, channel_names=RGB) for name in ("one", "three")
    )
    for i in range(4):
        colours = [echoes(i + 10 * channel) for channel in range(3)]
        Image.fromarray(np.stack(colours, -1)).save(one.root / f"imagesTr/u{i}_0000.png")
        for channel, pixels in enumerate(colours):
            Image.fromarray(pixels).save(three.root / f"imagesTr/u{i}_000{channel}.png")
    path = one.root / "imagesTr/u1_0000.png"
    path.rename(path.with_name("u1.png"))  # a single file needs no number
    for case_id in ("u0", "u1"):
        apart = load(three, case_id)
        together = load(one, case_id)
        assert together.image_CS.shape == (3, 20, 30)
        np.testing.assert_array_equal(together.image_CS, apart.image_CS)
    (three.root / "imagesTr/u2_0001.png").unlink()
    (line,) = errors(checked(three)[1])
    assert "u2_0001.png: there is no such file (channel G)" in line
    (three.root / "imagesTr/u2_0002.png").unlink()  # what is left is no file of all colours
    (line,) = errors(checked(three)[1])
    assert "u2_0001.png: there is no such file (channel G)" in line


def test_channels_are_scaled_by_their_names(tmp_path):
    settings = nnunet_images(tmp_path, n=2, channel_names=dict.fromkeys(RGB, "rgb_to_0_1"))
    image_CS = load(settings).image_CS
    np.testing.assert_allclose(image_CS, np.stack([echoes()] * 3) / 255, atol=1e-6)
    write_image_layout(tmp_path, channel_names={"0": "ultrasound"})
    image_CS = load(settings).image_CS
    np.testing.assert_allclose([image_CS.mean(), image_CS.std()], [0, 1], atol=1e-5)


def _palette(pixels):
    image = Image.fromarray(pixels, mode="P")
    image.putpalette([(7 * i) % 256 for i in range(768)])
    return image


@pytest.mark.parametrize("kind", ["palette", "grey as RGB", "opaque RGBA", "black and white"])
def test_other_modes_of_pillow_are_read_as_what_they_show(tmp_path, kind):
    settings = nnunet_images(tmp_path, n=2, channel_names=dict.fromkeys(RGB, "noNorm"))
    grey = echoes(7)
    if kind == "palette":
        image, expected = _palette(grey), np.asarray(_palette(grey).convert("RGB"))
    elif kind == "black and white":
        image = Image.fromarray(grey > 99)
        expected = np.stack([(grey > 99) * 255] * 3, -1)
    else:
        expected = np.stack([grey] * 3, -1)
        image = Image.fromarray(expected).convert("RGBA" if "A" in kind else "RGB")
    image.save(tmp_path / "imagesTr/u1_0000.png")
    np.testing.assert_array_equal(load(settings, "u1").image_CS, expected.transpose(2, 0, 1))
    if kind == "grey as RGB":  # is grey, also where a single channel is expected
        write_image_layout(tmp_path, **UNSCALED)
        np.testing.assert_array_equal(load(settings, "u1").image_CS[0], grey)


def _save(image):
    return lambda path: image.save(path)


def _sixteen_bit_colours(path):
    png = bytearray()
    Image.fromarray(np.stack([echoes()] * 3, -1)).save(path)
    png += path.read_bytes()
    png[24] = 16  # IHDR's bits a channel
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    path.write_bytes(png)


BAD_IMAGES = {
    "16 bits": (
        _save(Image.fromarray(echoes().astype(np.uint16) * 9)),
        "mode I;16, expected 8 bits for each channel; bring its intensities to 0..255",
    ),
    "16 bits a colour": (_sixteen_bit_colours, "16 bits for each channel, expected 8"),
    "see-through": (
        _save(Image.fromarray(np.stack([echoes()] * 4, -1))), "parts of it are transparent"
    ),
    "colours": (
        _save(Image.fromarray(np.stack([echoes(0), echoes(1), echoes(2)], -1))),
        "has colours, but dataset.json names a channel for each file; name three",
    ),
    "another size": (
        _save(Image.fromarray(echoes(0, (20, 31)))), "has 20 rows and 30 columns, but .* has 20 and"
    ),
    "on its side": (_save(Image.fromarray(echoes().T)), "has 30 and 20; turn one of them"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be read as an"),
    "empty": (lambda path: path.write_bytes(b""), "cannot identify image"),
    "text": (lambda path: path.write_text("sorry", encoding="utf-8"), "cannot identify image"),
}  # fmt: skip
BAD_MASKS = {
    "white": (
        _save(Image.fromarray(nodule() // 2 * 255)),
        "expected the labels 0 to 2 .*got also 255; .*write 1",
    ),
    "a label too many": (_save(Image.fromarray(nodule() + 1)), "got also 3; correct the mask or"),
    "colours": (_save(Image.fromarray(np.stack([nodule()] * 3, -1))), "mode RGB, expected one lab"),
    "16 bits": (_save(Image.fromarray(nodule().astype(np.uint16))), "mode I;16, expected one lab"),
    "another size": (
        _save(Image.fromarray(nodule()[:, 1:])),
        "has 20 rows and 29 columns, but .*u1_0000.png has 20 and 30; save it at that size",
    ),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:80]), "cannot be read"),
    "missing": (lambda path: path.unlink(), "there is no such mask; move images without a mask"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "fault"),
    [("imagesTr", fault) for fault in BAD_IMAGES] + [("labelsTr", fault) for fault in BAD_MASKS],
)
def test_check_names_a_bad_image_or_mask_and_says_what_is_wrong(tmp_path, folder, fault):
    settings = nnunet_images(tmp_path, n=4)
    images = folder == "imagesTr"
    damage, words = (BAD_IMAGES if images else BAD_MASKS)[fault]
    damage(tmp_path / folder / f"u1{'_0000' * images}.png")
    code, text = checked(settings)
    assert code == 1
    (line,) = errors(text)
    assert "u1_0000.png" in line if images else "u1.png" in line
    assert re.search(words, line)
    if "size" in fault or fault == "missing":  # of which training hears before it starts
        with pytest.raises(DataError, match=words):
            open_dataset(settings)


def test_masks_of_black_and_white_are_one_error_that_names_the_first_and_the_count(tmp_path):
    settings = nnunet_images(tmp_path, n=8)
    for number in range(7):
        white = Image.fromarray((nodule(number) > 0).astype(np.uint8) * 255)
        white.save(tmp_path / f"labelsTr/u{number}.png")
    code, text = checked(settings)
    assert code == 1
    (line,) = errors(text)
    path = str(tmp_path / "labelsTr/u0.png")
    assert line.startswith(f"error: {path}: expected the labels 0 to 2 (")
    assert "as dataset.json says; got also 255; a mask must hold labels and not grey levels" in line
    names = ", ".join(str(tmp_path / f"labelsTr/u{number}.png") for number in (1, 2, 3))
    assert line.endswith(
        f"convert, which does that (the same holds for 6 more: {names} and 3 more)"
    )
    with pytest.raises(DataError, match=r"got also 255; .*write 1 for white"):
        load(settings, "u3")


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_and_masks_are_brought_upright(tmp_path, ending, orientation):
    upright = np.zeros((20, 30), np.uint8)
    upright[:10, :15] = 255
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}
    turn[8] = Image.Transpose.ROTATE_270
    lying = Image.fromarray(upright)
    if orientation in turn:
        lying = lying.transpose(turn[orientation])
    path, exif = tmp_path / f"a{ending}", Image.Exif()
    exif[274] = orientation
    lying.save(path, exif=exif, **({"quality": 95} if ending == ".jpg" else {}))
    assert image_size(path) == (20, 30)
    assert (abs(read_image(path)[..., 0].astype(int) - upright) < 30).all()
    if ending == ".png":
        np.testing.assert_array_equal(read_labels(path), upright)


@pytest.mark.parametrize("packed", [None, "tiff_deflate"])
def test_a_tiff_on_its_side_is_refused(tmp_path, packed):
    settings = nnunet_images(tmp_path, n=4, ending=".tif", mask_ending=".tif")
    path = tmp_path / "imagesTr/u1_0000.tif"
    for orientation, refused in ((1, False), (6, True)):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[274] = orientation
        Image.fromarray(echoes(1)).save(path, tiffinfo=tags, compression=packed)
        found = errors(checked(settings)[1])
        assert len(found) == refused
        assert all(f"{path}: " in line and "this TIFF has orientation 6" in line for line in found)


def test_a_file_of_several_images_is_refused(tmp_path):
    settings = nnunet_images(tmp_path, n=4, ending=".tif", mask_ending=".tif")
    path = tmp_path / "imagesTr/u1_0000.tif"
    pages = [Image.fromarray(echoes(i)) for i in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    (line,) = errors(checked(settings)[1])
    assert line.startswith(f"error: {path}: cannot be read as an image (3 images in one file, exp")


def test_images_of_another_ending_are_named_once_and_previews_are_left_out(tmp_path):
    settings = nnunet_images(tmp_path, n=6)
    (tmp_path / "imagesTr/notes.txt").write_text("", encoding="utf-8")
    assert "imagesTr: files that do not end in .png are left out: notes.txt" in checked(settings)[
        1
    ].replace("\\", "/")
    for i in (1, 2):
        path = tmp_path / f"imagesTr/u{i}_0000.png"
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        path.unlink()
    (line,) = errors(checked(settings)[1])
    assert "u1_0000.jpg: this file ends in .jpg, but the file_ending of" in line
    assert "(the same holds for 1 more: u2_0000.jpg)" in line
    (tmp_path / "labelsTr/u3.tif").write_bytes((tmp_path / "labelsTr/u3.png").read_bytes())
    assert any("u3.tif: it has the same name as" in line for line in errors(checked(settings)[1]))


def test_rows_may_name_files_and_images_to_be_predicted_need_none(tmp_path):
    settings = nnunet_images(tmp_path, n=8, ending=".jpg", mask_ending=".png")
    table = tmp_path / "attributes.csv"
    text = (
        table.read_text(encoding="utf-8").replace("u1,", "u1_0000.jpg,").replace("u2,", "u2.JPG,")
    )
    table.write_text(text, encoding="utf-8")
    (tmp_path / "imagesTs").mkdir()
    Image.fromarray(echoes(9)).save(tmp_path / "imagesTs/new_0000.jpg")
    code, text = checked(settings)
    assert code == 0
    assert "1 cases without a mask have no row, so that their attributes are unknown: new" in text
    cases = {case.case_id: case for case in open_dataset(settings).cases}
    assert (cases["u1"].attributes, cases["new"].attributes) == ((1,), (UNKNOWN,))
    assert load(settings, "new").mask_S is None


def test_nifti_is_the_former_name_of_a_folder(tmp_path):
    settings = nnunet_images(tmp_path, n=20)
    assert DataSettings("nifti", tmp_path) == settings
    with pytest.raises(DataError, match="expected the folder that holds the files of folder"):
        open_dataset(DataSettings("nifti"))
    dataset = open_dataset(settings)
    now = make_splits(dataset, 0)
    dataset.name, dataset.former_name = "nifti", ""
    before = make_splits(dataset, 0)
    assert (now.train, now.validation, now.test) == (before.train, before.validation, before.test)
