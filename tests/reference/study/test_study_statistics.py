"""The study's numbers: worked by hand, against brute force and scipy, and what intervals hold."""

import csv
import itertools
import json
import platform
import random
from dataclasses import replace

import numpy as np
import pytest
from harness.study_trials import (
    SHARES,
    made_population,
    made_trials,
    resampled,
    trial,
    write_made_tables,
)
from scipy.stats import bootstrap

import dmoe_layer
from reference_models.metrics import fairness
from reference_models.study.methods import METHODS
from reference_models.study.results import write_tables
from reference_models.study.statistics import METRICS, Resampled, case_counts, load_distance, scores
from reference_models.study.tables import CONTENTS, TABLES

A, B = ("dmoe", "right"), ("film", "right")


def test_every_score_of_a_trial_by_hand():
    # Site 0 under protocol 0: .9 .7, under 1: .5; site 1 under 0: .4, under 1: .2 .3.
    attributes = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 1), (1, 1)]
    seen = [True, True, True, True, False, False]
    got = scores(trial([0.9, 0.7, 0.5, 0.4, 0.2, 0.3], attributes, seen=seen), "right", (0.7, 0.3))
    overall = 0.7 * 0.7 + 0.3 * 0.3
    expected = {
        "overall": overall,
        "es_dice": overall / (1 + (0.7 - overall) + (overall - 0.3)),
        "worst": 0.3,
        "gap": 0.4,
        "seen": (0.8 + 0.5 + 0.4) / 3,  # combinations weigh alike
        "unseen": 0.25,
    }
    assert {metric: value.item() for metric, value in got.items()} == pytest.approx(expected)
    assert [*got] == [*METRICS]


def test_a_case_counts_as_often_as_it_is_drawn():
    attributes = [(0,), (0,), (1,), (1,)]
    drawn = scores(
        trial([0.9, 0.5, 0.3, 0.1], attributes), "right", (0.5, 0.5), np.array([[2, 0, 0, 2.0]])
    )
    assert drawn["overall"] == pytest.approx([0.5 * 0.9 + 0.5 * 0.1])
    assert drawn["worst"] == pytest.approx([0.1])


def test_where_all_combinations_are_seen_there_is_no_unseen_score():
    assert [*scores(trial([0.5, 0.5], [(0,), (1,)]), "right", (0.5, 0.5))] == [*METRICS[:4]]


def test_a_group_without_a_share_is_an_error_that_names_the_trial():
    with pytest.raises(ValueError, match=r"got 2 shares.*rule-dmoe-data10.*cases of \[2\]"):
        scores(trial([0.5, 0.5], [(0,), (2,)]), "right", (0.5, 0.5))


def test_draws_keep_the_size_of_every_combination_and_subjects_whole():
    # Two slices under all three protocols, one under the first two, four cases of their own.
    subjects = [*"aaabbbcc", *"defg"]
    attributes = [(0,), (1,), (2,)] * 2 + [(0,), (1,)] + [(0,)] * 3 + [(2,)]
    of = trial([0.5] * 12, attributes, subjects=subjects)
    counts_DN = case_counts(of, 200, np.random.default_rng(0))
    assert counts_DN.shape == (200, 12)
    for value in range(3):
        members = [place for place, own in enumerate(attributes) if own == (value,)]
        assert (counts_DN[:, members].sum(1) == len(members)).all()
    for subject in "abc":
        own = [place for place, name in enumerate(subjects) if name == subject]
        assert (counts_DN[:, own] == counts_DN[:, own[:1]]).all()
    assert (counts_DN[:, 6] == 1).all()  # the only one of its kind
    assert set(np.unique(counts_DN[:, 8])) == {0, 1, 2, 3}


def test_a_method_less_itself_is_nothing_and_a_shift_is_itself_in_every_draw():
    rng = np.random.default_rng(0)
    dice_SN = rng.uniform(0.2, 0.7, (5, 20))
    attributes = [(0,)] * 12 + [(1,)] * 8
    same = resampled(dice_SN, dice_SN, attributes).difference("es_dice", A, B)
    assert (same.value, same.low, same.high, same.by_seed) == (0, 0, 0, (0,) * 5)
    shifted = resampled(dice_SN + 0.1, dice_SN, attributes)
    for metric in ("overall", "worst"):
        found = shifted.difference(metric, A, B)
        assert [found.value, found.low, found.high, *found.by_seed] == pytest.approx([0.1] * 8)


