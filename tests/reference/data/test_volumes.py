"""Volumes in validation, evaluation and prediction: windows, masks, pictures, scores in mm."""

import dataclasses
import itertools
import json
import weakref
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from nibabel import orientations
from nibabel.nifti1 import Nifti1Extension
from PIL import Image
from torch import nn

from dmoe_layer import DMoE, routing
from reference_models.data import DataSettings
from reference_models.data.cases import Attribute, Sample
from reference_models.data.loading import Batch
from reference_models.data.nifti import Nifti
from reference_models.data.splits import Splits
from reference_models.errors import DataError
from reference_models.evaluation import evaluate as evaluation
from reference_models.evaluation import prediction
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
    EvaluateRun,
    Scoring,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.masks import find_masks, read_mask, write_mask
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.metrics.loads import Loads
from reference_models.models.inference import infer
from reference_models.recipes.framings import VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings
from reference_models.recipes.recipe import Recipe
from reference_models.report.pictures import GAP, Picture
from reference_models.training.runs import Task
from reference_models.training.validation import validate

FRAME = VolumeFramingSettings(spacing=(1.0, 1.0, 1.0), patch=(32, 32, 32))
CPU = torch.device("cpu")
FEW = Scoring(resamples=100, tolerance=1.0)
STAGED = SimpleNamespace(
    attributes=(Attribute("stage", ("T1", "T2", "T3")),), regions={"plate": (1,)}
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Local(nn.Module):
    """A voxel's answer depends on what lies up to 2 voxels away, and on its sample's attribute."""

    def __init__(self, norm=False):
        super().__init__()
        self.before = nn.Conv3d(1, 4, 3, padding=1)
        self.layer = DMoE(4, n_experts=4, channel_dim=1, attribute_sizes=3, residual=True)
        self.after = nn.Conv3d(4, 2, 3, padding=1)
        self.norm = nn.InstanceNorm3d(4, affine=True) if norm else nn.Identity()
        self.eval()

    def forward(self, image_BCS):
        return self.after(self.norm(self.layer(self.before(image_BCS))).relu())


class Told(nn.Module):
    """Answers every voxel with its sample's attribute; experts see the body alone."""

    def __init__(self):
        super().__init__()
        self.layer = DMoE(1, n_experts=4, k=1, channel_dim=1, attribute_sizes=3).eval()
        self.routed, self.bodies = [], []

    def forward(self, image_B1S, body_BS=None):
        inside = torch.ones_like(image_B1S[:, 0], dtype=torch.bool) if body_BS is None else body_BS
        self.bodies.append(inside)
        _, everywhere = self.layer(image_B1S, return_routing=True)
        told_BS = everywhere.attributes.reshape(image_B1S[:, 0].shape)
        with routing(told_BS[:, 0, 0, 0]) as scope:
            self.layer(image_B1S, mask=inside)
        self.routed += scope.routings
        return torch.stack([told_BS, told_BS + 1], 1).float()


def noise(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def answered(model, *inputs, told=((0,), (2,)), frame=FRAME, windows=3, loads=None):
    with torch.no_grad():
        return infer(
            model,
            inputs,
            torch.tensor(told),
            windows=frame.windows(windows),
            device=CPU,
            observe=None if loads is None else loads.add,
        )


@pytest.mark.parametrize("windows", [1, 3])
def test_windows_give_the_whole_volumes_answer_where_none_cuts_a_neighbourhood(windows):
    model, image = Local(), noise(2, 1, 56, 40, 32)
    told = torch.tensor([[0], [2]])
    with torch.no_grad(), routing(told):
        whole = model(image)
    windowed = answered(model, image, windows=windows)
    # Windows of 32 begin at 0, 16 and 24, at 0 and 8, and at 0: at their ends inside of the volume
    # they do not see 2 voxels further.
    safe = torch.zeros(56, 40, 32, dtype=torch.bool)
    cut = [*range(14, 18), *range(22, 26), *range(30, 34), *range(46, 50)]
    free = [torch.tensor([i for i in range(56) if i not in cut])]
    free += [torch.tensor([i for i in range(40) if i not in (6, 7, 8, 9, 30, 31, 32, 33)])]
    safe[free[0][:, None], free[1][None]] = True
    torch.testing.assert_close(windowed[:, :, safe], whole[:, :, safe], atol=1e-5, rtol=1e-5)
    assert (windowed - whole)[:, :, ~safe].abs().max() > 1e-3


def test_a_patch_that_holds_the_volume_gives_the_whole_volumes_answer_of_any_network():
    model, image = Local(norm=True), noise(2, 1, 32, 32, 32)
    with torch.no_grad(), routing(torch.tensor([[0], [2]])):
        whole = model(image)
    torch.testing.assert_close(answered(model, image), whole, atol=1e-6, rtol=1e-6)
    smaller = dataclasses.replace(FRAME, patch=(32, 32, 16))
    assert (answered(model, image, frame=smaller) - whole).abs().max() > 1e-3


def test_where_windows_disagree_the_one_whose_middle_is_nearer_weighs_more():
    class Mean(nn.Module):
        def forward(self, image_BCS):
            return torch.zeros_like(image_BCS) + image_BCS.mean((2, 3, 4), keepdim=True)

    image = torch.zeros(1, 1, 48, 32, 32)
    image[:, :, 32:] = 1  # seen by the second window alone, as one half of it
    blended = answered(Mean(), image, told=[[0]])[0, 0, :, 16, 16]
    assert blended[:16].abs().max() < 1e-6
    torch.testing.assert_close(blended[32:], torch.full((16,), 0.5))
    between = blended[16:32]
    assert (between.diff() > 0).all()
    torch.testing.assert_close(between + between.flip(0), torch.full((16,), 0.5))
    assert between[0] < 0.01


@pytest.mark.parametrize("windows", [1, 2, 5])
def test_every_window_is_told_its_own_samples_attribute(windows):
    # Of 3 windows a sample, so that some batches are of both samples.
    logits = answered(Told(), noise(3, 1, 64, 32, 32), told=[[2], [0], [1]], windows=windows)
    for sample, value in zip(logits, (2.0, 0.0, 1.0), strict=True):
        torch.testing.assert_close(sample[0], torch.full((64, 32, 32), value))


def test_a_volume_smaller_than_the_patch_is_not_padded_with_what_is_no_air():
    with pytest.raises(ValueError, match=r"got volumes of \(32, 31, 40\), expected at least"):
        answered(Told(), noise(2, 1, 32, 31, 40))


def test_the_body_is_cut_as_the_image_is():
    class Both(nn.Module):
        def forward(self, image_B1S, body_BS):
            assert body_BS.dtype == torch.bool
            return image_B1S - body_BS[:, None].float()

    body = noise(2, 40, 48, 32) > 0.3
    assert not answered(Both(), body[:, None].float(), body).any()


def test_loads_are_shares_of_all_windows_tokens_inside_the_body():
    class Inside(Told):
        def forward(self, image_B1S, body_BS):
            with torch.no_grad():
                y, routed = self.layer(image_B1S, mask=body_BS, return_routing=True)
            self.routed.append(routed)
            return torch.cat([y, -y], 1)

    # One sample all of whose body lies in the first of three windows, one with a body everywhere.
    body = torch.ones(2, 64, 32, 32, dtype=torch.bool)
    body[0, 5:] = False
    model, image = Inside(), noise(2, 1, 64, 32, 32, seed=1)
    image[0] += 2  # so that the windows' own shares differ
    tables = []
    for windows in (1, 4):
        loads = Loads(STAGED)
        answered(model, image, body, told=[[1], [1]], windows=windows, loads=loads)
        tables.append(loads.tables()["stage"])
    chosen = torch.cat([routed.expert_indices for routed in model.routed[:6]]).flatten()
    assert len(chosen) == 5 * 32 * 32 + 3 * 32**3
    shares = (torch.bincount(chosen, minlength=4) / len(chosen)).tolist()
    for table in tables:
        assert table[1] == pytest.approx(shares, abs=1e-6)
        assert table[0] == table[2] == (0, 0, 0, 0)


def test_no_routing_outlives_its_window_batch():
    alive, most = weakref.WeakSet(), []

    class Watched(Local):
        def forward(self, image_BCS):
            most.append(len(alive))
            y, routed = self.layer(self.before(image_BCS), return_routing=True)
            for tensor in (routed.logits, routed.expert_indices):
                alive.add(tensor)
            return self.after(y)

    answered(Watched(), noise(2, 1, 64, 48, 32), loads=Loads(STAGED), windows=2)
    assert len(most) == 6
    assert set(most) == {0}


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
def test_a_nifti_mask_has_its_images_place_and_type_and_comes_back_exactly(tmp_path, options):
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
    assert written.header.get_data_dtype() == image.header.get_data_dtype()
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
    paths, faults = find_masks(tmp_path, ids, axes=3)
    assert faults == []
    assert [paths[i].name for i in ids] == [
        "1.2.840.1.nii.gz", "1.2.840.nii", "c.nii.nii.gz", "D.NII.GZ",
    ]  # fmt: skip
    (tmp_path / "1.2.840.nii.gz").touch()
    (tmp_path / "stranger.nii").touch()
    (tmp_path / "D.NII.GZ").unlink()
    assert find_masks(tmp_path, ids, axes=3)[1] == [
        "1.2.840.nii and 1.2.840.nii.gz: two masks of one case; keep one.",
        "1 of 4 cases have no mask (<case id>.nii.gz or <case id>.nii): D.",
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
        "size.nii.gz": r"got size \(6, 5, 6\), expected the image's, \(7, 5, 6\)",
        "time.nii.gz": "has 4 dimensions",
        "grey.nii.gz": "got label 80, 160, expected labels, not grey levels: 0 air, 1 organ",
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


# Pictures.


def stored_as(axes, spacing, array_S):
    """An RAS+ array as stored with other axes, and its affine."""
    there = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axes)
    )
    affine = np.diag([*spacing, 1.0]) @ orientations.inv_ornt_aff(there, array_S.shape)
    return np.ascontiguousarray(orientations.apply_orientation(array_S, there)), affine


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
    assert not alone.truth_HW.any()
    empty = Picture.of("a", image_CS, np.zeros_like(truth), predicted, affine)
    np.testing.assert_array_equal(alone.predicted_HW, empty.predicted_HW)
    assert (alone.predicted_HW == 1).sum() > 16
    nothing = Picture.of("a", image_CS, None, np.zeros_like(truth), affine)
    middle = image_CS[0, ::-1, ::-1, ::-1][:, :, 4].T  # the 5th of 8 from above
    low, high = nothing.image_HW3[..., 0].min(), nothing.image_HW3[..., 0].max()
    assert (low, high) == (0, 255)
    assert np.corrcoef(middle.ravel(), nothing.image_HW3[:24, :20, 0].ravel())[0, 1] > 0.999


# A trained run's own way, from files to files.


class Threshold(nn.Module):
    """Class 1 where the image is above 0.5; experts route, to no effect."""

    def __init__(self, sizes):
        super().__init__()
        self.layer = DMoE(
            1, n_experts=2, k=1, channel_dim=1, attribute_sizes=sizes, unknown="average"
        ).eval()
        self.batches = []

    def forward(self, image_BCS):
        self.batches.append(len(image_BCS))
        return torch.cat([0.5 - image_BCS, image_BCS - 0.5], 1) + 0 * self.layer(image_BCS)


# A plate across the axis from left to right, back to front or below to above, found one voxel
# further along it, and how the file stores the axes.
PLATES = {"a.1": (0, "LPS"), "b": (1, "SAR"), "c": (2, "AIL")}
SPACING = (0.5, 1.5, 4.0)


@pytest.fixture
def folder(tmp_path):
    """Three volumes with a plate each, stored each its own way, and a fourth without a label."""
    root = tmp_path / "data"
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (root / name).mkdir(parents=True)
    rows = ["case,stage"]
    for number, (case, (axis, axes)) in enumerate(PLATES.items()):
        truth, found = np.zeros((2, 24, 20, 36), np.int16)
        plate = [slice(5, 9)] * 3
        plate[axis] = slice(10, 11)
        truth[tuple(plate)] = 1
        plate[axis] = slice(11, 12)
        found[tuple(plate)] = 1
        for name, array in ((f"imagesTr/{case}_0000", found), (f"labelsTr/{case}", truth)):
            stored, affine = stored_as(axes, SPACING, array)
            nibabel.save(nibabel.Nifti1Image(stored, affine), root / f"{name}.nii.gz")
        rows.append(f"{case},T{number + 1}")
    nibabel.save(nibabel.Nifti1Image(stored * 0, affine), root / "imagesTs/new_0000.nii.gz")
    (root / "attributes.csv").write_text("\n".join([*rows, "new,T1"]) + "\n", encoding="utf-8")
    layout = {"channel_names": {"0": "noNorm"}, "labels": {"background": 0, "plate": 1}}
    (root / "dataset.json").write_text(
        json.dumps({**layout, "file_ending": ".nii.gz"}), encoding="utf-8"
    )
    return root


@pytest.fixture
def run_of(folder, tmp_path, monkeypatch):
    """Puts a network in the place of a trained run; returns the run's folder, and its network."""

    def place(model=None, test=(*PLATES,)):
        dataset = Nifti(folder, (), None)
        recipe = Recipe(
            data=DataSettings("nifti", root=folder),
            model=ResUNet3DSettings(),
            framing=VolumeFramingSettings(spacing=SPACING, patch=(32, 32, 32)),
            batch_size=2,
        )
        model = model or Threshold(3)
        loaded = (recipe, Task.of(dataset), model)
        monkeypatch.setattr(prediction, "load_model", lambda run, which, **_: loaded)
        splits = Splits("nifti", 0, (), (), test)
        monkeypatch.setattr(prediction, "read_splits", lambda path, dataset: splits)
        monkeypatch.setattr(evaluation, "choose_splits", lambda dataset, path, seed: splits)
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        return run, model

    return place


def test_volumes_are_scored_in_mm_by_a_run_and_by_its_files_alike(run_of, folder, tmp_path):
    run, _ = run_of()
    own = evaluate_run(EvaluateRun(run, scoring=FEW))
    masks = run / "evaluation-test" / "masks"
    assert sorted(path.name for path in masks.iterdir()) == ["a.1.nii.gz", "b.nii.gz", "c.nii.gz"]
    again = evaluate_predictions(
        EvaluatePredictions(
            masks, DataSettings("nifti", root=folder), out=tmp_path / "again", scoring=FEW
        )
    )
    assert again.conditions[0].scores == own.conditions[0].scores
    (region,) = own.conditions[0].scores["stage"]
    # Each voxel of a plate is one voxel across from the other plate.
    assert [group.metrics["hd95"].value for group in region.groups] == pytest.approx(SPACING)
    assert [group.metrics["dice"].value for group in region.groups] == [0, 0, 0]
    # Within 1 mm is the first alone.
    assert [group.metrics["surface_dice"].value for group in region.groups] == [1, 0, 0]
    assert own.unit == "mm"
    assert [row.count(0) for row in own.conditions[0].load["stage"]] != [2, 2, 2]
    for out in (run / "evaluation-test", tmp_path / "again"):
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "axial, coronal and sagittal" in page
        assert "millimetres" in page


def test_predicted_masks_lie_where_their_images_do_and_need_no_label(run_of, folder):
    run, _ = run_of()
    out = predict(PredictSettings(run, split="all"))
    assert sorted(path.name for path in (out / "overlays").iterdir()) == [
        "a.1.png", "b.png", "c.png", "new.png",
    ]  # fmt: skip
    for case in PLATES:
        image = nibabel.load(folder / f"imagesTr/{case}_0000.nii.gz")
        mask = nibabel.load(out / "masks" / f"{case}.nii.gz")
        np.testing.assert_array_equal(mask.affine, image.affine)
        assert mask.get_data_dtype() == image.get_data_dtype()
        np.testing.assert_array_equal(mask.get_fdata(), image.get_fdata())
    assert not nibabel.load(out / "masks" / "new.nii.gz").get_fdata().any()


def test_every_volume_is_told_its_own_attribute(run_of):
    told = []

    class Listening(Threshold):
        def forward(self, image_BCS):
            _, routed = self.layer(image_BCS, return_routing=True)
            told.append(routed.attributes.unique().tolist())
            return super().forward(image_BCS)

    run, _ = run_of(Listening(3))
    predict(PredictSettings(run))
    assert [values for values, _ in itertools.groupby(told)] == [[0], [1], [2]]


def test_what_other_data_cannot_be_is_said_in_one_line(run_of, folder):
    run, _ = run_of()
    path = folder / "imagesTr/b_0000.nii.gz"
    image = nibabel.load(path)
    metres = nibabel.affines.from_matvec(image.affine[:3, :3] * 1000)
    for name in ("imagesTr/b_0000.nii.gz", "labelsTr/b.nii.gz"):
        voxels = np.asarray(nibabel.load(folder / name).dataobj)
        nibabel.save(nibabel.Nifti1Image(voxels, metres), folder / name)
    with pytest.raises(DataError, match=r"b: its .* voxels of .* mm would become .* not in mm"):
        predict(PredictSettings(run, split="all"))
    # By the channel's name it is known how a volume's intensities are scaled.
    layout = folder / "dataset.json"
    layout.write_text(layout.read_text(encoding="utf-8").replace("noNorm", "CT"), encoding="utf-8")
    with pytest.raises(DataError, match=r"was trained for .*noNorm.*, but the data are .*CT"):
        predict(PredictSettings(run, split="all"))


def test_a_case_without_a_label_is_never_scored(run_of, folder, tmp_path):
    run, _ = run_of(test=("a.1", "new"))
    words = r"test: 1 cases have no mask to be scored by \(new\); take them out of the splits file"
    with pytest.raises(DataError, match=words):
        evaluate_run(EvaluateRun(run, scoring=FEW))
    settings = EvaluatePredictions(
        folder / "labelsTr", DataSettings("nifti", root=folder), out=tmp_path / "out", scoring=FEW
    )
    with pytest.raises(DataError, match=words):
        evaluate_predictions(settings)
    assert [*run.iterdir()] == []


def test_another_tools_masks_of_volumes_are_nifti(run_of, folder, tmp_path):
    run_of()
    settings = EvaluatePredictions(
        folder / "labelsTr", DataSettings("nifti", root=folder), out=tmp_path / "out", scoring=FEW
    )
    assert dice_of(evaluate_predictions(settings)) == [1, 1, 1]
    # A mask that is turned, but not as its image, has the right size and the wrong place.
    path = folder / "labelsTr" / "b.nii.gz"
    image = nibabel.load(path)
    affine = image.affine @ np.diag([1.0, -1.0, 1.0, 1.0])
    other = tmp_path / "other"
    other.mkdir()
    for case in ("a.1", "c"):
        (other / f"{case}.nii.gz").write_bytes((folder / f"labelsTr/{case}.nii.gz").read_bytes())
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), affine), other / "b.nii.gz")
    np.save(other / "b.npy", np.zeros((1,)))  # a tool's scores, say
    with pytest.raises(DataError, match=r"b\.nii\.gz: lies elsewhere") as caught:
        evaluate_predictions(dataclasses.replace(settings, folder=other))
    assert len(str(caught.value).splitlines()) == 2


