"""Pixels that are ignored count in no score of a region, and cut no outline."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from reference_models.metrics.region import score_region


def by_hand(predicted, truth, ignored, spacing, tolerance):
    """Over whole images, a pixel and a neighbour at a time: overlaps, HD95, surface Dice."""
    predicted, truth = predicted & ~ignored, truth & ~ignored
    shared, union = (predicted & truth).sum(), (predicted | truth).sum()
    edges = []
    for mask in (predicted, truth):
        edge = np.zeros_like(mask)
        for at in np.argwhere(mask):
            for axis in range(mask.ndim):
                for step in (-1, 1):
                    next_to = at.copy()
                    next_to[axis] += step
                    beyond = not 0 <= next_to[axis] < mask.shape[axis]
                    edge[tuple(at)] |= beyond or not (mask | ignored)[tuple(next_to)]
        edges.append(edge)
    to_truth = distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    to_predicted = distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    hd95 = max(np.percentile(to_truth, 95), np.percentile(to_predicted, 95))
    near = np.sum(to_truth <= tolerance) + np.sum(to_predicted <= tolerance)
    return (
        2 * shared / (predicted.sum() + truth.sum()),
        shared / union,
        hd95,
        near / (len(to_truth) + len(to_predicted)),
        truth.sum(),
        predicted.sum(),
    )


@pytest.mark.parametrize(("shape", "spacing"), [((17, 14), (0.7, 1.9)), ((7, 8, 6), (1, 2, 3))])
def test_scores_are_those_of_the_other_pixels_and_of_the_outlines_seen_among_them(shape, spacing):
    rng = np.random.default_rng(4)
    for _ in range(6):
        predicted, truth, ignored = (rng.random(shape) < share for share in (0.6, 0.5, 0.3))
        options = {"spacing": spacing, "tolerance": 1.0}
        got = score_region(predicted, truth, ignored_S=ignored, **options)
        assert got == pytest.approx(by_hand(predicted, truth, ignored, *options.values()))
        # Whatever the masks hold there.
        other = score_region(predicted ^ ignored, truth | ignored, ignored_S=ignored, **options)
        assert other == got
        nothing = np.zeros(shape, bool)
        plain = score_region(predicted, truth, **options)
        assert score_region(predicted, truth, ignored_S=nothing, **options) == plain


def test_of_one_outlined_slice_the_outline_is_that_within_the_slice():
    truth, predicted = np.zeros((2, 9, 9, 3), bool)
    truth[2:7, 2:7], predicted[3:6, 3:6] = True, True
    ignored = np.ones((9, 9, 3), bool)
    ignored[..., 1] = False
    options = {"tolerance": 1.0, "ignored_S": ignored}
    got = score_region(predicted, truth, spacing=(1, 1, 5), **options)
    plane = score_region(predicted[..., 1], truth[..., 1], spacing=(1, 1), tolerance=1.0)
    assert got == plane


def test_a_region_that_fills_all_that_is_not_ignored_has_no_outline_to_measure_from():
    full, part = np.ones((5, 5), bool), np.zeros((5, 5), bool)
    part[1:3, 1:3] = True
    ignored = np.ones((5, 5), bool)
    ignored[1:4, 1:4] = False
    options = {"spacing": (1, 1), "tolerance": 1.0, "ignored_S": ignored}
    assert score_region(full, full, **options) == (1, 1, 0, 1, 9, 9)
    assert score_region(part, full, **options) == (8 / 13, 4 / 9, None, 0, 9, 4)
    assert score_region(full, part & False, **options) == (0, 0, None, 0, 0, 9)
    with pytest.raises(ValueError, match=r"^ignored: got shape \(4, 5\)"):
        score_region(full, part, **options | {"ignored_S": ignored[1:]})
