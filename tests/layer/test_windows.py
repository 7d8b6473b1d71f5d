"""Each window is told its own sample's attributes, whatever else is in its batch."""

import numpy as np
import pytest
import torch

from dmoe_layer import DMoE, routing, window_attributes

# Of two windows of sample 0, one of 2, one of 1, as MONAI gives them: lists of slices.
PLACES = [[slice(b, b + 1), slice(None), slice(0, 8), slice(4, 12)] for b in (0, 0, 2, 1)]


@pytest.mark.parametrize("places", [PLACES, tuple(map(tuple, PLACES))], ids=["lists", "tuples"])
@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (torch.tensor([5, 6, 7]), [5, 5, 7, 6]),
        ([5, -1, 7], [5, 5, 7, -1]),
        (np.array([5, 6, 7]), [5, 5, 7, 6]),
        (torch.tensor([[5, 1], [6, 2], [7, 3]]), [[5, 1], [5, 1], [7, 3], [6, 2]]),
        (torch.tensor([4]), [4] * 4),
        (torch.tensor([[4, 1]]), [[4, 1]] * 4),
        (torch.tensor(4), [4] * 4),
        (4, [4] * 4),
    ],
)
def test_a_window_has_the_attributes_of_its_sample(attributes, expected, places):
    of_windows = window_attributes(attributes, places)
    assert of_windows.tolist() == expected
    assert of_windows.dtype == torch.int64


def test_what_a_window_is_told_is_a_copy_and_of_the_same_dtype():
    site = torch.tensor([4], dtype=torch.int32)
    of_windows = window_attributes(site, PLACES)
    of_windows[0] = 9
    assert site.tolist() == [4]
    assert of_windows.tolist() == [9, 4, 4, 4]
    assert of_windows.dtype == torch.int32
    assert window_attributes(site, []).shape == (0,)


def test_the_ends_of_a_slice_may_be_numpys_integers():
    places = [[slice(np.int64(1), np.int64(2)), slice(None)]]
    assert window_attributes([3, 4], places).tolist() == [4]


@pytest.mark.parametrize(
    ("attributes", "places", "error", "quotes"),
    [
        ([0.5, 1.0, 2.0], PLACES, TypeError, "attributes: expected integers, got torch.float32"),
        ("abc", PLACES, TypeError, "attributes: expected an integer tensor, got str"),
        (torch.zeros(2, 1, 1).long(), PLACES, ValueError, "attributes: expected shape"),
        (
            [0, 1],
            PLACES,
            ValueError,
            r"attributes: got shape \(2,\), but window 2 was cut from sample 2",
        ),
        (
            [],
            PLACES,
            ValueError,
            r"attributes: got shape \(0,\), but window 0 was cut from sample 0",
        ),
        ([0, 1], None, TypeError, r"places: got None \(NoneType\).*with_coord=True"),
        ([0, 1], torch.zeros(4), TypeError, "places: got torch.float32"),
        ([0, 1], PLACES[0], TypeError, r"places\[0\]: got slice\(0, 1, None\)"),
        ([0, 1], [[]], TypeError, r"places\[0\]: got \[\]"),
        ([0, 1], [PLACES[0], [slice(None)]], TypeError, r"places\[1\]: got .*slice\(b, b \+ 1\)"),
        ([0, 1], [[slice(0, 2)]], TypeError, r"places\[0\]: got .*slice\(b, b \+ 1\)"),
        ([0, 1], [[slice(-1, 0)]], TypeError, r"places\[0\]: got .*slice\(b, b \+ 1\)"),
        ([0, 1], [[slice(0.0, 1.0)]], TypeError, r"places\[0\]: got .*slice\(b, b \+ 1\)"),
        ([0, 1], [[0, slice(0, 8)]], TypeError, r"places\[0\]: got .*slice\(b, b \+ 1\)"),
        (3, [[slice(0, 2)]], TypeError, r"places\[0\]: got .*slice\(b, b \+ 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(attributes, places, error, quotes):
    with pytest.raises(error, match=quotes):
        window_attributes(attributes, places)


@pytest.fixture
def voxelwise():
    """A network whose answer for a voxel depends on that voxel and its sample's attribute."""
    layer = DMoE(1, n_experts=4, k=2, attribute_sizes=3, channel_dim=1, residual=True)
    return layer.eval().requires_grad_(False)


def sliding(volumes, predictor, at_once, **options):
    inferers = pytest.importorskip("monai.inferers")
    return inferers.sliding_window_inference(
        volumes, (8, 8), at_once, predictor, overlap=0.5, mode="gaussian", **options
    )


def alone(model, volumes, sites, **options):
    """Each patient alone: the one way in which no window can be of another."""
    answers = []
    for volume, site in zip(volumes, sites, strict=True):
        with routing(site):
            answers.append(sliding(volume[None], model, 2, **options))
    return torch.cat(answers)


def test_as_many_windows_as_patients_are_paired_wrongly_by_a_scope_around_them(voxelwise):
    volumes, site = torch.randn(2, 1, 16, 16), torch.tensor([0, 2])
    expected = alone(voxelwise, volumes, site)
    with routing(site):  # two windows of one patient, for the attributes of two
        naive = sliding(volumes, voxelwise, 2)
    assert (naive - expected).abs().max() > 1e-2

    def predictor(windows, places):
        with routing(window_attributes(site, places), record=False):
            return voxelwise(windows)

    right = sliding(volumes, predictor, 2, with_coord=True)
    torch.testing.assert_close(right, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"buffer_steps": 1},
        {"buffer_steps": 2, "buffer_dim": 0},
        {"process_fn": lambda seg, windows, weights: (seg, 2 * weights)},
    ],
    ids=["plain", "buffered", "buffered_rows", "processed"],
)
def test_monais_windows_receive_their_own_patients_attributes(voxelwise, at_once, options):
    volumes, site = torch.randn(3, 1, 20, 16), torch.tensor([0, 2, 1])

    def predictor(windows, places):
        with routing(window_attributes(site, places), record=False):
            return voxelwise(windows)

    windowed = sliding(volumes, predictor, at_once, with_coord=True, **options)
    with routing(site):
        whole = voxelwise(volumes)
    torch.testing.assert_close(windowed, whole, rtol=1e-5, atol=1e-5)
