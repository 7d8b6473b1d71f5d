"""Volumes on one grid: however they are stored, the frame is the same and the mask finds back."""

import itertools

import nibabel
import numpy as np
import pytest
import torch
from nibabel import orientations
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

from reference_models.data import grid
from reference_models.data.cases import Sample
from reference_models.data.grid import VolumeFraming, find_body

SPACING = (1.0, 1.5, 3.0)
STORED = [
    np.array(list(zip(axes, flips, strict=True)), float)
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def oblique(spacing=SPACING):
    """An affine turned by up to 12° about each axis, so that the closest axes are RAS+."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, :3] = nibabel.eulerangles.euler2mat(0.2, 0.1, -0.15) @ affine[:3, :3]
    affine[:3, 3] = 30, -20, 10
    return affine


def volume(image_CS, mask_S, affine=None, stored=STORED[0]):
    """A sample of RAS+ arrays, as a file with other axes has it."""
    affine = oblique() if affine is None else affine
    affine = affine @ orientations.inv_ornt_aff(stored, image_CS.shape[1:])
    image_CS = np.stack([orientations.apply_orientation(c, stored) for c in image_CS])
    image_CS = image_CS.astype(np.float32)
    if mask_S is not None:
        mask_S = orientations.apply_orientation(mask_S, stored)
    header = nibabel.Nifti1Image(image_CS[0], affine).header
    spacing = tuple(float(size) for size in header.get_zooms())
    return Sample("case", image_CS, mask_S, (0,), spacing, header)


def noise(*shape, channels=2):
    random = np.random.default_rng(0)
    return random.normal(size=(channels, *shape)), random.integers(0, 3, shape).astype(np.uint8)


def ellipsoids(*shape):
    """Three classes with smooth borders."""
    at = np.meshgrid(*(np.linspace(-1, 1, n + 2)[1:-1] for n in shape), indexing="ij")
    outer = np.sqrt(sum((x / r) ** 2 for x, r in zip(at, (0.8, 0.7, 0.9), strict=True))) < 1
    inner = np.sqrt(sum((x - 0.1) ** 2 for x in at)) < 0.5
    return outer.astype(np.uint8) + (outer & inner)


def one_hot(mask_S, classes=3):
    return torch.nn.functional.one_hot(torch.from_numpy(mask_S).long(), classes).movedim(-1, 0)


@pytest.mark.parametrize(
    "framing",
    [
        VolumeFraming(SPACING),
        VolumeFraming(SPACING, (16, 4, 9)),
        VolumeFraming((1.3, 1.3, 1.3), (4, 4, 20), body=True),
        VolumeFraming((2.5, 4.0, 1.0)),
    ],
)
def test_a_frame_is_the_same_however_the_volume_is_stored(framing):
    image_CS, mask_S = noise(11, 8, 5)
    first = framing.apply(volume(image_CS, mask_S))
    assert first.image_CS.dtype == np.float32
    assert first.mask_S.dtype == np.uint8
    for stored in STORED[1:]:
        frame = framing.apply(volume(image_CS, mask_S, stored=stored))
        np.testing.assert_array_equal(frame.image_CS, first.image_CS)
        np.testing.assert_array_equal(frame.mask_S, first.mask_S)
        np.testing.assert_array_equal(frame.body_S, first.body_S)


@pytest.mark.parametrize("stored", STORED)
def test_a_frame_at_native_spacing_is_the_volume_in_its_closest_canonical_axes(stored):
    image_CS, mask_S = noise(6, 5, 7)
    given = volume(image_CS, mask_S, stored=stored)
    frame = VolumeFraming(SPACING).apply(given)
    for channel, framed in zip(given.image_CS, frame.image_CS, strict=True):
        image = nibabel.Nifti1Image(channel, given.header.get_best_affine())
        expected = nibabel.as_closest_canonical(image)
        assert nibabel.aff2axcodes(expected.affine) == ("R", "A", "S")
        np.testing.assert_array_equal(framed, expected.get_fdata(dtype=np.float32))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("least", [(1, 1, 1), (9, 32, 8)])
def test_at_native_spacing_a_mask_comes_back_exactly(stored, least):
    image_CS, mask_S = noise(9, 6, 13)
    given = volume(image_CS, mask_S, stored=stored)
    framing = VolumeFraming(SPACING, least)
    restored = framing.restore(one_hot(framing.apply(given).mask_S), given)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, given.mask_S)


@pytest.mark.parametrize("shape", [(40, 31, 17), (23, 50, 29)])
@pytest.mark.parametrize("wanted", [(1.0, 1.0, 1.0), (1.7, 1.1, 2.9), (2.0, 4.0, 6.0)])
@pytest.mark.parametrize("least", [(1, 1, 1), (64, 32, 32)])
@pytest.mark.parametrize("stored", STORED[::13])
def test_elsewhere_a_mask_comes_back_but_for_voxels_at_borders(shape, wanted, least, stored):
    mask_S = ellipsoids(*shape)
    given = volume(mask_S[None], mask_S, stored=stored)
    framing = VolumeFraming(wanted, least)
    restored = framing.restore(one_hot(framing.apply(given).mask_S), given)
    assert restored.shape == given.native_size
    wrong = orientations.apply_orientation(restored != given.mask_S, grid._turn(given))
    # A voxel off the truth is one near which, as far as a voxel of the grid reaches, two are.
    reach = 2 * np.maximum(1, np.ceil(np.divide(wanted, SPACING)).astype(int)) + 1
    lowest = ndimage.minimum_filter(mask_S, size=tuple(reach))
    highest = ndimage.maximum_filter(mask_S, size=tuple(reach))
    assert not (wrong & (lowest == highest)).any()
    assert wrong.mean() < (0.03 if max(wanted) < 4 else 0.06)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 2), (3, 1, 40)])
@pytest.mark.parametrize("wanted", [(1.0, 1.0, 1.0), (50.0, 50.0, 50.0), SPACING])
def test_tiny_volumes_keep_at_least_a_voxel(shape, wanted):
    image_CS, mask_S = noise(*shape)
    given = volume(image_CS, mask_S)
    for framing in (VolumeFraming(wanted, body=True), VolumeFraming(wanted, (8, 8, 8), body=True)):
        frame = framing.apply(given)
        size = [
            max(least, 1, round(n * s / w))
            for least, n, s, w in zip(framing.least, shape, SPACING, wanted, strict=True)
        ]
        assert frame.image_CS.shape == (2, *size)
        assert frame.mask_S.shape == frame.body_S.shape == (*size,)
        assert np.isfinite(frame.image_CS).all()
        restored = framing.restore(one_hot(frame.mask_S), given)
        assert restored.shape == shape


def test_a_voxel_of_a_frame_lies_where_its_share_of_the_extent_does():
    # Intensity is the place in mm from the volume's outer face, along each axis in a channel.
    shape, affine = (20, 15, 9), oblique()
    places = [(np.arange(n) + 0.5) * s for n, s in zip(shape, SPACING, strict=True)]
    image_CS = np.stack(np.meshgrid(*places, indexing="ij"))
    for wanted, close in (((0.7, 0.6, 1.1), 1e-5), ((2.1, 3.7, 6.2), 0.02)):
        frame = VolumeFraming(wanted).apply(volume(image_CS, None, affine, STORED[29]))
        assert frame.mask_S is None
        for axis, (n, s, w) in enumerate(zip(shape, SPACING, wanted, strict=True)):
            m = frame.image_CS.shape[axis + 1]
            assert m == round(n * s / w)
            size = n * s / m
            expected = (np.arange(m) + 0.5) * size
            # Linear but for the ends: there is nothing outside to interpolate with.
            inner = (expected > max(size, s)) & (expected < n * s - max(size, s))
            line = np.moveaxis(frame.image_CS[axis], axis, 0)[inner]
            assert inner.sum() >= 2
            away = np.abs(line - expected[inner, None, None]).max()
            assert away < close * size


def test_a_spacing_that_a_header_rounds_is_the_native_one():
    image_CS, mask_S = noise(512, 2, 3)
    affine = np.diag([-0.9765625, 0.7, 1.2, 1])
    given = volume(image_CS, mask_S, affine)
    assert given.spacing[1] != 0.7  # as float32 it is 0.699999988
    framing = VolumeFraming((0.976562, 0.7, 1.2))
    frame = framing.apply(given)
    np.testing.assert_array_equal(frame.image_CS, given.image_CS[:, ::-1])
    np.testing.assert_array_equal(framing.restore(one_hot(frame.mask_S), given), given.mask_S)


def test_padding_is_each_channels_minimum_shared_out_to_both_ends():
    image_CS, mask_S = noise(4, 6, 7)
    mask_S += 1
    frame = VolumeFraming(SPACING, (9, 6, 8), body=True).apply(volume(image_CS, mask_S))
    assert frame.image_CS.shape == (2, 9, 6, 8)
    inside = (slice(2, 6), slice(0, 6), slice(0, 7))
    np.testing.assert_array_equal(frame.image_CS[(slice(None), *inside)], np.float32(image_CS))
    outside = np.ones((9, 6, 8), bool)
    outside[inside] = False
    for channel, framed in zip(image_CS, frame.image_CS, strict=True):
        assert (framed[outside] == np.float32(channel.min())).all()
    assert not frame.mask_S[outside].any()
    assert frame.mask_S[inside].all()
    assert not frame.body_S[outside].any()


@pytest.mark.parametrize("factor", [2, 3, 4, 0.5])
def test_resampling_moves_a_mask_to_no_side(factor):
    mask_S = np.pad(ellipsoids(24, 36, 12), 6)
    grid_ = VolumeFraming(tuple(factor * size for size in SPACING))
    frame_S = grid_.apply(volume(np.zeros((1, *mask_S.shape)), mask_S)).mask_S
    assert {*np.unique(frame_S)} == {0, 1, 2}
    flipped = volume(np.zeros((1, *mask_S.shape)), np.ascontiguousarray(mask_S[::-1, ::-1, ::-1]))
    np.testing.assert_array_equal(grid_.apply(flipped).mask_S, frame_S[::-1, ::-1, ::-1])


@pytest.mark.parametrize("axis", range(3))
def test_shrinking_a_volume_averages_instead_of_picking_voxels(axis):
    shape = (33, 30, 27)
    stripes_S = np.indices(shape)[axis] % 2
    wanted = np.array(SPACING)
    wanted[axis] *= 3  # every third voxel's middle is a voxel's, which is 0 or 1
    frame = VolumeFraming(tuple(wanted)).apply(volume(stripes_S[None], None))
    assert frame.image_CS.shape[axis + 1] == shape[axis] // 3
    np.testing.assert_allclose(frame.image_CS, 0.5, atol=0.08)


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that is made, other than views of `given`."""

    def __init__(self, given):
        super().__init__()
        self.given, self.largest = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if tensor.untyped_storage().data_ptr() != self.given:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_restoring_goes_by_slabs_that_bound_its_memory_and_change_nothing(monkeypatch):
    mask_S = ellipsoids(40, 30, 20)
    given = volume(mask_S[None], mask_S, stored=STORED[29])
    for wanted in ((0.4, 2.0, 2.0), (2.3, 1.5, 3.0), (1.0, 0.8, 5.0)):
        framing = VolumeFraming(wanted, (32, 32, 32))
        logits_KS = torch.randn(3, *framing.apply(given).mask_S.shape)
        whole = framing.restore(logits_KS, given)
        monkeypatch.setattr(grid, "_SLAB", 6000)
        with LargestTensor(logits_KS) as made:
            np.testing.assert_array_equal(framing.restore(logits_KS, given), whole)
        assert made.largest <= 6000 < whole.size
        monkeypatch.undo()


def test_what_cannot_be_framed_or_restored_is_refused():
    image_CS, mask_S = noise(6, 5, 7)
    given = volume(image_CS, mask_S)
    with pytest.raises(ValueError, match=r"got shape \(3, 6, 5, 7\), expected \(K, 8, 5, 7\)"):
        VolumeFraming(SPACING, (8, 1, 1)).restore(torch.zeros(3, 6, 5, 7), given)
    with pytest.raises(ValueError, match="case: expected a volume with a NIfTI header"):
        VolumeFraming(SPACING).apply(Sample("case", image_CS, mask_S, (0,), SPACING))
    for options in (
        {"spacing": (1.0, 0.0, 1.0)},
        {"spacing": (1.0, np.inf, 1.0)},
        {"spacing": (1.0, 1.0)},
        {"spacing": SPACING, "least": (1, 0, 1)},
    ):
        with pytest.raises(ValueError, match="three sizes above 0"):
            VolumeFraming(**options)


def torso():
    """A CT in [0, 1]: trunk with lungs, an arm beside it; a couch, and specks of noise."""
    x, y, z = np.meshgrid(
        np.linspace(-1, 1, 64), np.linspace(-1, 1, 48), np.linspace(-1, 1, 20), indexing="ij"
    )
    trunk = (x / 0.6) ** 2 + (y / 0.6) ** 2 < 1
    lung = ((np.abs(x) - 0.25) / 0.15) ** 2 + (y / 0.3) ** 2 < 1
    arm = ((x - 0.8) / 0.14) ** 2 + (y / 0.2) ** 2 + 0 * z < 1
    image_S = 0.45 * (trunk & ~lung) + 0.45 * arm
    image_S[20:44, 2:3] = 0.3  # a couch behind
    image_S[3, 40, ::3] = 0.9
    return image_S, trunk | arm


def test_the_body_of_a_ct_has_lungs_and_arms_but_no_couch():
    image_S, body_S = torso()
    np.testing.assert_array_equal(find_body(image_S[None]), body_S)
    hounsfield_S = np.where(image_S > 0, 425 * image_S - 175, -1000)
    np.testing.assert_array_equal(find_body(hounsfield_S[None]), body_S)


def test_the_body_of_an_mr_is_found_above_noise_and_in_any_channel():
    random = np.random.default_rng(0)
    x, y, z = np.meshgrid(*3 * [np.linspace(-1, 1, 40)], indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    head = radius < 0.7
    signal = np.where(head, 100.0, 0) * (radius > 0.2)  # a ventricle without signal
    signal = np.abs(signal + random.normal(size=signal.shape))
    image_S = (signal - signal.mean()) / signal.std()
    np.testing.assert_array_equal(find_body(image_S[None]), head)
    halves = np.stack([np.where(x < 0, signal, 0), np.where(x < 0, 0, signal)])
    np.testing.assert_array_equal(find_body(halves), head)


@pytest.mark.parametrize("voxels", [0, 1, 100])
def test_where_the_rule_finds_next_to_nothing_all_is_body(voxels):
    image_S = np.zeros((20, 20, 20))
    image_S[10].flat[:voxels] = 1
    assert find_body(image_S[None]).all()
    image_S[10] = 1  # a plane of twenty, which is more than 2 %
    np.testing.assert_array_equal(find_body(image_S[None]), image_S == 1)
