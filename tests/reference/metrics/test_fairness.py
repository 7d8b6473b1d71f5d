"""Scores by group: hand-worked cases, fairlearn's MetricFrame, and the bootstrap."""

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from reference_models.data.cases import Attribute, Case, Dataset
from reference_models.evaluation.summary import comparisons, population_shares, region_scores
from reference_models.metrics import fairness
from reference_models.metrics.region import RegionScore
from reference_models.metrics.scores import METRICS
from reference_models.metrics.shuffles import shuffled_groups, shuffled_means


class Listed(Dataset):
    """A data set that is never read: one region, one attribute of three values."""

    name, classes, channels = "listed", ("background", "lesion"), 1
    regions = {"lesion": (1,)}  # noqa: RUF012
    attributes = (Attribute("site", ("a", "b", "c")),)

    def __init__(self, population=None):
        self.population = {} if population is None else {"site": population}

    def load(self, case):
        raise AssertionError


def tables(dice, groups, *, population=None, hd95=None, resamples=500, seed=0, subjects=None):
    """The one region's scores for cases with these Dice and groups; IoU = Dice / (2 - Dice)."""
    names = [str(i) for i in range(len(groups))] if subjects is None else subjects
    cases = [Case(str(i), names[i], (group,)) for i, group in enumerate(groups)]
    distances = [1.0] * len(dice) if hd95 is None else hd95
    scored = [
        [RegionScore(d, d / (2 - d), h, d, 9, 9)] for d, h in zip(dice, distances, strict=True)
    ]
    (found,) = region_scores(Listed(population), cases, scored, resamples=resamples, seed=seed)[
        "site"
    ]
    return found


def test_every_number_of_a_region_by_hand():
    # a: .9, .7 -> .8; b: .5, .7 -> .6; c: .2 -> .2.
    got = tables([0.9, 0.5, 0.7, 0.2, 0.7], [0, 1, 0, 2, 1], population=(0.5, 0.3, 0.2))
    assert [(g.value, g.n) for g in got.groups] == [("a", 2), ("b", 2), ("c", 1)]
    assert [g.metrics["dice"].value for g in got.groups] == pytest.approx([0.8, 0.6, 0.2])
    assert got.overall["dice"].value == pytest.approx(0.4 + 0.18 + 0.04)
    assert (got.worst_group, got.worst.value) == ("c", pytest.approx(0.2))
    assert got.gap.value == pytest.approx(0.6)
    # Of .2 .5 .7 .7 .9 the 10th percentile stands at place .4, between .2 and .5.
    assert got.percentile_10.value == pytest.approx(0.2 + 0.4 * 0.3)
    assert got.es_dice.value == pytest.approx(0.62 / (1 + 0.18 + 0.02 + 0.42))
    iou = [np.mean([0.9 / 1.1, 0.7 / 1.3]), np.mean([0.5 / 1.5, 0.7 / 1.3]), 0.2 / 1.8]
    mean = 0.5 * iou[0] + 0.3 * iou[1] + 0.2 * iou[2]
    expected = mean / (1 + sum(abs(value - mean) for value in iou))
    assert got.es_iou.value == pytest.approx(expected)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2)), min_size=2, max_size=40))
def test_group_scores_equal_metricframes(cases):
    dice, groups = zip(*cases, strict=True)
    frame = MetricFrame(
        metrics=lambda truth, score: np.mean(score),
        y_true=np.zeros(len(dice)),
        y_pred=np.array(dice),
        sensitive_features=np.array(groups),
    )
    got = tables(dice, groups, resamples=2)
    found = {place: g.metrics["dice"].value for place, g in enumerate(got.groups) if g.n}
    assert found == pytest.approx(frame.by_group.to_dict())
    assert got.worst.value == pytest.approx(frame.group_min())
    assert got.gap.value == pytest.approx(frame.difference(method="between_groups"))
    # Without a population, "overall" is the mean over the cases.
    assert got.overall["dice"].value == pytest.approx(frame.overall)
    assert got.percentile_10.value == pytest.approx(np.percentile(dice, 10))
    assert 0 <= got.es_dice.value <= got.overall["dice"].value + 1e-12