def test_where_cases_are_all_alike_the_interval_is_that_of_all_draws_of_seeds():
    ahead = [0.02, 0.11, 0.05, -0.03, 0.07]
    dice_SN = np.full((5, 4), 0.5)
    found = resampled(
        dice_SN + np.array(ahead)[:, None], dice_SN, [(0,), (0,), (1,), (1,)], resamples=20000
    ).difference("overall", A, B)
    every = [np.mean(drawn) for drawn in itertools.product(ahead, repeat=5)]
    assert found.by_seed == pytest.approx(ahead)
    assert found.value == pytest.approx(np.mean(ahead))
    assert (found.low, found.high) == pytest.approx(np.percentile(every, [2.5, 97.5]), abs=2e-3)


def test_where_seeds_are_all_alike_and_share_a_test_set_it_is_that_of_the_cases():
    rng = np.random.default_rng(1)
    dice_N = rng.uniform(0.2, 0.9, 30)
    other_N = dice_N - rng.normal(0.1, 0.1, 30)
    found = resampled(
        [dice_N] * 5, [other_N] * 5, [(0,)] * 30, shared=True, population=(1.0,), resamples=20000
    ).difference("overall", A, B)
    oracle = bootstrap(
        (dice_N - other_N,), np.mean, method="percentile", n_resamples=20000, random_state=rng
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx([oracle.low, oracle.high], abs=2e-3)


@pytest.mark.parametrize("shared", [False, True])
def test_seeds_and_their_cases_are_drawn_as_a_loop_would(shared):
    rng = np.random.default_rng(2)
    attributes = [(0,)] * 6 + [(1,)] * 4
    dice_a, dice_b = rng.uniform(0.2, 0.9, (2, 2, 10))
    found = resampled(dice_a, dice_b, attributes, shared=shared, resamples=20000)

    def es_dice(dice_N, places):
        means = {0: dice_N[places[:6]].mean(), 1: dice_N[places[6:]].mean()}
        return fairness.es_dice(means, {0: 0.7, 1: 0.3})

    def case_places():
        return np.concatenate([rng.integers(0, 6, 6), rng.integers(6, 10, 4)])

    draws = []
    for _ in range(8000):
        once, seeds = case_places(), rng.integers(0, 2, 2)
        places = [once if shared else case_places() for _ in seeds]
        draws.append(
            np.mean(
                [
                    es_dice(dice_a[s], p) - es_dice(dice_b[s], p)
                    for s, p in zip(seeds, places, strict=True)
                ]
            )
        )
    low, high = np.percentile(draws, [2.5, 97.5])
    got = found.difference("es_dice", A, B)
    assert (got.low, got.high) == pytest.approx([low, high], abs=0.03 * (high - low))


def test_one_seed_has_a_score_and_no_interval():
    found = resampled([[0.9, 0.8]], [[0.5, 0.6]], [(0,), (1,)]).difference("overall", A, B)
    assert found.value == pytest.approx(0.7 * 0.4 + 0.3 * 0.2)
    assert (found.low, found.high) == (None, None)


def test_the_interval_is_of_the_resamples_alone():
    rng = np.random.default_rng(3)
    found = resampled(*rng.uniform(0.2, 0.9, (2, 4, 2)), [(0,), (1,)], resamples=1)
    estimate = found.difference("overall", A, B)
    assert estimate.low == estimate.high
    assert min(estimate.by_seed) < estimate.low < max(estimate.by_seed)


def test_methods_are_compared_over_the_seeds_that_both_have():
    same = [(0,), (1,)]
    trials = {
        "dmoe": {s: trial([0.5 + s / 10] * 2, same, seed=s) for s in (1, 2, 3)},
        "film": {s: trial([0.5] * 2, same, method="film", seed=s) for s in (2, 3, 4)},
        "wide": {s: trial([0.5] * 2, same, method="wide", seed=s) for s in (7,)},
    }
    found = Resampled(trials, (0.5, 0.5), one_test_set=False)
    assert found.difference("overall", A, B).by_seed == pytest.approx([0.2, 0.3])
    assert found.score("overall", *A).by_seed == pytest.approx([0.6, 0.7, 0.8])
    assert found.difference("overall", A, ("wide", "right")) is None


def test_methods_with_other_test_cases_are_not_compared():
    trials = {"dmoe": {1: trial([0.5, 0.5], [(0,), (1,)])}}
    other = {"film": {1: trial([0.5, 0.5], [(0,), (0,)], method="film")}}
    with pytest.raises(ValueError, match=r"rule-film-.* not those of rule-dmoe-"):
        Resampled(trials | other, (0.5, 0.5), one_test_set=False)
    two_seeds = {"dmoe": {1: trials["dmoe"][1], 2: other["film"][1]}}
    with pytest.raises(ValueError, match="cannot be compared"):
        Resampled(two_seeds, (0.5, 0.5), one_test_set=True)
    Resampled(two_seeds, (0.5, 0.5), one_test_set=False)


def test_the_distance_of_loads_is_the_mean_over_pairs_of_values_that_have_a_case():
    table = [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0]]
    assert load_distance(table) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert load_distance(table[:1]) is None


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    write_made_tables(folder)
    return folder


