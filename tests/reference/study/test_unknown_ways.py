"""Prediction without the attribute: what is averaged, and what the page says of it."""

import pytest
import torch

from reference_models.study import tables
from reference_models.study.documents import STUDY, UNKNOWN
from reference_models.study.jobs import Job
from reference_models.study.scenes import Design, Sizes
from reference_models.study.unknown import page, plan, trials
from reference_models.study.unknown.trials import (
    averaged,
    classified,
    run_unknown,
    train_classifier,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_outputs_are_averaged_by_the_weights_of_each_sample():
    probability_VBKHW = torch.rand(3, 2, 4, 5, 6)
    weight_BV = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    found_BKHW = averaged([*probability_VBKHW], weight_BV)
    by_hand = sum(w * p for w, p in zip((0.2, 0.3, 0.5), probability_VBKHW[:, 0], strict=True))
    assert torch.allclose(found_BKHW[0], by_hand)
    assert torch.equal(found_BKHW[1], probability_VBKHW[0, 1])


def test_a_classifier_learns_what_the_image_shows(monkeypatch):
    monkeypatch.setattr(trials, "_CLASSIFIER_STEPS", 40)
    value_N = torch.arange(32) % 2
    image_NCHW = torch.randn(32, 1, 32, 32) * (1 + 3 * value_N[:, None, None, None])
    classifier = train_classifier(image_NCHW, value_N, 2, seed=0)
    weight_NV = classified(classifier, image_NCHW)
    assert torch.allclose(weight_NV.sum(1), torch.ones(32))
    assert (weight_NV.argmax(1) == value_N).float().mean() > 0.9


@pytest.mark.parametrize("method", ["film", "wide"])
def test_a_network_is_scored_by_every_way_that_there_is_for_it(method, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "_CLASSIFIER_STEPS", 1)
    design = Design(Sizes(12, 2, 2, 1, 32), shares=(0.5, 0.5))
    rows = run_unknown(Job("rule", method, 3, 1003, 0.006), design, tmp_path)
    passes = {row.way: row.passes for row in rows}
    if method == "wide":
        assert passes == {trials.BLIND: 1}
    else:
        assert passes == {
            trials.RIGHT: 1, trials.POLICY: 1, trials.GUESS: 1, trials.SHARES: 2, trials.WEIGHED: 2,
        }  # fmt: skip
    assert not [*tmp_path.glob("runs/*")]
    text = page.text_of(rows)
    assert text.count("not run.") == len(plan.SCENES_TRIED) - 1


def test_no_seed_is_tested_on_which_a_learning_rate_was_chosen():
    tried = tables.RATES.read(STUDY)
    jobs = [*plan.jobs(tried)]
    assert len({*jobs}) == len(jobs) == 5 * 3 * 4
    tuned_on = {row.data_seed for row in tables.TRIALS.read(STUDY)}
    assert not tuned_on & {job.data_seed for job in jobs}
    rate = {(job.scene, job.method): job.learning_rate for job in jobs}
    assert rate["mri", "dmoe-learned"] == rate["mri", "dmoe"]
    assert [job.data_seed for job in jobs] == sorted(job.data_seed for job in jobs)


def test_the_committed_page_is_what_the_committed_table_gives():
    rows = trials.UNKNOWN_SCORES.read(UNKNOWN)
    assert (UNKNOWN / page.PAGE).read_text(encoding="utf-8") == page.text_of(rows)


def test_the_page_says_how_many_seeds_of_the_plan_have_all_methods():
    rows = [
        trials.UnknownScore("mri", method, seed, 0.01, trials.RIGHT, 1, 0.5, 0.5, 0.5, 0.25)
        for method in plan.METHODS_TRIED
        for seed in plan.SEEDS
    ]
    assert "**5 of 5 seeds have all methods.**" in page.text_of(rows)
    assert "**4 of 5 seeds have all methods: nothing is decided yet.**" in page.text_of(rows[:-1])


def test_the_page_compares_a_way_with_todays_policy_on_the_seeds_that_both_have():
    def row(way, seed, es_dice, method="film"):
        return trials.UnknownScore("rule", method, seed, 0.01, way, 1, es_dice, 0.5, 0.5, 0.25)

    policy = [row(trials.POLICY, seed, 0.5) for seed in (20, 21)]
    shares = [row(trials.SHARES, seed, 0.6 + seed / 1000) for seed in (20, 21, 22)]
    blind = [row(trials.BLIND, 20, 0.7, "wide")]
    text = page.text_of([*policy, *shares, *blind])
    assert text.count("**0 of 5 seeds have all methods: nothing is decided yet.**") == 3
    lines = text.splitlines()
    (line,) = (line for line in lines if page.WORDS[trials.SHARES] in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == "**.621** (.620 … .622; 3)"
    assert cells[4] == "+.120 (.114 to .127; 2 of 2)"
    assert cells[5] == "-.080 (no interval; 0 of 1)"