def test_cases_of_unknown_value_are_a_group_of_their_own_and_touch_nothing_else():
    known = tables([0.9, 0.7, 0.5], [0, 0, 1])
    both = tables([0.9, 0.7, 0.5, 0.0, 0.1], [0, 0, 1, -1, -1])
    assert [g.value for g in both.groups] == ["a", "b", "c", "unknown"]
    assert both.groups[3].n == 2
    assert both.groups[3].metrics["dice"].value == pytest.approx(0.05)
    for name in ("overall", "worst", "gap", "percentile_10", "es_dice", "es_iou"):
        value, before = getattr(both, name), getattr(known, name)
        if name == "overall":
            value, before = value["dice"], before["dice"]
        assert value.value == before.value, name
    assert both.worst_group == "b"


def test_where_no_value_is_known_there_is_no_overall_score():
    got = tables([0.9, 0.7], [-1, -1])
    assert [g.n for g in got.groups] == [0, 0, 0, 2]
    assert got.groups[3].metrics["dice"].value == pytest.approx(0.8)
    assert got.worst_group == ""
    assert {e.value for e in (*got.overall.values(), got.worst, got.gap, got.es_dice)} == {None}


def test_a_group_without_cases_is_shown_and_leaves_its_share_to_the_others():
    got = tables([0.8, 0.4], [0, 1], population=(0.3, 0.1, 0.6))
    empty = got.groups[2]
    assert (empty.value, empty.n, empty.judged) == ("c", 0, False)
    assert {empty.metrics[metric].value for metric in METRICS} == {None}
    assert got.overall["dice"].value == pytest.approx(0.75 * 0.8 + 0.25 * 0.4)
    assert got.es_dice.value == pytest.approx(0.7 / (1 + 0.1 + 0.3))  # two deviations, not three
    cases = [Case("0", "0", (0,)), Case("1", "1", (1,))]
    shares = population_shares(Listed((0.3, 0.1, 0.6)), cases)
    assert shares["site"] == pytest.approx((0.75, 0.25, 0))


@pytest.mark.parametrize("population", [(0.5, 0.5), (0.5, 0.5, 0.5), (1.5, -0.5, 0), (0, 0, 1)])
def test_shares_that_cannot_be_are_an_error(population):
    with pytest.raises(ValueError, match=r"population: got"):
        tables([0.8, 0.4], [0, 1], population=population)


def test_groups_of_fewer_than_ten_are_marked_and_kept():
    got = tables([0.5] * 19, [0] * 10 + [1] * 9)
    assert [(g.n, g.judged) for g in got.groups] == [(10, True), (9, False), (0, False)]
    assert tables([0.9] * 10 + [0.1] * 9, [0] * 10 + [1] * 9).worst_group == "b"


def test_undefined_distances_are_counted_and_never_taken_for_zero():
    got = tables([0.8, 0, 0.8, 0], [0, 0, 1, 1], hd95=[4.0, None, None, None])
    a, b, _ = got.groups
    assert (a.n, a.n_defined["hd95"], a.metrics["hd95"].value) == (2, 1, 4.0)
    assert a.metrics["hd95"].low is None  # from one case
    assert (b.n_defined["hd95"], b.metrics["hd95"].value) == (0, None)
    # A group that was always missed cannot be left out of "overall" to make it look better.
    assert got.overall["hd95"].value is None
    assert got.overall["dice"].value == pytest.approx(0.4)


