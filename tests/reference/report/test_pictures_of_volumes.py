"""Pictures of volumes: three planes, the same however the volume is stored."""

import itertools

import nibabel
import numpy as np
import pytest
from harness.volumes import stored_as

from reference_models.report.pictures import GAP, Picture

pytestmark = pytest.mark.usefixtures("one_thread")


def scene():
    """A body in RAS+, brighter to the right, front and top, and two masks."""
    x, y, z = np.meshgrid(*map(np.arange, (20, 24, 8)), indexing="ij")
    truth = np.zeros((20, 24, 8), np.uint8)
    truth[14:18, 4:8, 5] = 1
    truth[16, 6, 4:7] = 2
    predicted = np.roll(truth, 1, 0)
    return (x + 10 * y + 100.0 * z).astype(np.float32)[None], truth, predicted


def test_a_volume_is_the_same_picture_however_it_is_stored():
    spacing = (2.0, 1.0, 4.0)
    image_CS, truth, predicted = scene()
    first = Picture.of("a", image_CS, truth, predicted, np.diag([*spacing, 1.0]))
    codes = [
        "".join(signs[axis] for axis, signs in zip(order, flipped, strict=True))
        for order in itertools.permutations(range(3))
        for flipped in itertools.product(("RAS", "LPI"), repeat=3)
    ]
    assert len({*codes}) == 48
    for axes in codes:
        arrays = [stored_as(axes, spacing, a)[0] for a in (image_CS[0], truth, predicted)]
        affine = stored_as(axes, spacing, truth)[1]
        assert "".join(nibabel.aff2axcodes(affine)) == axes
        again = Picture.of("a", arrays[0][None], arrays[1], arrays[2], affine)
        for name in ("image_HW3", "truth_HW", "predicted_HW"):
            np.testing.assert_array_equal(getattr(first, name), getattr(again, name), axes)


def test_planes_lie_as_radiologists_see_them_through_most_of_the_truth():
    image_CS, truth, predicted = scene()
    picture = Picture.of("a", image_CS, truth, predicted, np.diag([2.0, 1.0, 4.0, 1.0]))
    # Pixels of 1 mm: axial 24 x 40 (back to front, left to right), coronal 32 x 40, sagittal 32 x
    # 24; the first lies between 4 rows of nothing and 4 more.
    assert picture.truth_HW.shape == (32, 40 + GAP + 40 + GAP + 24)
    assert picture.planes == 3
    axial, coronal, sagittal = np.split(picture.truth_HW, [40 + GAP, 80 + 2 * GAP], axis=1)
    mark = truth.copy()
    # Right is left, the front and the top are on top, and in the last plane the front is left.
    expected = np.repeat(mark[::-1, ::-1, 5].T, 2, axis=1)
    np.testing.assert_array_equal(axial[4:28, :40], expected)
    np.testing.assert_array_equal(
        coronal[:, :40], np.repeat(np.repeat(mark[::-1, 6, ::-1].T, 2, 1), 4, 0)
    )
    np.testing.assert_array_equal(sagittal, np.repeat(mark[16, ::-1, ::-1].T, 4, 0))
    grey = picture.image_HW3[..., 0].astype(int)
    assert grey[4, 0] > grey[4, 39]  # the right side is the brighter
    assert grey[4, 0] > grey[27, 0]  # as the front
    assert grey[0, 40 + GAP] > grey[31, 40 + GAP]  # and the top
    assert grey[0, 80 + 2 * GAP] > grey[0, -1]
    for nothing in (slice(None, 4), slice(28, None)):
        assert not grey[nothing, :40].any()
        assert not picture.truth_HW[nothing, :40].any()


def test_without_a_truth_the_prediction_says_where_to_look_and_none_is_drawn():
    image_CS, truth, predicted = scene()
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    alone = Picture.of("a", image_CS, None, predicted, affine)
    assert alone.truth_HW is None
    assert [*alone.masks] == ["prediction"]
    empty = Picture.of("a", image_CS, np.zeros_like(truth), predicted, affine)
    np.testing.assert_array_equal(alone.predicted_HW, empty.predicted_HW)
    assert (alone.predicted_HW == 1).sum() > 16
    nothing = Picture.of("a", image_CS, None, np.zeros_like(truth), affine)
    middle = image_CS[0, ::-1, ::-1, ::-1][:, :, 4].T  # the 5th of 8 from above
    low, high = nothing.image_HW3[..., 0].min(), nothing.image_HW3[..., 0].max()
    assert (low, high) == (0, 255)
    assert np.corrcoef(middle.ravel(), nothing.image_HW3[:24, :20, 0].ravel())[0, 1] > 0.999