def test_the_scores_of_every_trial_follow_from_its_cases(tables):
    cases = {}
    for row in rows_of(tables / "cases.csv"):
        cases.setdefault((row["scene"], row["data_seed"], row["init_seed"]), []).append(row)
    checked = set()
    for row in rows_of(tables / "trials.csv"):
        if row["condition"] == "right":
            own = cases[row["scene"], row["data_seed"], row["init_seed"]]
            dice = [float(case[row["method"]]) for case in own]
            means = fairness.group_means(dice, [int(case["group"]) for case in own])
            shares = dict(enumerate(SHARES))
            assert float(row["overall"]) == pytest.approx(fairness.overall(means, shares), abs=2e-4)
            assert float(row["es_dice"]) == pytest.approx(fairness.es_dice(means, shares), abs=2e-4)
            assert float(row["gap"]) == pytest.approx(np.ptp([*means.values()]), abs=2e-4)
            assert float(row["worst"]) == pytest.approx(min(means.values()), abs=1e-4)
            assert row["worst"] == row[f"dice_{row['worst_group']}"]
            unseen = [d for d, case in zip(dice, own, strict=True) if case["seen"] == "no"]
            assert bool(unseen) == bool(row["unseen"]) == (row["scene"] == "two")
            if unseen:  # whose combinations are equally large
                assert float(row["unseen"]) == pytest.approx(np.mean(unseen), abs=1e-4)
            checked.add((row["scene"], row["method"], row["spread"]))
    assert (
        len(checked) == 4 * sum(m.kind != "ablation" for m in METHODS.values()) + len(METHODS) + 3
    )


def test_every_difference_is_that_of_two_trials_of_the_same_seed(tables):
    found = {}
    for row in rows_of(tables / "trials.csv"):
        if row["spread"] == "no":
            tag = "" if row["condition"] == "right" else f"@{row['condition']}"
            found.setdefault((row["scene"], row["method"] + tag), []).append(row)
    pairs = {}
    for row in rows_of(tables / "differences.csv"):
        own, other = (found[row["scene"], row[side]] for side in "ab")
        expected = [
            float(a[row["metric"]]) - float(b[row["metric"]])
            for a, b in zip(own, other, strict=True)
        ]
        got = [float(value) for value in row["by_seed"].split(";")]
        assert got == pytest.approx(expected, abs=2e-4)
        assert float(row["difference"]) == pytest.approx(np.mean(got), abs=1e-4)
        assert float(row["low"]) <= float(row["difference"]) <= float(row["high"])
        assert int(row["ahead"]) == sum(value > 0 for value in got)
        assert row["seeds"] == "5"
        pairs.setdefault(row["scene"], set()).add((row["a"], row["b"]))
    told = [n for n, m in METHODS.items() if m.settings.told and m.kind != "ablation"]
    conditions = {(f"{m}@{c}", m) for m in told for c in ("shuffled", "wrong", "unknown")}
    whole = [method for method in METHODS if METHODS[method].kind != "ablation"][::-1]
    for scene, own in pairs.items():
        if scene != "rule":
            assert own == {*itertools.combinations(whole, 2)} | conditions
    assert ("dmoe", "film") in pairs["mri"]
    assert {("k1", "dmoe"), ("k1@wrong", "k1"), ("dmoe-within", "dmoe")} <= pairs["rule"]
    assert not {("k1", "film"), ("dmoe", "k1"), ("k8", "k1"), ("k1", "k8")} & pairs["rule"]


