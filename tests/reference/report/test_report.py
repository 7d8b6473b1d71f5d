"""The report says what the summary says, needs no network, and takes names as they come."""

import base64
import dataclasses
import io
import itertools
import re
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
from reference_models.report.pictures import (
    GAP,
    LONGEST,
    Picture,
    colour_of,
    outlined,
    overlay,
    pictures_wanted,
)
from reference_models.report.words import findings

CLASSES = ("background", "lesion")
NASTY = '<script>alert("x")</script> & Ünïcödé 名'


class Page(HTMLParser):
    """The text of a page, its style, its tags, its images and what they refer to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.style, self.tags, self.links, self.images = "", "", [], [], []
        self.styles = False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.styles = tag == "style"
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text += "" if self.styles else data + " "
        self.style += data if self.styles else ""

    def pixels(self, alt):
        """The one image of this text."""
        (image,) = (image for image in self.images if image["alt"] == alt)
        content = base64.b64decode(image["src"].split(",")[1])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


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
    given = Condition("as given", "all received the truth", {"site": tuple(regions)}, {})
    return Summary(
        "made-up", "test", "nowhere", 87, 55, "mm", 1.5, 20, 234, {"site": values},
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
    for word in (
        "87 cases of 55 subjects",
        "of 234 bootstrap",
        "31 32 33 b 46 0.703",
        "HD95, mm",
        "at 1.5 mm",
    ):
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
    assert "(0.181 to 0.264). Groups as far apart as here, measured by how much their" in text
    assert "scores vary, would then have a probability of 0.343." in text
    assert "do not show that any group is served worse" in text
    assert "Allowing for chance, the gap is about 0.223 (0.191 to 0.254)." in text
    assert "compares 2 group means by site (the number of groups times the number of" in text
    assert "regions) in 1 gap." in text
    # Intervals of single groups say something else than the probability, which is of their gap.
    assert "overlap" not in text


@pytest.mark.parametrize(
    ("p", "regions", "said"),
    [
        (0.051, 1, "do not show that any group is served worse"),
        (0.050, 1, "chance alone hardly explains the gap"),
        (0.026, 2, "unlikely for a single gap, but it is not for the largest of 2 gaps"),
        (0.025, 2, "chance alone hardly explains the gap"),
        (0.0004, 1, "have a probability below 0.001."),
        # Of 234 shuffles none lies below 1 / 235, which is .0043.
        (1 / 235, 11, "chance alone hardly explains the gap"),
        (
            1 / 235,
            12,
            "234 shuffles are too few to tell whether it is chance of one gap among 12. Set "
            "--resamples to at least 240.",
        ),
        (2 / 235, 12, "unlikely for a single gap, but it is not for the largest of 12 gaps"),
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
    assert "There is no interval, because a group has a single subject." in text
    assert "a 41 of 1 subjects 0.601" in text
    small = dataclasses.replace(scores.groups[0], judged=False)
    few = dataclasses.replace(scores, groups=(small, scores.groups[1]))
    text = written(tmp_path, summary([few], ("a", "b"))).text
    assert "groups are too small to judge (fewer than 20 subjects): a, 41 cases of 1" in text


def test_the_difference_a_condition_makes_is_shown_and_why_one_was_not_run(tmp_path):
    given = region([group("a", 41, 0.601), group("b", 46, 0.703)])
    changed = region([group("a", 41, 0.501), group("b", 46, 0.703)])
    conditions = (
        Condition("shuffled", "40 received another", {"site": (changed,)}, {}),
        Condition("wrong", "not run: only one value", {}, {}),
    )
    text = written(tmp_path, summary([given], ("a", "b"), conditions)).text
    assert "−0.100" in text
    assert "wrong (not run): only one value" in text
    assert "as given : all received the truth" in text
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
    assert "a † 3 cases" in text  # in the chart
    assert "† These groups are too small to judge (fewer than 20 cases): a, 3 cases." in text
    assert "The gap rests on a group that is too small to judge." in text


@pytest.mark.parametrize(
    ("low", "said"),
    [
        (0.0004, "The gap may still be chance, because the interval reaches down to no gap."),
        (0.0006, "So chance alone hardly explains the gap."),
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
    said = "10 shuffles are too few to tell whether it is chance. Set --resamples to at least 20."
    assert said in written(tmp_path, few).text


def test_groups_of_one_subject_each_cannot_be_compared(tmp_path):
    alone = summary([region([group("a", 1, 0.601), group("b", 3, 0.703, n_subjects=1)])], ("a",))
    said = "Every group has a single subject, so the groups cannot be compared."
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


@pytest.mark.parametrize(
    ("empty", "said"),
    [
        ((41, 46), "the truth is empty in every case. There Dice"),
        ((41, 45), "the truth is empty in every case of a. There Dice"),
        ((40, 45), ""),
    ],
)
def test_where_no_case_has_the_region_page_and_terminal_say_so(tmp_path, empty, said):
    groups = [group("a", 41, 0.601), group("b", 46, 0.703), group("c", 0, 0.5)]
    groups = [
        dataclasses.replace(g, empty_truth=n) for g, n in zip(groups, (*empty, 0), strict=True)
    ]
    made = summary([region(groups, "left lung")], ("a", "b", "c"))
    text = written(tmp_path, made).text
    short = text[text.index("In short") : text.index("On this page")]
    assert short.count("the truth is empty in every case") == bool(said)
    assert said in short
    lines = [line for line in findings(made) if "the truth is empty" in line]
    assert len(lines) == bool(said)
    assert all(line.startswith('For the region "left lung", by site, the truth') for line in lines)


def test_every_chart_has_a_heading_of_its_own(tmp_path):
    groups = [group("a", 41, 0.601), group("b", 46, 0.703)]
    regions = [region(groups, "left lung"), region(groups, "right lung")]
    text = written(tmp_path, summary(regions, ("a", "b"))).text
    for name in ("left lung", "right lung"):
        assert text.count(f"Dice of each case: {name} by site") == 1


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


def test_an_outline_leaves_the_image_visible_within_and_without():
    shown = outlined(picture("1"), "truth", CLASSES)
    assert (shown.dtype, shown.shape) == (np.uint8, (8, 8, 3))
    line_HW = np.zeros((8, 8), bool)
    line_HW[2:7, 2:7] = True
    line_HW[3:6, 3:6] = False
    assert (shown[line_HW] == [86, 180, 233]).all()  # the class's colour
    assert shown[1, 3].tolist() == [35, 35, 35]  # darkened outside the line
    assert shown[3, 4].tolist() == [35, 35, 35]  # and inside
    assert shown[4, 4].tolist() == [100, 100, 100]  # untouched inside
    assert shown[0, 0].tolist() == [100, 100, 100]  # and outside
    predicted = outlined(picture("1"), "prediction", CLASSES)
    assert predicted[3, 3].tolist() == [86, 180, 233]
    assert predicted[2, 2].tolist() == [100, 100, 100]


@pytest.mark.parametrize("planes", [1, 3])
def test_an_overlay_shows_the_truth_and_the_prediction_each_under_its_title(planes):
    seen = dataclasses.replace(picture("1", (60, 90)), planes=planes)
    shown = overlay(seen, CLASSES)
    alone = overlay(dataclasses.replace(seen, truth_HW=None), CLASSES)
    strip = len(alone) - 60
    assert alone[:strip].any()  # has letters
    np.testing.assert_array_equal(alone[strip:], outlined(seen, "prediction", CLASSES))
    if planes == 1:
        assert shown.shape == (strip + 60, 90 + GAP + 90, 3)
        truth, predicted = shown[:, :90], shown[:, 90 + GAP :]
    else:
        assert shown.shape == (2 * (strip + 60) + GAP, 90, 3)
        truth, predicted = shown[: strip + 60], shown[strip + 60 + GAP :]
    np.testing.assert_array_equal(truth[strip:], outlined(seen, "truth", CLASSES))
    np.testing.assert_array_equal(predicted, alone)
    assert (truth[:strip] != predicted[:strip]).any()  # another title
    assert (shown == overlay(seen, CLASSES)).all()


def test_every_group_has_its_median_case_first_with_truth_beside_prediction(tmp_path):
    dice = {"a": (0.1, 0.4, 0.5, 0.9), "b": (0.2, 0.6, 0.7)}
    cases = [case(f"{g}{at}", g, d) for g, row in dice.items() for at, d in enumerate(row)]
    cases.append(case("alone", "unknown", 0.3))
    scores = region([group("a", 4, 0.601), group("b", 3, 0.703), group("unknown", 1, 0.3)])
    made = {row.case_id: picture(row.case_id, (48, 48)) for row in cases}
    page = written(tmp_path, summary([scores], ("a", "b")), cases, made)
    expected = []
    for name, median, worst, best in (("a", "a1", "a0", "a3"), ("b", "b1", "b0", "b2")):
        roles = (("Median", median), ("Worst", worst), ("Best", best))
        expected += [f"{role} case of site {name}, {case_id}" for role, case_id in roles]
    expected.append("Only case of site unknown, alone")
    assert [image["alt"] for image in page.images] == [
        f"{alt}: outline of the {title} on the image"
        for alt in expected
        for title in ("truth", "prediction")
    ]
    assert "site: a Median case: a1 Dice: lesion 0.400. Truth Prediction" in page.text
    factor = LONGEST // 48
    for title, (start, stop) in {"truth": (2, 7), "prediction": (3, 6)}.items():
        shown = page.pixels(f"{expected[0]}: outline of the {title} on the image")
        rows, columns = np.nonzero((shown == colour_of(1)).all(-1))
        for places in (rows, columns):  # from edge to edge of the mask
            assert (places.min(), places.max()) == (start * factor, stop * factor - 1)
        middle = factor * (start + stop) // 2
        assert shown[middle, middle].tolist() == [100, 100, 100]  # no fill
        assert shown[0, 0].tolist() == [100, 100, 100]


def test_a_picture_without_anything_to_outline_says_so(tmp_path):
    cases, scores = [case("1", "a", 0.0)], region([group("a", 1, 0.6)])
    empty = dataclasses.replace(picture("1"), truth_HW=np.zeros((8, 8), np.uint8))
    text = written(tmp_path, summary([scores], ("a",)), cases, {"1": empty}).text
    assert text.count(": nothing is outlined here") == 1
    assert re.search(r"Truth ?: nothing is outlined here Prediction", text)
    text = written(tmp_path, summary([scores], ("a",)), cases, {"1": picture("1")}).text
    assert "nothing is outlined" not in text


def test_terms_are_explained_before_the_first_number_that_needs_them(tmp_path):
    scores = region([group("a", 41, 0.601), group("b", 46, 0.703)], compared=chances())
    cases = [case(str(at), "ab"[at % 2], 0.5) for at in range(4)]
    page = written(tmp_path, summary([scores], ("a", "b")), cases)
    before, after = page.text.split("In short", 1)
    assert "0.601" in after
    assert "0.601" not in before
    for said in (
        "87 cases of 55 subjects, from the test split of the data set made-up",
        "In every case this region is scored: lesion. The prediction is",
        "groups by site : a (41 cases), b (46 cases).",
        "twice the area (of a volume: the volume) that both share, divided by the sum",
        "The worst group is the group with the lowest mean Dice.",
        "The gap is the highest mean Dice of a group minus the lowest.",
        "ES-Dice = Dice / (1 + Σ g |Dice − Dice g |)",
        "95 % interval",
        "shuffled 234 times",
        "compares 2 group means by site",
        "in 1 gap.",
    ):
        assert said in before, said
    for term in ("Worst group", "Gap", "ES-Dice"):  # first stands where it is explained
        assert re.search(rf"\b{term}\b (The|Equity)", page.text).start() == (
            re.search(rf"\b{term}\b", page.text, re.IGNORECASE).start()
        ), term


def test_the_axis_of_a_chart_has_its_scale_and_its_unit(tmp_path):
    groups = [group("a", 41, 0.701), group("b", 46, 0.703)]
    for lowest, ticks, said in (
        (0.65, "0.6 0.7 0.8 0.9 1.0", "; the axis starts at 0.6, not at 0"),
        (0.05, "0.0 0.2 0.4 0.6 0.8 1.0", ""),
    ):
        cases = [case("1", "a", lowest), case("2", "b", 0.9)]
        text = written(tmp_path, summary([region(groups)], ("a", "b")), cases).text
        label = f"{ticks} Dice, without unit (1: the same as the truth){said} Dice of lesion"
        assert label in text
        assert chart(cases, "site", region(groups)).low == pytest.approx(float(ticks[:3]))
    given = dataclasses.replace(
        summary([region(groups)], ("a", "b")).conditions[0],
        load={"site": ((0.125, 0.375, 0.5), (0.2, 0.2, 0.6))},
    )
    loaded = dataclasses.replace(summary([region(groups)], ("a", "b")), conditions=(given,))
    text = written(tmp_path, loaded).text
    assert "White is 0 %, and the darkest blue is the highest share of the table, 60.0 %." in text


def rules(style, medium):
    """What a style sheet says for a medium: by selector, its declarations."""
    block = style.split(f"@media {medium} {{", 1)[1]
    depths = itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in block)
    block = block[: [*depths].index(-1)]
    found = {}
    for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", block):
        for selector in selectors.split(","):
            found[selector.strip()] = found.get(selector.strip(), "") + body
    return found


def test_a_printed_page_is_black_on_white_and_cuts_no_table_picture_or_chart(tmp_path):
    style = written(tmp_path, summary([region([group("a", 41, 0.601)])], ("a",))).style
    printed = rules(style, "print")
    for colour in ("color-scheme: light", "--page: #fff", "--ink: #000", "--tint: #fff"):
        assert colour in printed[":root"]
    assert "overflow: visible" in printed[".scroll"]  # no column beyond the edge of the paper
    assert "width: 100%" in printed["table"]
    assert "white-space: normal" in printed["td small"]
    assert "position: static" in printed["tr > :first-child"]
    for whole in ("table", "tr", "figure", ".chart", ".tiles"):
        assert "break-inside: avoid" in printed[whole], whole
    assert "display: table-header-group" in printed["thead"]  # again on every sheet
    for title in ("h1", "h2", "h3", "h4", "dt"):
        assert "break-after: avoid" in printed[title], title
    assert re.search(r"@page \{ size: A4; margin: \d+mm; \}", style)
    # A dark screen makes no dark paper.
    assert re.findall(r"@media ([^{]*prefers-color-scheme: dark\)) ", style) == [
        "screen and (prefers-color-scheme: dark)"
    ]


def test_headings_do_not_skip_a_level_and_every_image_has_a_text(tmp_path):
    cases = [case(str(at), "ab"[at % 2], 0.1 * at) for at in range(8)]
    scores = region([group("a", 4, 0.601), group("b", 4, 0.703)], compared=chances())
    other = Condition("wrong", "", {"site": (scores,)}, {})
    made = {row.case_id: picture(row.case_id) for row in cases}
    page = written(tmp_path, summary([scores], ("a", "b"), (other,)), cases, made)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in itertools.pairwise(levels))
    assert len(page.images) == 12
    assert len({image["alt"] for image in page.images}) == 12


@pytest.mark.parametrize(
    ("native", "shown"),
    [((3000, 2000), (320, 480)), ((96, 80), (400, 480)), ((300, 200), (200, 300))],
)
def test_a_picture_is_brought_to_a_size_for_the_page(tmp_path, native, shown):
    cases, scores = [case("1", "a", 0.5)], region([group("a", 1, 0.6)])
    page = written(tmp_path, summary([scores], ("a",)), cases, {"1": picture("1", native)})
    links = [link for link in page.links if link.startswith("data:image/")]
    assert len(links) == 2
    for link in links:
        image = Image.open(io.BytesIO(base64.b64decode(link.split(",")[1])))
        assert image.size == shown  # width, height: 480 at most, small ones by a whole factor


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
    assert "A group of more than 200 cases has bars" in page.text
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
