"""The phantom is what it says: its shares, its rules and what its images show."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from reference_models.data import DataSettings, PhantomSettings, open_dataset
from reference_models.data.phantom import Phantom
from reference_models.data.splits import make_splits
from reference_models.errors import DataError


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


@pytest.mark.parametrize(
    ("effect", "digest"),
    [
        ("rule", "284005443ebf0165b2b0b6452a500d9f722ebc2b0375c8bdc39b583d7be6dc5c"),
        ("appearance", "08a0614b392f138ebbf5124e28d8c0ae360572ed7d7613875cbb9bbe274a653c"),
    ],
)
def test_phantom_stays_what_it_was_when_published_numbers_were_made_of_it(effect, digest):
    phantom = Phantom(
        PhantomSettings(effect, cases=30, test_cases_per_group=2, image_size=32, seed=3)
    )
    found = hashlib.sha256()
    for case in phantom.cases:
        sample = phantom.load(case)
        words = (case.case_id, case.subject, case.attributes, case.split, case.stratum)
        found.update(" ".join(map(str, words)).encode())
        found.update(sample.image_CS.tobytes() + sample.mask_S.tobytes())
    assert found.hexdigest() == digest


def small(effect, rule="margin", **others):
    settings = {"cases": 40, "test_cases_per_group": 3, "image_size": 32} | others
    return Phantom(PhantomSettings(effect, rule, **settings))


def counted(phantom, split):
    return Counter(case.attributes for case in phantom.cases if case.split == split)


def told(phantom, case, *values):
    return phantom.load(replace(case, attributes=values))


@pytest.mark.parametrize("rule", ["margin", "direction"])
def test_phantom_without_effect_is_the_same_whatever_the_attribute(rule):
    phantom = small("none", rule)
    for case in phantom.cases[:3]:
        first, *others = (told(phantom, case, site) for site in range(3))
        assert (first.mask_S == 2).any()
        for other in others:
            assert (first.image_CS == other.image_CS).all()
            assert (first.mask_S == other.mask_S).all()
    assert phantom.population == {"site": (0.7, 0.2, 0.1)}


@pytest.mark.parametrize("effect", ["rule", "two"])
@pytest.mark.parametrize("rule", ["margin", "direction"])
@pytest.mark.parametrize("sites", [2, 3, 5])
def test_no_image_shows_a_rule_and_every_mask_follows_it_inside_of_the_organ(effect, rule, sites):
    phantom = small(effect, rule, shares=(1 / sites,) * sites)
    values = sorted(counted(phantom, "test"))
    for case in phantom.cases[::8]:
        samples = {value: told(phantom, case, *value) for value in values}
        organ = samples[values[0]].mask_S > 0
        assert not organ[[0, -1]].any()
        assert not organ[:, [0, -1]].any()
        for sample in samples.values():
            assert (sample.image_CS == samples[values[0]].image_CS).all()
            assert ((sample.mask_S > 0) == organ).all()  # no outline leaves the organ
            assert (sample.mask_S == 1).any()
            assert (sample.mask_S == 2).any()
        assert any((samples[values[0]].mask_S != other.mask_S).any() for other in samples.values())


@pytest.mark.parametrize("sites", [2, 3, 4])
def test_by_direction_every_site_outlines_another_half_of_the_same_lesion(sites):
    phantom = small("rule", "direction", shares=(1 / sites,) * sites, image_size=64)
    whole = small("none", image_size=64)
    for case in phantom.cases[:4]:
        lesion = told(whole, case, 0).mask_S == 2
        y0, x0 = np.argwhere(lesion).mean(0)
        halves = [told(phantom, case, site).mask_S == 2 for site in range(sites)]
        for site, half in enumerate(halves):
            assert not (half & ~lesion).any()
            assert half.sum() == pytest.approx(lesion.sum() / 2, rel=0.15)
            y, x = np.argwhere(half).mean(0) - (y0, x0)
            off = np.angle(np.exp(1j * (np.arctan2(y, x) - 2 * np.pi * site / sites)))
            assert abs(off) < np.pi / 6  # an ellipse's half need not have its middle straight ahead
        assert (np.logical_or.reduce(halves) == lesion).all()


def test_of_two_attributes_each_contributes_to_the_outline():
    margin = small("two", image_size=64)
    direction = small("two", "direction", image_size=64)
    rule = small("rule", image_size=64)
    for case in margin.cases[:4]:
        area = {
            (s, p): int((told(margin, case, s, p).mask_S == 2).sum())
            for s in range(3)
            for p in range(2)
        }
        # A protocol is worth as much as the whole way from the first site to the last.
        steps = ((0, 0),), ((1, 0),), ((2, 0), (0, 1)), ((1, 1),), ((2, 1),)
        assert [{area[values] for values in step} for step in steps] == sorted(
            ({a} for a in set(area.values())), key=min
        )
        ends = [int((told(rule, case, site).mask_S == 2).sum()) for site in (0, 2)]
        assert [area[0, 0], area[2, 1]] == ends
        for site in range(3):
            near, far = (told(direction, case, site, p).mask_S == 2 for p in range(2))
            assert not (near & ~far).any()
            assert near.sum() < 0.5 * far.sum()


@pytest.mark.parametrize("sites", [2, 3, 4, 7])
def test_some_combinations_are_in_the_test_set_alone_and_every_value_is_learned_from(sites):
    shares = (0.3, *[0.7 / (sites - 1)] * (sites - 1))
    phantom = small("two", shares=shares, cases=200, validation_cases_per_group=4)
    seen = counted(phantom, "train")
    every = {(site, protocol) for site in range(sites) for protocol in range(2)}
    assert counted(phantom, "test") == dict.fromkeys(every, 3)
    assert counted(phantom, "validation") == dict.fromkeys(seen, 4)
    assert len(seen) == len(every) - (sites - 1)
    assert {(0, 0), (0, 1)} < set(seen)
    # Every other site has one protocol, in turn the first and the second.
    assert [pair for pair in sorted(seen) if pair[0]] == [(s, (s + 1) % 2) for s in range(1, sites)]
    assert seen[0, 0] == pytest.approx(0.7 * 0.3 * 200, abs=1)
    for site, share in enumerate(shares):
        count = sum(n for (s, _), n in seen.items() if s == site)
        assert count == pytest.approx(share * 200, abs=1)
    assert phantom.population["site"] == shares
    for protocol, share in enumerate(phantom.population["protocol"]):
        count = sum(n for (_, p), n in seen.items() if p == protocol)
        assert count == pytest.approx(share * 200, abs=sites)
    assert sum(phantom.population["protocol"]) == pytest.approx(1)
    assert all(case.stratum == case.attributes[0] for case in phantom.cases)
    assert [attribute.name for attribute in phantom.attributes] == ["site", "protocol"]
    assert [len(attribute.values) for attribute in phantom.attributes] == [sites, 2]


def test_without_validation_cases_of_its_own_they_are_carved_from_training():
    carved, own = small("two", cases=100), small("two", cases=100, validation_cases_per_group=5)
    splits = make_splits(carved, 0)
    assert len(splits.train) + len(splits.validation) == 100
    assert len(splits.validation) == 10
    splits = make_splits(own, 0)
    assert len(splits.train) == 100
    assert len(splits.validation) == 5 * 4
    assert len(splits.test) == 3 * 6


def test_a_phantom_that_cannot_be_made_says_why():
    for change, words in (
        (
            {"effect": "three"},
            "phantom.effect: got three, expected one of rule, appearance, none, two",
        ),
        ({"rule": "size"}, "phantom.rule: got size, expected one of margin, direction"),
        (
            {"effect": "two", "shares": (1.0,)},
            r"phantom.shares: got \(1.0,\), expected two sites or more",
        ),
        ({"effect": "two", "cases": 4}, r"got \[2, 1, 1, 0\] training cases"),
        ({"validation_cases_per_group": -1}, "-1 validation"),
        ({"test_cases_per_group": 0}, "0 test cases"),
        ({"cases": 4}, r"got \[3, 1, 0\] training cases"),
        ({"image_size": 31}, "31 pixels"),
        ({"seed": -1}, "phantom.seed: got -1, expected 0 or more"),
        ({"shares": ()}, "add up to 1"),
    ):
        with pytest.raises(DataError, match=words):
            open_dataset(DataSettings("phantom", phantom=PhantomSettings(**change)))