def test_empty_truth_misses_and_false_alarms_are_counted():
    sizes = [(0, 0), (0, 5), (5, 0), (5, 5), (5, 1)]  # truth, prediction
    cases = [Case(str(i), str(i), (0,)) for i in range(5)]
    scored = [[RegionScore(0.5, 0.5, 1.0, 0.5, *pair)] for pair in sizes]
    (got,) = region_scores(Listed(), cases, scored, resamples=2, seed=0)["site"]
    group = got.groups[0]
    assert (group.empty_truth, group.missed, group.false_alarm) == (2, 1, 1)


def test_the_bootstrap_computes_everything_again_in_each_draw_from_cases_of_the_same_group():
    rng = np.random.default_rng(1)
    groups = [0] * 12 + [1] * 7 + [2] * 3
    dice = rng.beta(6, 2, len(groups))
    got = tables(dice, groups, population=(0.6, 0.3, 0.1), resamples=400, seed=5)

    rows = fairness.draws(groups, 400, 5)
    again = []
    for draw in range(1, 401):
        means = {g: dice[rows[g][draw]].mean() for g in range(3)}
        overall = 0.6 * means[0] + 0.3 * means[1] + 0.1 * means[2]
        drawn = np.concatenate([dice[rows[g][draw]] for g in range(3)])
        again.append(
            {
                "overall": overall,
                "worst": min(means.values()),
                "gap": max(means.values()) - min(means.values()),
                "percentile_10": np.quantile(drawn, 0.1),
                "es_dice": overall / (1 + sum(abs(m - overall) for m in means.values())),
            }
        )
    for name in again[0]:
        estimate = got.overall["dice"] if name == "overall" else getattr(got, name)
        limits = np.quantile([draw[name] for draw in again], [0.025, 0.975])
        assert (estimate.low, estimate.high) == pytest.approx(tuple(limits)), name
    for group, rows_DP in rows.items():
        members = {i for i, g in enumerate(groups) if g == group}
        assert rows_DP.shape == (401, len(members))
        assert rows_DP[0].tolist() == sorted(members)
        assert set(rows_DP.flat) == members


def test_intervals_hold_the_value_depend_on_the_seed_alone_and_narrow_with_the_cases():
    rng = np.random.default_rng(0)
    dice, groups = rng.beta(8, 2, 400), [0, 1] * 200
    got = tables(dice, groups)
    for estimate in (got.overall["dice"], got.worst, got.gap, got.es_dice, got.percentile_10):
        assert estimate.low <= estimate.value <= estimate.high
        assert estimate.low < estimate.high
    assert got == tables(dice, groups)
    assert got != tables(dice, groups, seed=1)
    few = tables(dice[:40], groups[:40])
    assert width(got.overall["dice"]) < 0.5 * width(few.overall["dice"])


def width(estimate):
    return estimate.high - estimate.low


def test_a_mean_of_many_cases_has_the_textbook_interval():
    dice = np.random.default_rng(3).beta(8, 2, 1000)
    group = tables(dice, [0] * 1000, resamples=4000).groups[0].metrics["dice"]
    error = 1.96 * dice.std() / 1000**0.5
    assert (group.low, group.high) == pytest.approx(
        (dice.mean() - error, dice.mean() + error), abs=3e-4
    )


def test_where_all_cases_are_alike_so_are_value_and_limits():
    got = tables([0.7] * 23, [0] * 20 + [1] * 3)
    for estimate in (
        got.overall["dice"],
        got.worst,
        got.percentile_10,
        got.groups[1].metrics["dice"],
    ):
        assert estimate.value == pytest.approx(0.7)
        assert estimate.low == estimate.value == estimate.high
    assert got.gap.value == pytest.approx(0)
    assert got.es_dice.value == pytest.approx(0.7)


def test_one_case_has_a_value_and_no_interval():
    alone = tables([0.7], [0])
    for estimate in (alone.groups[0].metrics["dice"], alone.overall["dice"], alone.es_dice):
        assert estimate.value == pytest.approx(0.7)
        assert (estimate.low, estimate.high) == (None, None)
    # Beside a group that varies, what they come to together varies with it.
    mixed = tables([0.7, 0.5, 0.9], [0, 1, 1])
    assert mixed.groups[0].metrics["dice"].low is None
    assert mixed.overall["dice"].low < mixed.overall["dice"].high