def test_the_summary_holds_the_mean_and_the_ends_of_the_trials(tables):
    found = {}
    for row in rows_of(tables / "trials.csv"):
        if row["spread"] == "no":
            found.setdefault((row["scene"], row["method"], row["condition"]), []).append(row)
    summary = rows_of(tables / "summary.csv")
    for row in summary:
        trials = found[row["scene"], row["method"], row["condition"]]
        values = [float(own[row["metric"]]) for own in trials]
        assert float(row["mean"]) == pytest.approx(np.mean(values), abs=1e-4)
        assert [float(row["lowest"]), float(row["highest"])] == [min(values), max(values)]
        assert float(row["low"]) <= float(row["mean"]) <= float(row["high"])
    assert len(summary) == sum(6 if scene == "two" else 4 for scene, _, _ in found)


def test_rates_name_the_chosen_one_and_whether_it_lies_at_the_grids_end(tables, tmp_path):
    rows = rows_of(tables / "rates.csv")
    own = [row for row in rows if row["scene"] == "mri"]
    assert {row["method"] for row in own} == {
        name for name, method in METHODS.items() if method.kind != "ablation" and not method.rate_of
    }
    rates = {
        method: [(r["learning_rate"], r["chosen"], r["edge"]) for r in own if r["method"] == method]
        for method in ("dense", "film")
    }
    assert rates == {
        "dense": [("0.003", "no", "no"), ("0.006", "no", "no"), ("0.012", "yes", "yes")],
        "film": [("0.003", "no", "no"), ("0.006", "yes", "no"), ("0.012", "no", "no")],
    }
    trials = made_trials(["none"], ["film"])
    nothing = dict.fromkeys(("cases", "subjects", "attributes", "seen"), ())
    trials["tuning"][2] = replace(
        trials["tuning"][2], validation=-np.inf, dice={}, told_right={}, loads={}, **nothing
    )
    write(tmp_path, trials)
    assert [row["validation"] for row in rows_of(tmp_path / "rates.csv")][2] == "-inf"


def write(folder, trials):
    write_tables(
        folder,
        **trials,
        population=made_population(),
        milliseconds={},
        settings={},
        seconds=1.0,
    )


def test_spread_is_the_standard_deviation_over_initialisations_and_over_seeds(tables):
    trials = [
        row
        for row in rows_of(tables / "trials.csv")
        if (row["scene"], row["method"], row["condition"]) == ("rule", "film", "right")
    ]
    (row,) = [row for row in rows_of(tables / "spread.csv") if row["method"] == "film"]
    inits = [float(own["es_dice"]) for own in trials if own["data_seed"] == "10"]
    seeds = [float(own["es_dice"]) for own in trials if own["spread"] == "no"]
    assert (row["inits"], row["seeds"]) == (str(len(inits)), str(len(seeds))) == ("5", "5")
    assert float(row["over_inits"]) == pytest.approx(np.std(inits, ddof=1), abs=1e-4)
    assert float(row["over_seeds"]) == pytest.approx(np.std(seeds, ddof=1), abs=1e-4)


def test_loads_and_their_distances_are_those_of_the_trials(tables):
    (made,) = made_trials(["two"], ["dmoe"], [10])["main"]
    mine = {"scene": "two", "method": "dmoe", "data_seed": "10", "attribute": "protocol"}
    own, (distance,) = (
        [row for row in rows_of(tables / name) if mine.items() <= row.items()]
        for name in ("loads.csv", "load_distances.csv")
    )
    told = ("right", "shuffled", "wrong")  # cases of unknown value have no row
    assert [(row["condition"], row["value"]) for row in own] == [*itertools.product(told, "01")]
    for row in own:
        got = [float(share) for share in row["shares"].split(";")]
        expected = made.loads[row["condition"]]["protocol"][int(row["value"])]
        assert got == pytest.approx(expected, abs=1e-4)
    apart = np.abs(np.subtract(*made.loads["right"]["protocol"])).sum() / 2
    assert float(distance["distance"]) == pytest.approx(apart, abs=1e-4)


def test_seeds_share_a_test_set_in_real_mri_alone(tmp_path):
    # Of seeds that are all alike, the mean varies with the cases: of one set, or of five.
    trials = made_trials(["rule", "mri"], ["film"])
    first = trials["main"][0]
    alike = [replace(first, job=own.job) for own in trials["main"]]
    write(tmp_path, {"main": alike, "tuning": [], "spread": []})
    width = {
        row["scene"]: float(row["high"]) - float(row["low"])
        for row in rows_of(tmp_path / "summary.csv")
        if (row["condition"], row["metric"]) == ("right", "overall")
    }
    assert width["mri"] / width["rule"] == pytest.approx(5**0.5, rel=0.1)