def dice_of(summary):
    (region,) = summary.conditions[0].scores["stage"]
    return [group.metrics["dice"].value for group in region.groups]


@pytest.mark.parametrize(("given", "most"), [(None, 2), (1, 1)])
def test_windows_at_a_time_are_the_runs_batch_or_what_is_asked_for(run_of, given, most):
    run, model = run_of()
    predict(PredictSettings(run, batch_size=given))
    # Frames of 32 x 32 x 36 are two windows each.
    assert model.batches == [most] * (6 // most)


def test_a_volume_without_finite_answer_is_named(run_of):
    class Broken(Threshold):
        def forward(self, image_BCS):
            logits = super().forward(image_BCS)
            logits[0, 1, 3, 2, 1] = float("nan")
            return logits

    run, _ = run_of(Broken(3))
    with pytest.raises(DataError, match=r"output for a\.1 is not finite"):
        predict(PredictSettings(run))
    assert [*run.iterdir()] == []


def test_validation_scores_volumes_window_by_window():
    batches = []
    for number in range(3):
        mask = torch.zeros(1, 48, 40, 32, dtype=torch.int64)
        mask[0, 10:12, 10:12, 10:12] = 1
        image = mask.roll(int(number > 0), 1 + number)[
            :, None
        ].float()  # half of it missed, but for T1
        batches.append(Batch(image, mask, torch.tensor([[number]]), (f"case{number}",)))
    model = Threshold(3)
    affine = np.diag([1.0, 2.0, 1.0, 1.0])
    found = validate(model, batches, STAGED, CPU, windows=FRAME.windows(4), affine=affine)
    assert found.dice == pytest.approx({"stage=T1": 1, "stage=T2": 0.5, "stage=T3": 0.5})
    assert found.score == pytest.approx(2 / 3)
    assert np.sum(found.load["stage"], 1) == pytest.approx([1, 1, 1])
    # Spacing of the frame: axial is 48 x 80 pixels, coronal 48 x 32, sagittal 80 x 32.
    assert [picture.truth_HW.shape for picture in found.examples] == [
        (80, 48 + GAP + 48 + GAP + 80)
    ] * 3
    assert model.batches == [4] * 3
