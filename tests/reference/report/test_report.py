"""The report says what the summary says, needs no network, and takes names as they come."""

import base64
import dataclasses
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from reference_models.metrics.scores import (
    METRICS,
    CaseScore,
    Comparison,
    Condition,
    Estimate,
    GroupScores,
    RegionScores,
    Summary,
)
from reference_models.report.charts import chart
from reference_models.report.page import write_report
from reference_models.report.pictures import Picture, overlay, pictures_wanted
from reference_models.report.words import findings

CLASSES = ("background", "lesion")
NASTY = '<script>alert("x")</script> & Ünïcödé 名'


class Page(HTMLParser):
    """The text of a page, its tags and what they refer to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.styles = False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.styles = tag == "style"
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.text += "" if self.styles else data + " "


def case(case_id, group, dice, region="lesion"):
    return CaseScore(case_id, {"site": group}, region, 9, 9, dice, dice, None, dice)


def estimates(start):
    """Numbers that differ from each other in the third digit."""
    return [
        Estimate(start + i / 50, start + i / 50 - 0.007, start + i / 50 + 0.006) for i in range(4)
    ]


def group(value, n, start, judged=True, n_subjects=None):
    metrics = dict(zip(METRICS, estimates(start), strict=True))
    defined = dict.fromkeys(METRICS, n)
    return GroupScores(value, n, judged, metrics, defined, 31, 32, 33, n_subjects or n)


def against_chance(start, p):
    """Held against chance: numbers that differ from each other in the third digit."""
    corrected = Estimate(start + 0.001, start - 0.031, start + 0.032)
    return Comparison(corrected, Estimate(start + 0.002, start - 0.041, start + 0.042), p)


def chances(p=0.321):
    """Of worst group, gap, ES-Dice and ES-IoU."""
    starts = {"worst": 0.111, "gap": 0.222, "es_dice": 0.444, "es_iou": 0.555}
    return {name: against_chance(start, p + start / 10) for name, start in starts.items()}


def region(groups, name="lesion", compared=None):
    overall = dict(zip(METRICS, estimates(0.501), strict=True))
    rest = [Estimate(x, x - 0.003, x + 0.004) for x in (0.111, 0.222, 0.333, 0.444, 0.555)]
    lowest = groups[0].value if groups else ""
    return RegionScores(name, tuple(groups), overall, lowest, *rest, compared or {})


def summary(regions, values, conditions=()):
    given = Condition("as given", "all told the truth", {"site": tuple(regions)}, {})
    return Summary(
        "made-up", "test", "nowhere", 87, "mm", 1.5, 20, 234, {"site": values},
        {"site": (1 / len(values),) * len(values)}, "Both empty: 1.", (given, *conditions),
        {"site": len(values) * len(regions)},
    )  # fmt: skip


def written(tmp_path, summary, cases=(), pictures=None):
    path = tmp_path / "report.html"
    write_report(path, summary, cases, pictures or {}, CLASSES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    return Page(path)


def picture(case_id, size=(8, 8)):
    truth_HW = np.zeros(size, np.uint8)
    truth_HW[2:7, 2:7] = 1
    predicted_HW = np.zeros(size, np.uint8)
    predicted_HW[3:6, 3:6] = 1
    return Picture(case_id, np.full((*size, 3), 100, np.uint8), truth_HW, predicted_HW)


def test_every_number_of_the_summary_is_on_the_page(tmp_path):
    scores = region([group("a", 41, 0.601), group("b", 46, 0.703)])
    page = written(tmp_path, summary([scores], ("a", "b")))
    # Where nothing is held against chance, everything has its own interval.
    shown = [scores.worst, scores.gap, scores.percentile_10, scores.es_dice, scores.es_iou]
    for metrics in (scores.overall, *(g.metrics for g in scores.groups)):
        for metric, estimate in metrics.items():
            digits = 2 if metric == "hd95" else 3
            assert f"{estimate.value:.{digits}f} {estimate.low:.{digits}f} to" in page.text
    for estimate in shown:
        assert f"{estimate.value:.3f} {estimate.low:.3f} to {estimate.high:.3f}" in page.text
    for word in ("87 cases", "of 234 bootstrap", "31 32 33 b 46 0.703", "HD95, mm", "at 1.5 mm"):
        assert word in page.text
    assert "False alarms a 41 0.601" in page.text
    assert "87 0.501" in page.text  # the groups' n together
    assert "62 64 66" in page.text


def test_what_spans_groups_is_held_against_chance(tmp_path):
    scores = region([group("a", 41, 0.601), group("b", 46, 0.703)], compared=chances())
    text = written(tmp_path, summary([scores], ("a", "b"))).text
    for name, found in scores.compared.items():
        value = getattr(scores, name).value
        low, high = (f"{end:.3f}" for end in (found.corrected.low, found.corrected.high))
        # The percentile interval, which leaves out the truth where groups are alike, is not there.
        assert f"{value:.3f} {low} to {high}" in text
        assert f"{value:.3f} {getattr(scores, name).low:.3f}" not in text
        chance = f"{found.chance.value:.3f} {found.chance.low:.3f} to {found.chance.high:.3f}"
        cells = f"{value:.3f} {found.corrected.value:.3f} {low} to {high} {chance}"
        assert f"{cells} {found.p_value:.3f}" in text
    assert "Groups served exactly alike would show a gap of about 0.224 by chance" in text
    assert "(0.181 to 0.264), and groups as far apart as here, for how much their scores" in text
    assert "vary, with probability 0.343." in text
    assert "do not show that any group is served worse" in text
    assert "Allowing for chance, the gap is about 0.223 (0.191 to 0.254)." in text
    assert "2 group means by site (groups times regions) were compared, in 1 gap." in text
    # Intervals of single groups say something else than the probability, which is of their gap.
    assert "overlap" not in text


@pytest.mark.parametrize(
    ("p", "regions", "said"),
    [
        (0.051, 1, "do not show that any group is served worse"),
        (0.050, 1, "chance alone hardly explains it"),
        (0.026, 2, "unlikely for a single gap, but is not for the largest of 2"),
        (0.025, 2, "chance alone hardly explains it"),
        (0.0004, 1, "with probability below 0.001"),
        # Of 234 shuffles none lies below 1 / 235, which is .0043.
        (1 / 235, 11, "chance alone hardly explains it"),
        (
            1 / 235,
            12,
            "234 are too few to tell whether it is chance of one gap among 12: set "
            "--resamples to at least 240.",
        ),
        (2 / 235, 12, "unlikely for a single gap, but is not for the largest of 12"),
    ],
)
def test_the_more_gaps_are_looked_at_the_less_one_of_them_says(tmp_path, p, regions, said):
    groups = [group("a", 41, 0.601), group("b", 46, 0.703)]
    gap = {"gap": against_chance(0.2, p)}
    scores = [region(groups, f"region {at}", gap) for at in range(regions)]
    # One of which there is nothing to compare is no further test.
    page = summary([*scores, region(groups, "not compared")], ("a", "b"))
    assert written(tmp_path, page).text.count(said) == regions
    assert [said in line for line in findings(page)] == [True] * regions + [False]
    assert f"in {regions} gap" in [*findings(page)][-1]


def test_a_group_of_one_subject_leaves_no_interval(tmp_path):
    gap = {"gap": Comparison(Estimate(None), Estimate(0.2, 0.1, 0.3), 0.4)}
    scores = region([group("a", 41, 0.601, n_subjects=1), group("b", 46, 0.703)], compared=gap)
    text = written(tmp_path, summary([scores], ("a", "b"))).text
    assert "The gap is 0.222 ." in text
    assert "A group of a single subject leaves no interval." in text
    assert "a 41 of 1 subjects 0.601" in text
    small = dataclasses.replace(scores.groups[0], judged=False)
    few = dataclasses.replace(scores, groups=(small, scores.groups[1]))
    text = written(tmp_path, summary([few], ("a", "b"))).text
    assert "Too small to judge (fewer than 20 subjects): a, n = 41 of 1 subjects." in text


def test_the_difference_a_condition_makes_is_shown_and_why_one_was_not_run(tmp_path):
    given = region([group("a", 41, 0.601), group("b", 46, 0.703)])
    changed = region([group("a", 41, 0.501), group("b", 46, 0.703)])
    conditions = (
        Condition("shuffled", "40 told another", {"site": (changed,)}, {}),
        Condition("wrong", "not run: only one value", {}, {}),
    )
    text = written(tmp_path, summary([given], ("a", "b"), conditions)).text
    assert "−0.100" in text
    assert "wrong (not run): only one value" in text
    assert "as given : all told the truth" in text
    silent = dataclasses.replace(conditions[0], note="")
    text = written(tmp_path, summary([given], ("a", "b"), (silent,))).text
    assert "shuffled lesion by site" in text  # no colon where nothing is noted


def test_the_page_says_what_the_data_say_of_themselves(tmp_path):
    made = summary([region([group("a", 41, 0.601)])], ("a",))
    assert "The data set says" not in written(tmp_path, made).text
    told = dataclasses.replace(made, about="One head, made twice <i>.")
    assert "The data set says: One head, made twice <i>." in written(tmp_path, told).text


def test_names_are_escaped_and_nothing_is_fetched(tmp_path):
    cases = [case(NASTY, NASTY, 0.5)]
    scores = region([group(NASTY, 1, 0.601, judged=False)])
    page = written(tmp_path, summary([scores], (NASTY,)), cases, {NASTY: picture(NASTY)})
    assert "script" not in page.tags
    assert " ".join(NASTY.split()) in page.text
    assert any(link.startswith("data:image/") for link in page.links)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)


def test_a_group_too_small_to_judge_is_marked_and_the_gap_on_it_is_qualified(tmp_path):
    scores = region([group("a", 3, 0.601, judged=False), group("b", 46, 0.703)])
    text = written(tmp_path, summary([scores], ("a", "b"))).text
    assert "False alarms a † 3" in text  # in the table
    assert "a † n" in text  # in the chart
    assert "† Too small to judge (fewer than 20 cases): a, n = 3." in text
    assert "The gap rests on a group too small to judge." in text


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (0.0004, "It may be chance all the same, since the interval reaches down to no gap."),
        (0.0006, "So chance alone hardly explains it."),
    ],
)
def test_what_is_said_of_chance_agrees_with_the_interval(tmp_path, low, said):
    gap = {"gap": Comparison(Estimate(0.1, low, 0.2), Estimate(0.05, 0.0, 0.09), 0.01)}
    scores = region([group("a", 41, 0.601), group("b", 46, 0.703)], compared=gap)
    assert said in written(tmp_path, summary([scores], ("a", "b"))).text


def test_too_few_shuffles_for_a_single_gap_are_told_as_well(tmp_path):
    gap = {"gap": against_chance(0.2, 1 / 11)}
    scores = region([group("a", 41, 0.601), group("b", 46, 0.703)], compared=gap)
    few = dataclasses.replace(summary([scores], ("a", "b")), resamples=10)
    assert "10 are too few to tell whether it is chance: set --resamples to at least 20." in (
        written(tmp_path, few).text
    )


def test_groups_of_one_subject_each_cannot_be_compared(tmp_path):
    alone = summary([region([group("a", 1, 0.601), group("b", 3, 0.703, n_subjects=1)])], ("a",))
    said = "Every group has a single subject, so they cannot be compared."
    assert said in written(tmp_path, alone).text
    assert [said in line for line in findings(alone)] == [True]
    several = summary([region([group("a", 1, 0.601), group("b", 3, 0.703)])], ("a", "b"))
    assert said not in written(tmp_path, several).text


def test_of_groups_that_are_level_none_is_called_lowest_or_highest(tmp_path):
    scores = region([group("a", 41, 0.601), group("b", 46, 0.601)])
    text = written(tmp_path, summary([scores], ("a", "b"))).text
    assert "Mean Dice is the same in every group that has a score: 0.601." in text
    assert "lowest in" not in text


def test_what_is_not_defined_is_a_dash_with_its_reason(tmp_path):
    empty = dict.fromkeys(METRICS, Estimate(None))
    nobody = dataclasses.replace(group("a", 0, 0.6), metrics=empty, judged=False)
    undefined = dataclasses.replace(group("b", 5, 0.6), metrics=empty)
    text = written(tmp_path, summary([region([nobody, undefined])], ("a", "b"))).text
    assert "– no case" in text
    assert "– not defined in any case" in text
    assert "No group has a score: there is nothing to compare." in text


def test_many_groups_many_regions_one_group_and_no_attribute_make_a_page(tmp_path):
    values = tuple(f"{NASTY} {i} " + "long" * 40 for i in range(12))
    scores = [region([group(v, 30, 0.6) for v in values], f"region {i}") for i in range(10)]
    text = written(tmp_path, summary(scores, values)).text
    for at in range(10):  # a row a group in the table of every region
        rows = text.split(f"region {at} by site")[1].split("Overall")[0]
        assert [rows.count(f" {i} " + "long" * 40) for i in range(12)] == [1] * 12
    one = written(tmp_path, summary([region([group("a", 30, 0.6)])], ("a",)))
    assert "Only one group has a score" in one.text
    nothing = dataclasses.replace(
        summary([], ("a",)), attributes={}, population={},
        conditions=(Condition("as given", "no attribute", {}, {}),),
    )  # fmt: skip
    assert "no groups to compare" in written(tmp_path, nothing).text


def test_best_median_and_worst_are_wanted_with_ties_by_id():
    dice = {"e": 0.5, "d": 0.9, "c": 0.1, "b": 0.9, "a": 0.1}
    # By (Dice, id): a .1, c .1, e .5, b .9, d .9: worst a, median e, best d.
    cases = [case(i, "x", score) for i, score in dice.items()]
    cases += [case("lone", "y", 0.3)]
    cases += [case("two-1", "unknown", 0.2), case("two-2", "unknown", 0.4)]
    wanted = pictures_wanted(cases, {"site": ("x", "y", "z")})
    assert wanted == ("e", "d", "a", "lone", "two-1", "two-2")


def test_a_cases_score_is_its_mean_over_the_regions():
    cases = [case("a", "x", 0.0), case("a", "x", 0.9, "cup")]  # .45
    cases += [case("b", "x", 0.5), case("b", "x", 0.5, "cup")]  # .5
    cases += [case("c", "x", 0.2), case("c", "x", 0.2, "cup")]  # .2
    cases += [case("d", "x", 0.6), case("d", "x", 0.0, "cup")]  # .3, the lower middle one
    assert pictures_wanted(cases, {"site": ("x",)}) == ("b", "c", "d")


def test_overlay_fills_the_prediction_and_outlines_the_truth():
    shown = overlay(picture("1"), CLASSES)
    assert shown.dtype == np.uint8
    assert shown[2, 2].tolist() == [86, 180, 233]  # the outline in the class's colour
    assert shown[4, 4].tolist() == [94, 132, 153]  # 100 + .4 (colour - 100)
    assert shown[1, 3].tolist() == [35, 35, 35]  # darkened outside the outline
    assert shown[3, 4].tolist() == [33, 46, 54]  # and inside, so that it shows on its own fill
    assert shown[0, 0].tolist() == [100, 100, 100]  # untouched
    assert (shown == overlay(picture("1"), CLASSES)).all()


@pytest.mark.parametrize(
    ("native", "shown"),
    [((3000, 2000), (320, 480)), ((96, 80), (400, 480)), ((300, 200), (200, 300))],
)
def test_a_picture_is_brought_to_a_size_for_the_page(tmp_path, native, shown):
    cases, scores = [case("1", "a", 0.5)], region([group("a", 1, 0.6)])
    page = written(tmp_path, summary([scores], ("a",)), cases, {"1": picture("1", native)})
    (link,) = (link for link in page.links if link.startswith("data:image/"))
    image = Image.open(io.BytesIO(base64.b64decode(link.split(",")[1])))
    assert image.size == shown  # width, height: 480 at the most, small ones by a whole factor


def test_a_picture_of_any_intensities_goes_from_black_to_white():
    blank_HW = np.zeros((1, 3), np.uint8)
    one = Picture.of("7", np.array([[[-2.0, 0.0, 2.0]]], np.float32), blank_HW, blank_HW)
    assert one.image_HW3.tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    colours_CHW = np.array([[[0, 1, 2]], [[0, 4, 0]], [[1, 0, 0]]], np.float32)
    three = Picture.of("7", colours_CHW, blank_HW, blank_HW)  # one range for all channels
    assert three.image_HW3.tolist() == [[[0, 0, 64], [64, 255, 0], [128, 0, 0]]]
    two = Picture.of("7", colours_CHW[:2], blank_HW, blank_HW)  # their mean: 0, 2.5, 1
    assert two.image_HW3.tolist() == [[[0] * 3, [255] * 3, [102] * 3]]
    flat = Picture.of("7", np.full((1, 1, 3), 5, np.float32), blank_HW, blank_HW)
    assert not flat.image_HW3.any()


def test_a_large_group_is_drawn_as_bars_that_hold_every_case(tmp_path):
    cases = [case(str(i), "a", 0.9) for i in range(5000)] + [case("low", "a", 0.1)]
    cases += [case(f"b{i}", "b", 0.8) for i in range(200)]
    scores = region([group("a", 5001, 0.601), group("b", 200, 0.703)])
    drawn = chart(cases, "site", scores)
    assert drawn.bars["a"].count("M") == 2  # the one low case as well
    assert drawn.dots["b"].count("M") == 200
    assert drawn.bars.keys() == {"a"}
    assert drawn.dots.keys() == {"b"}
    page = written(tmp_path, summary([scores], ("a", "b")), cases)
    assert "a group of more than 200 cases has bars" in page.text
    assert (tmp_path / "report.html").stat().st_size < 60_000


def test_the_worst_group_is_named_again_where_a_condition_changes_it(tmp_path):
    given = region([group("a", 41, 0.601), group("b", 46, 0.703)])
    changed = dataclasses.replace(given, worst_group="b")
    conditions = (Condition("wrong", "", {"site": (changed,)}, {}),)
    text = written(tmp_path, summary([given], ("a", "b"), conditions)).text
    assert text.count("now b") == 1
    assert "now a" not in text


def test_the_loads_are_shown_in_percent_of_a_row_and_an_absent_value_has_none(tmp_path):
    plain = summary([region([group("a", 41, 0.601), group("b", 46, 0.703)])], ("a", "b"))
    (given,) = plain.conditions
    loaded = dataclasses.replace(given, load={"site": ((0.125, 0.375, 0.5), (0.0, 0.0, 0.0))})
    text = written(tmp_path, dataclasses.replace(plain, conditions=(loaded,))).text
    assert "A row sums to 100." in text
    assert "a 12.5 37.5 50.0 b no case" in text


def test_pictures_that_do_not_fit_are_refused_with_what_came():
    blank_HW = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"image_HW3 of 7: got uint8 \(4, 4\), expected uint8"):
        Picture("7", blank_HW, blank_HW, blank_HW)
    for wrong in (np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=f"image_HW3 of 7: got {wrong.dtype} "):
            Picture("7", wrong, blank_HW, blank_HW)
    with pytest.raises(ValueError, match=r"predicted_HW of 7: got \(2, 4\), expected"):
        Picture("7", np.zeros((4, 4, 3), np.uint8), blank_HW, blank_HW[:2])
    bad = Picture("7", np.zeros((4, 4, 3), np.uint8), blank_HW + np.uint8(5), blank_HW)
    with pytest.raises(ValueError, match="truth of 7: got label 5, expected labels below 2"):
        overlay(bad, CLASSES)
