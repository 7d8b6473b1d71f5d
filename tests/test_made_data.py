"""Data that is made rather than read: the phantom and the MNI152 slices are what they say."""

from dataclasses import replace

import numpy as np
import pytest

from reference_models.data import PhantomSettings
from reference_models.data.mni152 import GAP_SLICES, TRAIN_SHARES, Mni152
from reference_models.data.phantom import Phantom


def test_phantom_keeps_its_shares_and_hides_or_shows_the_attribute():
    shares = (0.06, 0.47, 0.39, 0.08)
    rule, looks = (
        Phantom(PhantomSettings(effect=effect, shares=shares, cases=100, test_cases_per_group=5))
        for effect in ("rule", "appearance")
    )
    of_split = {
        split: [case.attributes[0] for case in rule.cases if case.split == split]
        for split in ("train", "test")
    }
    assert np.bincount(of_split["train"]).tolist() == [6, 47, 39, 8]
    assert np.bincount(of_split["test"]).tolist() == [5] * 4
    case = rule.cases[0]
    here, again, other = (rule.load(replace(case, attributes=(a,))) for a in (0, 0, 3))
    assert (here.image_CS == again.image_CS).all()
    assert (here.image_CS == other.image_CS).all()
    assert (here.mask_S == 2).sum() < 0.6 * (other.mask_S == 2).sum()
    here, other = (looks.load(replace(case, attributes=(a,))) for a in (0, 3))
    assert (here.mask_S == other.mask_S).all()
    lesion = here.mask_S == 2
    organ = here.mask_S == 1
    for attribute, sign in enumerate((1, -1, 1, -1)):
        image = looks.load(replace(case, attributes=(attribute,))).image_CS[0]
        assert sign * (image[lesion].mean() - image[organ].mean()) > 0.03


@pytest.fixture(scope="module")
def mni152():
    return Mni152()


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