def test_a_group_is_as_large_as_its_subjects_are_many():
    subjects = [f"a{i // 2}" for i in range(18)] + [f"b{i}" for i in range(10)]
    got = tables([0.5, 0.7] * 14, [0] * 18 + [1] * 10, subjects=subjects)
    assert [(g.n, g.n_subjects, g.judged) for g in got.groups] == [
        (18, 9, False), (10, 10, True), (0, 0, False),
    ]  # fmt: skip


def test_images_of_one_subject_are_no_independent_evidence():
    rng = np.random.default_rng(2)
    dice, groups = rng.beta(8, 2, 60).repeat(5), np.repeat([0, 1], 150).tolist()
    alone = tables(dice, groups)
    whole = tables(dice, groups, subjects=[str(i // 5) for i in range(300)])
    for name in ("overall", "worst", "gap", "es_dice", "percentile_10", "group"):
        one, five = (
            {"overall": got.overall["dice"], "group": got.groups[0].metrics["dice"]}.get(name)
            or getattr(got, name)
            for got in (alone, whole)
        )
        assert five.value == pytest.approx(one.value)
        assert 1.6 < width(five) / width(one) < 3.2  # about the root of 5
    chance = [got.compared["gap"].chance.value for got in (alone, whole)]
    assert 1.6 < chance[1] / chance[0] < 3.2
    # One patient does not tell how patients differ.
    one = tables([0.5, 0.7, 0.9, 0.6], [0, 0, 1, 1], subjects=[*"aabc"])
    assert one.groups[0].metrics["dice"].low is None
    assert one.groups[1].metrics["dice"].low < one.groups[1].metrics["dice"].high
    assert one.overall["dice"].low < one.overall["dice"].high
    assert tables([0.5, 0.7], [0, 0], subjects=[*"aa"]).percentile_10.low is None


def test_what_spans_groups_is_compared_over_the_cases_whose_value_is_known():
    rng = np.random.default_rng(3)
    dice, groups = rng.beta(8, 2, 40), [0] * 20 + [1] * 20
    subjects = [str(i // 2) for i in range(40)]
    known = tables(dice, groups, subjects=subjects)
    assert [*known.compared] == ["worst", "gap", "es_dice", "es_iou"]
    both = tables(
        [*dice, 0.0, 0.1], [*groups, -1, -1], subjects=[*subjects, "0", "x"], resamples=500
    )
    for name, found in both.compared.items():
        # Subjects that have cases of unknown value as well are drawn by themselves.
        assert found.chance == known.compared[name].chance
        assert found.p_value == known.compared[name].p_value
        corrected = found.corrected
        assert corrected.value == pytest.approx(known.compared[name].corrected.value, abs=0.02)
        assert corrected.low <= getattr(both, name).value <= corrected.high
    assert known.compared["es_iou"] != known.compared["es_dice"]
    means = shuffled_means(dice, shuffled_groups(groups, subjects, 500, 0))
    assert known.compared["gap"].chance.value == pytest.approx(fairness.gap(means)[1:].mean())
    iou = shuffled_means(dice / (2 - dice), shuffled_groups(groups, subjects, 500, 0))
    chance = fairness.es_dice(iou, {0: 0.5, 1: 0.5})[1:].mean()
    assert known.compared["es_iou"].chance.value == pytest.approx(chance)
    assert tables([0.7, 0.8], [0, 0]).compared == tables([0.7], [-1]).compared == {}


def test_comparisons_are_groups_that_have_a_case_times_regions():
    got = tables([0.9, 0.7, 0.5, 0.4], [0, 0, 1, -1])
    assert comparisons({"site": (got, got)}) == {"site": 4}
