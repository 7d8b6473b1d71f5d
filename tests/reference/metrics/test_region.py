"""Scores of a region: hand-worked cases, plain distance transforms and MONAI all agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_erosion, distance_transform_edt

from reference_models.metrics.region import POLICY, batch_dice, boundary_distances, score_region


def square(shape, *corners):
    """A mask of `shape` that is True in one box, given as (start, stop) by axis."""
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*corner) for corner in corners)] = True
    return mask


def by_distance_transform(predicted, truth, spacing, tolerance):
    """HD95 and surface Dice over whole images: no cropping, no tree."""
    edges = [mask ^ binary_erosion(mask) for mask in (predicted, truth)]
    to_truth = distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    to_predicted = distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_predicted, 95))
    near = np.sum(to_truth <= tolerance + 1e-9) + np.sum(to_predicted <= tolerance + 1e-9)
    return hd95, near / (len(to_truth) + len(to_predicted))


def blobs(seed, shape):
    """Two ragged masks that overlap, anywhere in the image, its rim included."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    centre = rng.uniform(0, shape)
    masks = []
    for _ in range(2):
        off = (grid - centre - rng.normal(0, 2, len(shape))) / rng.uniform(3, 8, len(shape))
        mask = (off**2).sum(-1) < 1
        mask ^= rng.random(shape) < 0.03
        masks.append(mask)
    return masks


def test_one_pixel_each_three_down_and_four_across():
    truth, predicted = square((9, 9), (1, 2), (1, 2)), square((9, 9), (4, 5), (5, 6))
    near = score_region(predicted, truth, spacing=(1, 1), tolerance=5)
    assert near == (0, 0, 5.0, 1.0, 1, 1)
    assert score_region(predicted, truth, spacing=(1, 1), tolerance=4.9).surface_dice == 0
    # 3 rows of 2 mm and 4 columns of 0.5 mm.
    assert score_region(predicted, truth, spacing=(2, 0.5), tolerance=0).hd95 == pytest.approx(
        40**0.5
    )


def test_two_voxels_apart_in_3d_along_the_axis_of_its_own_spacing():
    truth, predicted = (square((5, 5, 5), (1, 2), (1, 2), (z, z + 1)) for z in (1, 3))
    assert score_region(predicted, truth, spacing=(1, 2, 3), tolerance=6) == (0, 0, 6, 1, 1, 1)
    assert score_region(predicted, truth, spacing=(3, 2, 1), tolerance=1).hd95 == 2


def test_a_square_beside_a_larger_one_by_hand():
    # Truth: 5 x 5 = 25 pixels, boundary 16. Prediction: 3 x 3 in its middle, boundary 8, each one
    # pixel from the truth's. Of the truth's 16, the 4 corners are sqrt(2) away, the others 1: of
    # 16 sorted distances the 95th percentile stands at place 14.25, among the corners'.
    truth, predicted = square((9, 9), (2, 7), (2, 7)), square((9, 9), (3, 6), (3, 6))
    got = score_region(predicted, truth, spacing=(1, 1), tolerance=1)
    assert got == (18 / 34, 9 / 25, pytest.approx(2**0.5), 20 / 24, 25, 9)
    # The same from the other side: all scores are symmetric.
    assert score_region(truth, predicted, spacing=(1, 1), tolerance=1)[:4] == got[:4]


def test_hd95_leaves_out_the_farthest_twentieth_and_no_more():
    # A row of 41 pixels, all boundary; the prediction adds one pixel 10 below its end: of its 42
    # distances one is 10 and the 95th percentile stands at place 38.95, among the zeros. With a
    # row of 11 it is one of 12, at place 10.45: 0 + .45 * 10.
    for length, expected in ((41, 0), (11, 4.5)):
        truth = square((20, 50), (2, 3), (0, length))
        predicted = truth | square((20, 50), (12, 13), (0, 1))
        got = score_region(predicted, truth, spacing=(1, 1), tolerance=0)
        assert got.hd95 == pytest.approx(expected)
        assert got.surface_dice == pytest.approx((2 * length) / (2 * length + 1))


def test_a_region_at_the_images_rim_has_its_boundary_there():
    full = np.ones((4, 4), dtype=bool)
    inside = square((4, 4), (1, 3), (1, 3))
    # 12 boundary pixels of the full image, 4 inside: the 4 corners are sqrt(2) away, the others 1.
    got = score_region(inside, full, spacing=(1, 1), tolerance=1)
    assert got.surface_dice == 12 / 16


