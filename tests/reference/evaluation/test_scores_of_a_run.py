"""Scores of a run: a network whose every answer is known, told the truth, a lie or nothing."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from harness.evaluations import FEW, SIZE, Bars, Ruler, dice_of, read_json
from PIL import Image

from dmoe_layer import AttributeRouter, DMoE
from reference_models.data.cases import Attribute
from reference_models.evaluation.evaluate import (
    EvaluateRun,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.prediction import PredictSettings, predict


def test_a_network_told_the_truth_a_lie_or_nothing_scores_as_worked_out_by_hand(run_of):
    run = run_of(Ruler(unknown="learned"), Bars())
    summary = evaluate_run(EvaluateRun(run, scoring=FEW, batch_size=5))
    assert [c.name for c in summary.conditions] == ["as given", "shuffled", "wrong", "unknown"]
    assert dice_of(summary, "as given") == [1, 1, 1]
    # Told nothing it draws 8 columns: Dice 2 w / (w + 8).
    assert dice_of(summary, "unknown") == pytest.approx([2 / 9, 4 / 10, 8 / 12])
    # A lie: 1 for 2 columns 2/3, 1 for 4 columns 2/5, 2 for 4 columns 4/6.
    allowed = [{2 / 3, 2 / 5}, {2 / 3, 4 / 6}, {2 / 5, 4 / 6}]
    for value, between in zip(dice_of(summary, "wrong"), allowed, strict=True):
        assert min(between) - 1e-9 <= value <= max(between) + 1e-9
    notes = {c.name: c.note for c in summary.conditions}
    assert notes["as given"] == "Each case had its true attribute."
    assert "0 of 12 cases got their true values" in notes["wrong"]
    assert "0 of 12 cases got their true values" in notes["unknown"]
    # As many of the shuffled are right as score 1.
    right = int(notes["shuffled"].split(". ")[1].split(" ")[0])
    assert right < 12
    rates = dice_of(summary, "shuffled")
    assert max(rates) < 1
    assert right == 0 or max(rates) > 2 / 3


def test_distances_are_in_the_data_sets_unit_and_spacing(run_of):
    # Blind, it always draws 2 columns: beside 4, the far one is 2 columns of 0.5 mm away. Of the
    # true outline's distances 0 0 .5 1 the 95th percentile is .5 + .85 * .5.
    summary = evaluate_run(EvaluateRun(run_of(Ruler(aware=False), Bars()), scoring=FEW))
    groups = summary.conditions[0].scores["width"][0].groups
    assert groups[2].metrics["hd95"].value == pytest.approx(0.925)
    assert groups[2].metrics["surface_dice"].value == 1  # all within 1 mm
    assert summary.unit == "mm"


def test_a_network_that_is_not_told_runs_no_conditions_and_says_why(run_of):
    summary = evaluate_run(EvaluateRun(run_of(Ruler(aware=False), Bars()), scoring=FEW))
    given, *others = summary.conditions
    assert given.scores
    assert [len(row) for row in given.load["width"]] == [4, 4, 4]  # its experts have loads anyway
    assert [c.scores for c in others] == [{}, {}, {}]
    assert all("does not receive the attributes" in c.note for c in others)


def test_loads_are_each_values_shares_over_all_batches(run_of):
    model, dataset = Ruler(), Bars(n=11)
    summary = evaluate_run(EvaluateRun(run_of(model, dataset), scoring=FEW, batch_size=4))
    # The router alone, all cases at once.
    router = model.layer.router
    assert isinstance(router, AttributeRouter)
    images = torch.stack([torch.from_numpy(dataset.load(c).image_CS) for c in dataset.cases])
    told = torch.tensor([c.attributes[0] for c in dataset.cases])
    routed = router(images.flatten(1)[..., None], told)
    table = summary.conditions[0].load["width"]
    for value in range(3):
        chosen = routed.expert_indices[routed.attributes == value]
        shares = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
        assert table[value] == pytest.approx(shares.tolist(), abs=1e-6)


def test_several_attributes_have_tables_of_their_own_and_are_all_told_wrongly(run_of, monkeypatch):
    dataset = Bars()
    dataset.attributes = (*Bars.attributes, Attribute("side", ("left", "right")))
    dataset.population = {"side": (0.9, 0.1)}
    dataset.cases = tuple(
        dataclasses.replace(case, attributes=(*case.attributes, place // 6))
        for place, case in enumerate(dataset.cases)
    )
    model = Ruler()
    model.layer = DMoE(1, n_experts=4, k=1, attribute_sizes=(3, 2), unknown="average").eval()
    told, experts = [], []
    forward = model.layer.forward

    def listening(*args, **options):
        y, routed = forward(*args, **options)
        told.append(routed.attributes.reshape(-1, SIZE * SIZE, 2)[:, 0])
        experts.append(routed.expert_indices.flatten())
        return y, routed

    monkeypatch.setattr(model.layer, "forward", listening)
    summary = evaluate_run(EvaluateRun(run_of(model, dataset), scoring=FEW))
    given, _, wrong, _ = summary.conditions
    for name, n_values in (("width", 3), ("side", 2)):
        place = [*given.load].index(name)
        values = told[0][:, place]
        table = np.array(given.load[name])
        assert table.shape == (n_values, 4)
        for value in range(n_values):
            chosen = torch.cat(experts)[: 12 * SIZE * SIZE].reshape(12, -1)[values == value]
            shares = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
            assert table[value] == pytest.approx(shares.tolist(), abs=1e-6)
    assert [g.n for g in given.scores["side"][0].groups] == [6, 6]
    assert summary.population == {"width": (1 / 3, 1 / 3, 1 / 3), "side": (0.9, 0.1)}
    right, permuted, lies, unknown = told
    assert (unknown == -1).all()
    assert right.tolist() == [list(case.attributes) for case in dataset.cases]
    assert (lies != right).all()
    assert sorted(permuted.tolist()) == sorted(right.tolist())
    left, other = (g.metrics["dice"].value for g in wrong.scores["side"][0].groups)
    overall = wrong.scores["side"][0].overall["dice"].value
    assert overall == pytest.approx(0.9 * left + 0.1 * other)


def test_the_files_hold_the_same_scores_in_full(run_of, tmp_path):
    dataset = Bars()
    run = run_of(Ruler(aware=False), dataset)
    summary = evaluate_run(EvaluateRun(run, scoring=FEW))
    out = run / "evaluation-test"
    assert sorted(p.name for p in out.iterdir()) == [
        "cases.csv", "masks", "report.html", "summary.json",
    ]  # fmt: skip
    assert read_json(out) == json.loads(json.dumps(dataclasses.asdict(summary)))
    with (out / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "case_id", "width", "region", "truth_size", "predicted_size", "dice", "iou", "hd95_mm",
        "surface_dice",
    ]  # fmt: skip
    assert [row["case_id"] for row in rows] == [case.case_id for case in dataset.cases]
    assert [row["width"] for row in rows[:3]] == ["one", "two", "four"]
    for place, group in enumerate(summary.conditions[0].scores["width"][0].groups):
        dice = [float(row["dice"]) for row in rows[place::3]]
        assert group.metrics["dice"].value == pytest.approx(np.mean(dice), rel=1e-15)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert "axial" not in page  # as of volumes


def test_the_same_run_gives_the_same_bytes_and_another_seed_does_not(run_of, tmp_path):
    run = run_of(Ruler(unknown="average"), Bars())
    texts = []
    for name, seed, batch_size in (("a", 0, 16), ("b", 0, 5), ("c", 1, 16)):
        scoring = dataclasses.replace(FEW, seed=seed)
        settings = EvaluateRun(run, scoring=scoring, out=tmp_path / name, batch_size=batch_size)
        evaluate_run(settings)
        texts.append((tmp_path / name / "summary.json").read_bytes())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_intervals_are_of_the_seed_and_the_number_of_draws_asked_for(other_tool):
    dataset, folder, settings = other_tool
    for number, case in enumerate(dataset.cases):
        mask = dataset.load(case).mask_S
        mask[12, : 1 + number] = 1  # too much, from case to case more
        Image.fromarray(mask).save(folder / f"{case.case_id}.png")
    texts = []
    for change in ({}, {"seed": 1}, {"resamples": 101}, {}):
        scoring = dataclasses.replace(FEW, **change)
        summary = evaluate_predictions(dataclasses.replace(settings, scoring=scoring))
        ((region,),) = summary.conditions[0].scores.values()
        texts.append((region.es_dice.low, region.es_dice.high))
        assert region.es_dice.low < region.es_dice.value < region.es_dice.high
    assert texts[0] == texts[3]
    assert len({*texts}) == 3


def test_a_router_that_is_noisy_in_evaluation_gives_the_same_masks_whatever_else_is_run(
    run_of, tmp_path
):
    class Noisy(Ruler):
        def forward(self, image_B1HW):
            return super().forward(image_B1HW) + torch.randn(len(image_B1HW), 2, SIZE, SIZE)

    run = run_of(Noisy(), Bars())
    evaluate_run(EvaluateRun(run, scoring=FEW, out=tmp_path / "own", batch_size=5))
    predict(PredictSettings(run, out=tmp_path / "predicted", batch_size=5))
    for path in (tmp_path / "own" / "masks").iterdir():
        assert path.read_bytes() == (tmp_path / "predicted" / "masks" / path.name).read_bytes()
