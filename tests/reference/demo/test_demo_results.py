"""The committed runs of the demo tell one story on any machine, and the pages tell it too."""

import math
from pathlib import Path

import pytest

from reference_models.demo.command import METHODS
from reference_models.demo.scores import ranges, read_rows
from reference_models.demo.verdict import BLIND, CLEAR, TOLD
from reference_models.markdown import section

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "reference_models" / "demo" / "results"


@pytest.fixture(scope="module")
def rows():
    return [row for path in sorted(RESULTS.glob("*.csv")) for row in read_rows(path)]


def es_dice_of(rows, run):
    """By method and the attributes that it received, of one seed on one instruction set."""
    return {
        (row.method, row.attributes): row.dice["ES-Dice"]
        for row in rows
        if (row.cpu_capability, row.seed) == run
    }


def test_the_pages_figures_are_those_of_the_committed_runs(rows):
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert section("demo", ranges(rows)) in page
    runs = {(row.cpu_capability, row.seed) for row in rows}
    assert f"In all {len(runs)} runs" in page
    gains, apart = [], [0.0]
    for run in runs:
        score = es_dice_of(rows, run)
        told = min(score[method, "as given"] for method in TOLD)
        gains.append(told - max(score[method, "as given"] for method in BLIND))
        for other in runs:
            if other[1] == run[1]:
                again = es_dice_of(rows, other)
                apart += [abs(again[method] - score[method]) for method in score]
    assert f"by {math.floor(100 * min(gains)) / 100:.2f} ES-Dice".replace("0.", ".", 1) in page
    most = f"{math.ceil(1000 * max(apart)) / 1000:.3f}".replace("0.", ".", 1)
    assert f"AVX2 and AVX-512 differ by {most} ES-Dice at most" in page


def test_the_readmes_ranges_are_those_of_the_committed_runs(rows):
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for methods, sentence in (
        (TOLD, "The two networks that receive the site score {} [ES-Dice]"),
        (BLIND, "The two that do not receive it score {}."),
    ):
        given = [row for row in rows if row.attributes == "as given"]
        scores = [row.dice["ES-Dice"] for row in given if row.method in methods]
        ends = (f"{end:.2f}".removeprefix("0") for end in (min(scores), max(scores)))
        assert sentence.format(" to ".join(ends)) in readme


def test_ten_seeds_ran_with_each_of_two_instruction_sets(rows):
    runs = {(row.cpu_capability, row.seed) for row in rows}
    assert runs >= {(name, seed) for name in ("AVX2", "AVX512") for seed in range(10)}
    for run in runs:
        of_run = [r for r in rows if (r.cpu_capability, r.seed) == run]
        assert [r.method for r in of_run if r.attributes == "as given"] == [*METHODS]


def test_no_groups_dice_depends_on_seed_or_machine_by_more_than_two_hundredths(rows):
    for method in METHODS:
        of_method = [r.dice for r in rows if (r.method, r.attributes) == (method, "as given")]
        for group in of_method[0].keys() - {"ES-Dice"}:
            dice = [scores[group] for scores in of_method]
            assert max(dice) - min(dice) <= 0.04, (method, group)


def test_in_every_run_the_networks_that_receive_the_site_are_clearly_ahead_and_level(rows):
    for run in {(row.cpu_capability, row.seed) for row in rows}:
        score = es_dice_of(rows, run)
        told = [score[method, "as given"] for method in TOLD]
        blind = [score[method, "as given"] for method in BLIND]
        assert min(told) > max(blind) + CLEAR
        assert max(told) - min(told) <= CLEAR
        assert score["dMoE", "shuffled"] < min(blind)
