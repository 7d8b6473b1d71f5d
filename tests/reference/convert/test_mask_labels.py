"""What masks hold becomes labels by a stated rule, or `convert` asks what it is."""

import numpy as np
import pytest
from harness.loose_files import SIZE, converted, labels_in, loose, mask_of
from PIL import Image

from reference_models.convert.command import convert
from reference_models.errors import DataError

RED, GREEN, GREY = (255, 0, 0), (0, 255, 0), (128, 128, 128)


def coloured(*colours):
    mask_HW3 = np.zeros((*SIZE, 3), np.uint8)
    for place, colour in enumerate(colours):
        mask_HW3[4 + 5 * place : 8 + 5 * place, 6:20] = colour
    return mask_HW3


def grey(*values):
    return coloured(*((value,) * 3 for value in values))[..., 0]


def palette(values_HW, *colours):
    image = Image.fromarray(values_HW, "P")
    image.putpalette([part for colour in colours for part in colour])
    return image


def folder(tmp_path, *masks):
    """As many images as masks, which are saved as PNG."""
    settings = loose(tmp_path, n=len(masks))
    for i, mask in enumerate(masks):
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(tmp_path / f"b/us_{i:03}_mask.png")
    return settings


def labels_of(tmp_path, *masks, given=()):
    said, content, *_ = converted(folder(tmp_path, *masks), labels=given)
    written = [labels_in(tmp_path / f"out/labelsTr/us_{i:03}.png") for i in range(len(masks))]
    return content["labels"], written, said


TWO = {"background": 0, "foreground": 1}
FOUND = {
    "black and white": ([mask_of(255), mask_of(0)], TWO),
    "labels": ([mask_of(1), mask_of(1, 3)], TWO),
    "1 bit": ([mask_of(1).astype(bool), mask_of(255)], TWO),
    "red on black": ([coloured(RED), coloured()], TWO),
    "grey as RGB": ([np.stack([mask_of()] * 3, -1)], TWO),
    "three labels": ([grey(1, 2), grey(2)], {"background": 0, "label 1": 1, "label 2": 2}),
}


@pytest.mark.parametrize("kind", FOUND)
def test_masks_that_can_be_one_thing_only_need_no_flag(tmp_path, kind):
    masks, expected = FOUND[kind]
    labels, written, said = labels_of(tmp_path, *masks)
    assert labels == expected
    for mask, found in zip(masks, written, strict=True):
        where = mask if mask.ndim == 2 else mask[..., 0]
        if kind == "three labels":
            np.testing.assert_array_equal(found, where)
        else:
            np.testing.assert_array_equal(found, where > 0)
    assert any("label" in line and "background" in line for line in said)


def test_labels_with_values_say_what_greys_and_colours_are(tmp_path):
    masks = coloured(GREEN, GREY), coloured(RED)
    given = ("background=0", "cyst=#00ff00", "tumour=#FF0000", "ignore=128")
    labels, (first, second), _ = labels_of(tmp_path, *masks, given=given)
    assert labels == {"background": 0, "cyst": 1, "tumour": 2, "ignore": 3}
    np.testing.assert_array_equal(first, grey(1, 3))
    np.testing.assert_array_equal(second, grey(2))


def test_what_is_ignored_becomes_the_highest_label_wherever_it_is_named(tmp_path):
    given = ("ignore=255", "lesion=1", "background=0")
    labels, (found,), _ = labels_of(tmp_path, grey(1, 255), given=given)
    assert labels == {"background": 0, "lesion": 1, "ignore": 2}
    np.testing.assert_array_equal(found, grey(1, 2))


@pytest.mark.parametrize("mask", [mask_of(255), coloured(RED), mask_of(1)])
def test_two_names_do_for_masks_of_two_kinds(tmp_path, mask):
    labels, _, said = labels_of(tmp_path, mask, given=("skin", "lesion"))
    assert labels == {"skin": 0, "lesion": 1}
    assert any("0 skin, 1 lesion" in line for line in said)


