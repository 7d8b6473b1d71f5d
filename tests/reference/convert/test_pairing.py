"""Images and masks are paired by name, by a rule that takes no case's number for a channel."""

import unicodedata
from pathlib import Path

import pytest

from reference_models.convert.pairing import list_files, pair
from reference_models.errors import DataError


def paired(tmp_path, images, masks, same=False):
    """Case and channel numbers with the mask's name, of files that are empty."""
    folders = []
    for name, files in (("a", images), ("b", masks)):
        folder = tmp_path / ("a" if same else name)
        folder.mkdir(exist_ok=True)
        for file in files:
            (folder / file).write_bytes(b"")
        folders.append(folder)
    found = pair(*list_files([folders[0]], [folders[1]]))
    return {
        case_id: (sorted(case.channels), *(mask.path.name for mask in case.masks))
        for case_id, case in found.pairs.items()
    }, found


RULES = {
    "alike": ("p1.png", "p1.tif", "p1"),
    "suffix": ("p1.png", "p1_mask.png", "p1"),
    "other suffix, capitals": ("p1.PNG", "p1-Segmentation.png", "p1"),
    "Slicer's": ("p1.nii.gz", "p1.seg.nii.gz", "p1"),
    "suffixes of both": ("p1_img.png", "p1_label.png", "p1"),
    "prefixes of both": ("image_01.png", "mask_01.png", "01"),
    "blank": ("benign (1).png", "benign (1)_mask.png", "benign (1)"),
    "ISIC": ("ISIC_0024306.jpg", "ISIC_0024306_segmentation.png", "ISIC_0024306"),
    "a number that is the case's": ("us_0001.png", "us_0001.png", "us_0001"),
    "dots": ("v1.2.png", "v1.2_seg.png", "v1.2"),
    "accents": (unicodedata.normalize("NFD", "José.png"), "José_mask.png", "José"),
}


@pytest.mark.parametrize("rule", RULES)
def test_names_that_belong_together(tmp_path, rule):
    image, mask, case_id = RULES[rule]
    other = [name.replace("1", "2") if "1" in name else f"z{name}" for name in (image, mask)]
    found, pairing = paired(tmp_path, [image, other[0]], [mask, other[1]])
    assert found[case_id] == ([0], mask)
    assert len(found) == 2
    assert not pairing.lone_images + pairing.lone_masks


def test_a_number_is_a_channel_only_where_the_mask_is_called_without_it(tmp_path):
    images = ["p1_0000.png", "p1_0001.png", "p2_0000.png", "p2_0001.png"]
    found, _ = paired(tmp_path, images, ["p1.png", "p2_seg.png"])
    assert found == {"p1": ([0, 1], "p1.png"), "p2": ([0, 1], "p2_seg.png")}
    (tmp_path / "of cases").mkdir()
    found, _ = paired(tmp_path / "of cases", images, [f"{name[:7]}_mask.png" for name in images])
    assert [*found] == [name[:7] for name in images]
    assert all(numbers == [0] for numbers, _ in found.values())


def test_what_is_called_wholly_alike_goes_first(tmp_path):
    found, pairing = paired(tmp_path, ["p1.png"], ["p1.png", "p1_mask.png"])
    assert found == {"p1": ([0], "p1.png")}
    assert [file.path.name for file in pairing.lone_masks] == ["p1_mask.png"]


def test_one_folder_may_hold_both(tmp_path):
    files = ["benign (1).png", "benign (1)_mask.png", "benign (2).png", "benign (2)_mask.png"]
    found, _ = paired(tmp_path, files, [], same=True)
    assert found["benign (2)"] == ([0], "benign (2)_mask.png")
    assert len(found) == 2


def test_numbered_masks_of_one_image_go_together_and_others_do_not(tmp_path):
    masks = ["p1_mask.png", "p1_mask_1.png", "p1_mask_2.png", "p2_mask.png"]
    found, pairing = paired(tmp_path, ["p1.png", "p2.png"], masks)
    assert found == {"p1": ([0], *masks[:3]), "p2": ([0], masks[3])}
    (said,) = pairing.remarks()
    assert said.startswith("1 of 2 cases have several masks, which are joined into one;")


def test_names_that_differ_in_capitals_or_zeros_are_asked_about(tmp_path):
    _, pairing = paired(tmp_path, ["P1.png", "P01.png", "P3.png"], ["p1_seg.png", "P3.png"])
    said = pairing.remarks()
    assert said[-1].startswith("These names differ slightly")
    assert "P1.png and p1_seg.png" in said[-1]


REFUSED = {
    "nothing alike": (["a1.png"], ["b1.png"], "images are a1.png, masks are b1.png; a mask must"),
    "two images": (["p1.png", "p1.jpg"], ["p1.png"], r"p1\.jpg and .*p1\.png have the same name"),
    "two masks": (["p1.png"], ["p1_mask.png", "p1_seg.png"], "have the same name; remove one"),
    "two endings": (["p1.png", "p2.bmp"], ["p1.png", "p2.png"], "they end in .bmp and .png"),
    "a volume and an image": (["p1.nii.gz"], ["p1.png"], "save masks as .nii.gz or .nii"),
    "a lacking channel": (
        ["p1_0000.png", "p1_0001.png", "p2_0000.png"], ["p1.png", "p2.png"], "cases lack one .*: p2"
    ),
    "channels from 1": (["p1_0001.png"], ["p1.png"], "names are _0001, expected all from _0000"),
    "no mask": (
        ["p1.png"],
        ["notes.txt"],
        r"b: this folder \(--masks\) has no file that ends in \.nii.*it has notes.txt",
    ),
    "folders": (["p1.png"], [], r"b: this folder \(--masks\) has no file.*it has nothing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_paired_is_refused(tmp_path, fault):
    images, masks, words = REFUSED[fault]
    with pytest.raises(DataError, match=words):
        paired(tmp_path, images, masks)


def test_a_folder_that_is_none_or_has_none_called_like_masks_is_named(tmp_path):
    with pytest.raises(DataError, match="x: there is no such folder; correct --images"):
        list_files([tmp_path / "x"], [tmp_path])
    (tmp_path / "p1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"no file in it has a name of a mask: p1_mask\.png"):
        list_files([tmp_path], [Path(f"{tmp_path}/.")])
