"""The MNI152 slices are what they say: blocks held out, and no image shows its protocol."""

import numpy as np
import pytest

from reference_models.data import DataSettings, open_dataset
from reference_models.data.mni152 import GAP_SLICES, TRAIN_SHARES, _axial_slices


@pytest.fixture(scope="module", params=["middle", "upper"])
def mni152(request):
    return open_dataset(DataSettings("mni152", mni152=request.param))


def slices(dataset, split):
    return {
        int(case.subject.removeprefix("slice")) for case in dataset.cases if case.split == split
    }


def test_mni152_holds_out_blocks_of_slices_with_a_gap_on_either_side(mni152):
    train, validation, test = (slices(mni152, s) for s in ("train", "validation", "test"))
    for block, others in ((test, train | validation), (validation, train | test)):
        assert sorted(block) == list(range(min(block), max(block) + 1))
        assert min(abs(a - b) for a in others for b in block) > GAP_SLICES
    assert min(train) < min(test) < max(train)


def test_mni152_training_is_imbalanced_as_stated_and_the_rest_is_balanced(mni152):
    counts = {
        split: np.bincount([c.attributes[0] for c in mni152.cases if c.split == split])
        for split in ("train", "validation", "test")
    }
    np.testing.assert_allclose(counts["train"] / counts["train"].sum(), TRAIN_SHARES)
    assert TRAIN_SHARES == (0.7, 0.2, 0.1)
    assert mni152.population == {"protocol": TRAIN_SHARES}
    assert counts["validation"].tolist() == [8] * 3
    assert counts["test"].tolist() == [24] * 3
    assert len({case.case_id for case in mni152.cases}) == len(mni152.cases)


def test_mni152_images_do_not_show_the_protocol_and_masks_follow_it(mni152):
    for subject in ("slice030", "slice080", "slice112"):
        samples = {
            sample.attributes[0]: sample
            for sample in map(mni152.load, (c for c in mni152.cases if c.subject == subject))
        }
        brain, grey, white = (samples[a].mask_S for a in range(3))
        assert all((s.image_CS == samples[0].image_CS).all() for s in samples.values())
        np.testing.assert_array_equal(brain, grey + white)
        assert grey.any()
        assert white.any()
        assert samples[0].image_CS.shape == (1, 96, 96)
        assert samples[0].spacing == (2.0, 2.0)


def test_mni152_normalised_over_the_head_has_one_scale_for_all_slices():
    dataset = open_dataset(DataSettings("mni152", mni152_normalised="head"))
    image_ZHW, _ = _axial_slices("head")
    background = image_ZHW.min()  # 0 in the template
    inside = image_ZHW[image_ZHW > background]
    assert (inside.mean(), inside.var()) == pytest.approx((0, 1), abs=1e-5)
    by_slice = open_dataset(DataSettings("mni152"))
    for case in dataset.cases[::70]:
        image_HW = dataset.load(case).image_CS[0]
        assert image_HW.min() == np.float32(background)
        inside = image_HW[image_HW > image_HW.min()]
        alone_HW = (image_HW - inside.mean()) / inside.std()
        np.testing.assert_allclose(by_slice.load(case).image_CS[0], alone_HW, atol=1e-4)