@pytest.mark.parametrize("shape", [(6, 6), (4, 5, 6)])
@pytest.mark.parametrize(
    ("truth_full", "predicted_full", "expected"),
    [
        (False, False, (1, 1, 0, 1)),
        (True, False, (0, 0, None, 0)),
        (False, True, (0, 0, None, 0)),
        (True, True, (1, 1, 0, 1)),
    ],
)
def test_empty_masks_score_as_the_policy_says(shape, truth_full, predicted_full, expected):
    truth, predicted = np.full(shape, truth_full), np.full(shape, predicted_full)
    got = score_region(predicted, truth, spacing=(1,) * len(shape), tolerance=1)
    assert got[:4] == expected
    assert (got.truth_size, got.predicted_size) == (truth.sum(), predicted.sum())
    assert "both empty" in POLICY
    assert "not defined" in POLICY


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI's own call
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((40, 31), (1, 1)), ((40, 31), (0.3, 1.7)), ((14, 15, 16), (2.5, 0.7, 1.1))],
)
def test_scores_equal_uncropped_distance_transforms_and_monais(shape, spacing):
    tolerance, compared = 1.1, 0
    for seed in range(12):
        predicted, truth = blobs(seed, shape)
        if not (predicted.any() and truth.any()):
            continue
        compared += 1
        got = score_region(predicted, truth, spacing=spacing, tolerance=tolerance)
        hd95, surface = by_distance_transform(predicted, truth, spacing, tolerance)
        assert got.hd95 == pytest.approx(hd95, rel=1e-12)
        assert got.surface_dice == surface
        batch = [torch.as_tensor(mask)[None, None].float() for mask in (predicted, truth)]
        options = {"include_background": True, "spacing": spacing}
        monai = compute_hausdorff_distance(*batch, percentile=95, **options).item()
        assert got.hd95 == pytest.approx(monai, rel=1e-5)
        monai = compute_surface_dice(*batch, [tolerance * (1 + 1e-6)], **options).item()
        assert got.surface_dice == pytest.approx(monai, rel=1e-6)
    assert compared > 8


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.1, 3.0]))
def test_scores_keep_their_bounds_and_scale_with_the_spacing(seed, scale):
    predicted, truth = blobs(seed, (17, 13))
    one = score_region(predicted, truth, spacing=(1, 1), tolerance=2)
    scaled = score_region(predicted, truth, spacing=(scale, scale), tolerance=2 * scale)
    assert 0 <= one.iou <= one.dice <= 1
    assert one.iou == pytest.approx(one.dice / (2 - one.dice))
    assert one.surface_dice == scaled.surface_dice  # what is at the tolerance is within it
    if one.hd95 is not None:
        assert scaled.hd95 == pytest.approx(one.hd95 * scale)


def test_distances_are_to_the_nearest_boundary_pixel_of_the_other():
    truth, predicted = square((3, 9), (1, 2), (0, 3)), square((3, 9), (1, 2), (2, 6))
    to_truth, to_predicted = boundary_distances(predicted, truth, (1, 1))
    assert to_truth.tolist() == [0, 1, 2, 3]
    assert to_predicted.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"predicted_S": np.zeros((3, 3), np.uint8)},
            TypeError,
            "^predicted: got uint8, expected bool",
        ),
        ({"truth_S": np.zeros((3, 3), np.int8)}, TypeError, "^truth: got int8, expected bool"),
        ({"truth_S": np.zeros((3, 4), bool)}, ValueError, r"^predicted: .*\(3, 3\).*\(3, 4\)"),
        ({"spacing": (1,)}, ValueError, "expected 2 positive numbers"),
        ({"spacing": (1, 0)}, ValueError, "expected 2 positive numbers"),
        ({"spacing": (1, float("nan"))}, ValueError, "expected 2 positive numbers"),
        ({"tolerance": -1}, ValueError, "tolerance: got -1"),
    ],
)
def test_what_cannot_be_scored_is_an_error(change, error, words):
    good = {
        "predicted_S": np.zeros((3, 3), bool),
        "truth_S": np.zeros((3, 3), bool),
        "spacing": (1, 1),
        "tolerance": 1,
    }
    with pytest.raises(error, match=words):
        score_region(**good | change)


def test_a_batchs_dice_is_each_regions_to_the_bit():
    pairs = [blobs(seed, (19, 23)) for seed in range(6)]
    empty, full = np.zeros((19, 23), bool), np.ones((19, 23), bool)
    pairs += [(empty, empty), (empty, full), (full, empty), (full, full)]
    predicted, truth = (torch.from_numpy(np.stack(masks)) for masks in zip(*pairs, strict=True))
    scored = [score_region(*pair, spacing=(1, 1), tolerance=1).dice for pair in pairs]
    assert batch_dice(predicted, truth) == scored
    assert scored[-4:] == [1, 0, 0, 1]
    with pytest.raises(TypeError, match=r"^prediction: got torch.uint8, expected torch.bool; "):
        batch_dice(predicted.byte(), truth)
    with pytest.raises(ValueError, match=r"^prediction: got shape \(1, .* of truth, \(10, "):
        batch_dice(predicted[:1], truth)