def test_costs_stand_beside_those_of_dense(tables):
    rows = {row["method"]: row for row in rows_of(tables / "costs.csv")}
    assert [*rows] == [*METHODS]
    assert rows["dense"]["multiply_adds_of_dense"] == rows["dense"]["milliseconds_of_dense"]
    assert rows["dense"]["milliseconds_of_dense"] == "1.0000"
    assert rows["wide"]["milliseconds"] == "21.5000"
    assert rows["wide"]["milliseconds_of_dense"] == "1.0750"


@pytest.mark.parametrize(
    ("scenes", "methods", "seeds", "shares"),
    [
        (["rule"], ["dense"], [3], (0.5, 0.5)),
        (["mri", "two"], ["film", "dmoe", "k1"], [3, 1], (0.4, 0.3, 0.2, 0.1)),
        (["none", "rule"], ["k1", "k8", "film"], [0, 1], (0.9, 0.1)),
        (["mri"], ["group-dro"], [5], (0.5, 0.5)),
    ],
)
def test_any_part_of_a_study_has_all_its_tables(tmp_path, scenes, methods, seeds, shares):
    write_made_tables(tmp_path, scenes, methods, seeds, shares=shares)
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted(CONTENTS)
    for table in TABLES:
        with (tmp_path / table.name).open(encoding="utf-8") as file:
            columns = tuple(file.readline().strip().split(","))
        assert columns[: len(table.columns)] == table.columns
    trials = rows_of(tmp_path / "trials.csv")
    assert {row["scene"] for row in trials} == {*scenes}
    summary = rows_of(tmp_path / "summary.csv") + rows_of(tmp_path / "differences.csv")
    several = len(seeds) > 1
    assert all(bool(row["low"]) == bool(row["high"]) == several for row in summary)


def test_tables_do_not_depend_on_the_order_in_which_jobs_ended(tmp_path):
    trials = made_trials(["mri", "rule"], ["film", "dmoe", "k1"])
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        for own in trials.values():
            random.Random(folder).shuffle(own)
        write(tmp_path / folder, trials)
    for name in CONTENTS:
        one, other = (tmp_path / folder / name for folder in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_a_method_has_the_same_numbers_whichever_others_are_beside_it(tables, tmp_path):
    write_made_tables(tmp_path, ["two", "mri"], ["film", "dmoe"])
    for name in ("differences.csv", "summary.csv"):
        assert {*map(str, rows_of(tmp_path / name))} <= {*map(str, rows_of(tables / name))}


def test_the_machine_is_named_and_no_host_or_folder(tables):
    found = json.loads((tables / "machine.json").read_text(encoding="utf-8"))
    versions = {"python", "torch", "numpy", "dmoe_layer"}
    assert {*found} == {"machine", "cores", "settings", "seconds"} | versions
    assert found["python"] == platform.python_version()
    assert found["dmoe_layer"] == dmoe_layer.__version__
    assert found["settings"]["seeds"] == [10, 11, 12, 13, 14]


def coverage(seeds, deviation, *, repetitions):
    """How often the interval of a mean difference holds the truth, .05.

    24 cases in three groups, whose differences have a standard deviation of .07; those of the
    seeds have `deviation`.
    """
    rng = np.random.default_rng(0)
    group_N = np.repeat(range(3), 8)
    attributes = [(group,) for group in group_N.tolist()]
    held = 0
    for _ in range(repetitions):
        hard_SN = rng.normal(0.7 - 0.08 * group_N, 0.1, (seeds, 24))
        seed_S1 = rng.normal(0.05, deviation, (seeds, 1))
        a, b = hard_SN + rng.normal(0, 0.05, (2, seeds, 24)) + np.stack([seed_S1, 0 * seed_S1])
        found = resampled(a, b, attributes, resamples=200, population=SHARES)
        estimate = found.difference("overall", A, B)
        held += estimate.low <= 0.05 <= estimate.high
    return held / repetitions


def test_intervals_over_five_seeds_hold_what_the_module_says_of_them():
    # Where test cases are all that varies, too often; where seeds are, not often enough.
    assert coverage(5, 0.0, repetitions=120) >= 0.95
    assert 0.75 <= coverage(5, 0.1, repetitions=120) <= 0.9