def test_a_label_that_no_mask_has_may_be_named(tmp_path):
    labels, (found,), _ = labels_of(tmp_path, grey(1, 3), given=("rest", "a", "b", "c"))
    assert labels["c"] == 3
    np.testing.assert_array_equal(found, grey(1, 3))


def test_places_in_one_palette_are_labels(tmp_path):
    colours = ((0, 0, 0), RED, GREEN)
    settings = folder(tmp_path, palette(grey(1, 2), *colours), palette(grey(2), *colours))
    _, content, *_ = converted(settings)
    assert content["labels"] == {"background": 0, "label 1": 1, "label 2": 2}
    with Image.open(settings.to / "labelsTr/us_000.png") as image:
        np.testing.assert_array_equal(np.asarray(image), grey(1, 2))


def test_several_masks_of_one_image_are_put_together(tmp_path):
    settings = folder(tmp_path, grey(1), grey(1))
    Image.fromarray(grey(0, 1)).save(tmp_path / "b/us_001_mask_1.png")
    said, *_ = converted(settings)
    np.testing.assert_array_equal(labels_in(settings.to / "labelsTr/us_001.png"), grey(1, 1))
    np.testing.assert_array_equal(labels_in(settings.to / "labelsTr/us_000.png"), grey(1))
    assert any("1 of 2 cases have several masks" in line for line in said)


SMOOTH = np.tile(np.arange(32, dtype=np.uint8) * 8, (24, 1))
REFUSED = {
    "other greys": ([grey(128, 255)], (), "hold 0, 128, 255.*background=0 'label1=128'"),
    "one white mask": (
        [grey(1), grey(255)],
        (),
        r"us_001.*hold 0, 1, 255, .*'label2=255'; if 1 and 255 mean the same, write the masks",
    ),
    "a gap": ([grey(2)], (), "hold 0, 2, and it is not known which is which"),
    "two colours": ([coloured(RED, GREEN)], (), "background=0 'label1=#00ff00' 'label2=#ff0000'"),
    "smoothed": ([SMOOTH], (), "32 values, 0, 8, 16.*as if they were smoothed, compressed as JPEG"),
    "nothing": ([mask_of(0)], (), "only background"),
    "one not named": ([grey(1, 2)], ("a", "b"), "holds 2, which --labels does not name"),
    "a value not named": (
        [grey(7)],
        ("a=0", "b=8"),
        r"holds 7, which --labels does not name \(0, 8",
    ),
    "half of the values": ([grey(7)], ("a", "b=7"), "a value for all or for none"),
    "one value twice": ([grey(7)], ("a=0", "b=7", "c=7"), "a value for all or for none"),
    "one name": ([grey(7)], ("a=7",), "expected two or more different names"),
    "the background second": ([grey(255)], ("a", "background"), "the background first"),
    "no value": ([grey(7)], ("a=0", "b=red"), "got b=red, expected a name, or"),
    "palettes that differ": (
        [palette(grey(1), (0, 0, 0), RED), palette(grey(1), (0, 0, 0), GREEN)],
        (),
        r"us_001_mask.png: in its palette 1 is the colour \(0, 255, 0\)",
    ),
    "transparent": ([np.dstack([coloured(RED), mask_of()])], (), "transparent"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_masks_that_can_be_several_things_are_asked_about(tmp_path, kind):
    masks, given, words = REFUSED[kind]
    settings = folder(tmp_path, *masks)
    with pytest.raises(DataError, match=words):
        converted(settings, labels=given)
    assert not settings.to.exists()


def test_masks_packed_with_loss_are_refused(tmp_path):
    settings = loose(tmp_path, n=2, mask="us_{:03}_mask.jpg")
    with pytest.raises(DataError, match=r"us_000_mask\.jpg: cannot be read .*JPEG"):
        convert(settings)
