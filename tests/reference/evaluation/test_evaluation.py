"""Evaluation and prediction: a network whose every answer is known, and other tools' masks."""

import csv
import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import needs_links
from PIL import Image
from torch import nn

from dmoe_layer import AttributeRouter, DMoE, routing
from reference_models.data import DataSettings, PhantomSettings
from reference_models.data.cases import Attribute, Case, Dataset, Sample
from reference_models.data.splits import Splits, make_splits
from reference_models.errors import DataError
from reference_models.evaluation import evaluate as evaluation
from reference_models.evaluation import prediction
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
    EvaluateRun,
    Scoring,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.masks import read_mask, write_mask
from reference_models.evaluation.prediction import PredictSettings, RunSettings, predict
from reference_models.metrics.scores import METRICS
from reference_models.models.inference import forward_with_attributes
from reference_models.models.unet import UNet
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.networks import TransUNetSettings, UNetSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.checkpoints import load_model, save_best
from reference_models.training.runs import Task, build_model, write_run

SIZE = 16
FEW = Scoring(resamples=100, tolerance=1.0)


class Bars(Dataset):
    """Bars of `width` columns, where width - 1 is the attribute; the image shows the row alone.

    The first test case's attribute may be unknown. Rows of 2 mm, columns of 0.5 mm.
    """

    name, classes, channels, unit = "bars", ("background", "bar"), 1, "mm"
    regions = {"bar": (1,)}  # noqa: RUF012
    attributes = (Attribute("width", ("one", "two", "four")),)
    columns = (1, 2, 4)

    def __init__(self, n=12, unknown=()):
        self.loaded = []
        self.cases = tuple(
            Case(f"bar{i}", f"bar{i}", (-1 if i in unknown else i % 3,), "test") for i in range(n)
        )

    def load(self, case):
        self.loaded.append(case.case_id)
        number = int(case.case_id[3:])
        row, width = 2 + number % 10, self.columns[number % 3]
        image = np.zeros((1, SIZE, SIZE), np.float32)
        image[0, row] = 1
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[row, 4 : 4 + width] = 1
        return Sample(case.case_id, image, mask, case.attributes, (2.0, 0.5))


class Ruler(nn.Module):
    """Draws bars exactly as wide as it is told; unknown: 8 columns; blind: 2.

    As `open_run` loads it, it averages where it was trained with unknown="error".
    """

    def __init__(self, aware=True, unknown="error"):
        super().__init__()
        policy = "average" if unknown == "error" else unknown
        sizes = 3 if aware else None
        self.layer = DMoE(1, n_experts=4, k=1, attribute_sizes=sizes, unknown=policy)
        self.aware, self.unknown = aware, unknown
        self.eval()

    def forward(self, image_B1HW):
        tokens_BTD = image_B1HW.flatten(1)[..., None]
        _, routed = self.layer(tokens_BTD, return_routing=True)
        # `routed.attributes` is what the network was told, token by token.
        told_B = routed.attributes.reshape(len(image_B1HW), -1)[:, 0]
        widths_B = torch.tensor([*Bars.columns, 8])[told_B] if self.aware else 2 + 0 * told_B
        column_W = torch.arange(SIZE)
        inside_BW = (column_W >= 4) & (column_W < 4 + widths_B[:, None])
        bar_B1HW = image_B1HW * inside_BW[:, None, None]
        return torch.cat([0.5 - bar_B1HW, bar_B1HW - 0.5], dim=1)


@pytest.fixture
def run_of(tmp_path, monkeypatch):
    """Puts a network and a data set in the place of a trained run; returns its folder."""

    def place(model, dataset, trained=None):
        recipe = Recipe(
            data=DataSettings("phantom"),
            model=TransUNetSettings(aware=model.aware, unknown=model.unknown),
            framing=ImageFramingSettings(SIZE, "whole"),
        )
        loaded = recipe, Task.of(dataset), model
        monkeypatch.setattr(prediction, "load_model", lambda run, which, **_: loaded)
        ids = tuple(case.case_id for case in dataset.cases)
        splits = Splits(dataset.name, 0, ids if trained is None else trained, (), ids)
        for module in (prediction, evaluation):
            monkeypatch.setattr(module, "open_dataset", lambda settings, **known: dataset)
        monkeypatch.setattr(prediction, "read_splits", lambda path, dataset: splits)
        monkeypatch.setattr(evaluation, "choose_splits", lambda dataset, path, seed: splits)
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return folder

    return place


def dice_of(summary, condition):
    (found,) = [c for c in summary.conditions if c.name == condition]
    (region,) = found.scores["width"]
    return [group.metrics["dice"].value for group in region.groups]


def read_json(folder):
    def refuse(name):
        raise AssertionError(name)

    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


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
    assert "0 of 12 were told the truth" in notes["wrong"]
    assert "0 of 12 were told the truth" in notes["unknown"]
    # As many of the shuffled are right as score 1.
    right = int(notes["shuffled"].split("; ")[1].split(" ")[0])
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
    assert all("not told the attributes" in c.note for c in others)


def test_without_a_route_for_the_unknown_the_routers_are_averaged_and_it_says_so(run_of):
    refusing = evaluate_run(EvaluateRun(run_of(Ruler(), Bars()), scoring=FEW))
    averaging = evaluate_run(EvaluateRun(run_of(Ruler(unknown="average"), Bars()), scoring=FEW))
    assert refusing.conditions[3].scores == averaging.conditions[3].scores
    assert refusing.conditions[3].load == averaging.conditions[3].load
    assert "averages over the values" in refusing.conditions[3].note
    assert "averages" not in averaging.conditions[3].note


@pytest.fixture
def unet_run(tmp_path, monkeypatch):
    """Writes a run of the study's U-Net, in little; no two of its parameters are alike."""

    def write(dataset, block, **options):
        settings = UNetSettings(widths=(4,), block=block, hidden=2, **options)
        recipe = Recipe(DataSettings("phantom"), settings, ImageFramingSettings(SIZE, "whole"))
        task, ids = Task.of(dataset), tuple(case.case_id for case in dataset.cases)
        model = build_model(recipe, task)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(torch.randn(value.shape, generator=generator))
        run = tmp_path / f"{block}-{len([*tmp_path.iterdir()])}"
        splits = Splits(dataset.name, 0, (), (), ids)
        write_run(run, recipe, task, splits)
        save_best(run, 0, model.state_dict())
        monkeypatch.setattr(prediction, "read_splits", lambda path, dataset: splits)
        monkeypatch.setattr(prediction, "open_dataset", lambda settings, **known: dataset)
        return run

    return write


@pytest.mark.parametrize("block", ["channels", "film", "per_value", "moe"])
def test_a_unet_of_any_kind_is_told_the_truth_a_lie_or_nothing(block, unet_run, monkeypatch):
    dataset, told, answers = Bars(), [], []
    forward = UNet.forward

    def listening(self, image):
        told.append(routing.attribute_values(image, 3, unknown="average"))
        answers.append(forward(self, image))
        return answers[-1]

    run = unet_run(dataset, block)
    averaging = load_model(unet_run(dataset, block, unknown="average"))[2]
    monkeypatch.setattr(UNet, "forward", listening)
    summary = evaluate_run(EvaluateRun(run, scoring=FEW))
    given, permuted, lies, unknown = told
    assert given.tolist() == [list(case.attributes) for case in dataset.cases]
    assert sorted(permuted.tolist()) == sorted(given.tolist())
    assert permuted.tolist() != given.tolist()
    assert (lies != given).all()
    assert (unknown == -1).all()
    assert not any(torch.equal(answers[0], answer) for answer in answers[1:])
    # Trained with "error" it averages here, as one that was trained to.
    assert "averages over the values" in summary.conditions[3].note
    images = torch.stack([torch.from_numpy(dataset.load(c).image_CS) for c in dataset.cases])
    with routing(unknown):
        expected = forward(averaging, images)
    torch.testing.assert_close(answers[3], expected)
    masks = [read_mask(p, dataset.load(c), dataset.classes) for p, c in paths_of(run, dataset)]
    assert np.array_equal(masks, answers[0].argmax(1))


def paths_of(run, dataset):
    return [
        (run / "evaluation-test" / "masks" / f"{case.case_id}.png", case) for case in dataset.cases
    ]


@pytest.mark.parametrize("unknown", ["error", "average", "learned"])
@pytest.mark.parametrize("block", ["channels", "film", "per_value", "moe"])
def test_a_unets_policy_for_the_unknown_is_found_whatever_its_blocks(unet_run, block, unknown):
    run = prediction.open_run(RunSettings(unet_run(Bars(), block, unknown=unknown)), "test")
    assert run.unknown == unknown
    settings = RunSettings(unet_run(Bars(unknown=(3,)), block, unknown=unknown))
    if unknown == "error":
        with pytest.raises(DataError, match=r"1 of 12 test cases.*bar3.*no route for them"):
            prediction.open_run(settings, "test")
    else:
        assert len(prediction.open_run(settings, "test").cases) == 12


@pytest.mark.parametrize("block", ["channels", "film", "per_value", "moe"])
def test_a_loaded_network_refuses_the_unknown_as_it_was_trained_to_unless_asked(unet_run, block):
    run, image = unet_run(Bars(), block), torch.randn(1, 1, SIZE, SIZE)
    recipe, _, refusing = load_model(run)
    with pytest.raises(ValueError, match="unknown"):
        forward_with_attributes(refusing, [image], torch.tensor([[-1]]))
    kept, _, averaging = load_model(run, refuse_unknown=False)
    forward_with_attributes(averaging, [image], torch.tensor([[-1]]))
    assert kept == recipe
    assert recipe.model.unknown == "error"


def test_a_unet_of_dense_mlps_is_told_nothing_and_refuses_no_case(unet_run):
    for aware in (True, False):
        settings = RunSettings(unet_run(Bars(unknown=(3,)), "mlp", aware=aware))
        run = prediction.open_run(settings, "test")
        assert run.unknown is None
        assert len(run.cases) == 12


def test_what_no_training_case_had_is_said(run_of):
    dataset = Bars()
    trained = tuple(case.case_id for case in dataset.cases if case.attributes != (2,))
    summary = evaluate_run(EvaluateRun(run_of(Ruler(), dataset, trained), scoring=FEW))
    assert "it was never learned: width four" in summary.conditions[0].note
    run = run_of(Ruler(unknown="learned"), dataset)
    assert "never trained" in evaluate_run(EvaluateRun(run, scoring=FEW)).conditions[3].note
    dataset = Bars(unknown=(3,))
    run = run_of(Ruler(unknown="learned"), dataset)
    assert "never trained" not in evaluate_run(EvaluateRun(run, scoring=FEW)).conditions[3].note


@pytest.mark.parametrize("model", [Ruler(), Ruler(aware=False)], ids=["aware", "blind"])
def test_cases_are_left_out_alike_for_every_network_and_for_masks(model, run_of, tmp_path):
    dataset = Bars(unknown=(3, 7))
    run = run_of(model, dataset)
    summary = evaluate_run(EvaluateRun(run, scoring=FEW, leave_out_unknown=True))
    assert summary.n_cases == 10
    masks = run / "evaluation-test" / "masks"
    write_mask(masks, dataset.load(dataset.cases[3]), np.zeros((SIZE, SIZE), np.uint8))
    settings = EvaluatePredictions(
        masks, DataSettings("phantom"), leave_out_unknown=True, out=tmp_path / "again", scoring=FEW
    )
    again = evaluate_predictions(settings)
    assert again.conditions[0].scores == summary.conditions[0].scores
    assert "bar3, bar7" in again.conditions[0].note


def test_prediction_names_the_cases_that_it_leaves_out(run_of, capsys):
    run = run_of(Ruler(), Bars(unknown=(3, 7)))
    predict(PredictSettings(run, leave_out_unknown=True))
    assert "left out, since an attribute is not known: bar3, bar7" in capsys.readouterr().err


def test_cases_without_a_route_are_an_error_up_front_or_left_out_by_name(run_of, tmp_path):
    dataset = Bars(unknown=(3, 7))
    run = run_of(Ruler(), dataset)
    for refuse in (
        lambda: evaluate_run(EvaluateRun(run, scoring=FEW)),
        lambda: predict(PredictSettings(run)),
    ):
        with pytest.raises(DataError, match=r"2 of 12 test cases.*bar3, bar7.*leave-out-unknown"):
            refuse()
    assert dataset.loaded == []
    assert [*run.iterdir()] == []
    summary = evaluate_run(EvaluateRun(run, scoring=FEW, leave_out_unknown=True))
    assert summary.n_cases == 10
    assert "bar3, bar7" in summary.conditions[0].note
    # A network with a route takes them, and they are a group of their own.
    run_of(Ruler(unknown="learned"), dataset)
    summary = evaluate_run(EvaluateRun(run, scoring=FEW, out=tmp_path / "learned"))
    groups = summary.conditions[0].scores["width"][0].groups
    assert [(g.value, g.n) for g in groups] == [("one", 3), ("two", 3), ("four", 4), ("unknown", 2)]
    assert groups[3].metrics["dice"].value == pytest.approx((2 / 9 + 4 / 10) / 2)
    lies = summary.conditions[2]
    assert lies.name == "wrong"
    assert "2 of 12 were told the truth" in lies.note  # who has no truth, is told no lie


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


def test_an_earlier_evaluation_is_replaced_and_nothing_else_is(run_of, tmp_path):
    run, out = run_of(Ruler(), Bars()), tmp_path / "out"
    evaluate_run(EvaluateRun(run, scoring=FEW, out=out))
    first = (out / "summary.json").read_bytes()
    evaluate_run(EvaluateRun(run, scoring=dataclasses.replace(FEW, tolerance=3), out=out))
    assert (out / "summary.json").read_bytes() != first
    (out / "thesis.tex").write_text("mine", encoding="utf-8")
    before = sorted(out.rglob("*"))
    with pytest.raises(DataError, match=r"thesis\.tex"):
        evaluate_run(EvaluateRun(run, scoring=FEW, out=out))
    assert sorted(out.rglob("*")) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_masks_of_the_users_own_are_never_replaced(other_tool, tmp_path):
    _, folder, settings = other_tool
    out = tmp_path / "tool"
    out.mkdir()
    masks = folder.rename(out / "masks")
    before = {path: path.read_bytes() for path in masks.iterdir()}
    with pytest.raises(DataError, match=r"tool: holds masks, which would be lost"):
        evaluate_predictions(dataclasses.replace(settings, folder=masks, out=out))
    with pytest.raises(DataError, match=r"tool: holds masks, which would be lost"):
        predict(PredictSettings(tmp_path / "run", out=out))
    with pytest.raises(DataError, match=r"tool: holds masks, which would be lost"):
        evaluate_run(EvaluateRun(tmp_path / "run", scoring=FEW, out=out))
    assert before == {path: path.read_bytes() for path in masks.iterdir()}


def test_where_nothing_can_be_written_a_sentence_says_so(other_tool, tmp_path, monkeypatch):
    _, _, settings = other_tool
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file/out: cannot be written"):
        evaluate_predictions(dataclasses.replace(settings, out=tmp_path / "file" / "out"))

    def full(path, *rest):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "write_report", full)
        with pytest.raises(DataError, match=r"out: cannot be written .*No space left"):
            evaluate_predictions(settings)
    assert not settings.out.exists()
    assert not [*tmp_path.glob(".out*")]
    settings.out.mkdir()
    monkeypatch.chdir(settings.out)
    with pytest.raises(DataError, match="the folder you are in"):
        evaluate_predictions(dataclasses.replace(settings, out=Path()))


@needs_links
def test_of_a_link_what_it_points_to_is_written(other_tool, tmp_path):
    _, _, settings = other_tool
    (tmp_path / "large disk").mkdir()
    settings.out.symlink_to(tmp_path / "large disk")
    evaluate_predictions(settings)
    assert settings.out.is_symlink()
    assert (tmp_path / "large disk" / "summary.json").is_file()


def test_if_a_case_cannot_be_read_nothing_is_written(run_of, monkeypatch):
    dataset = Bars()
    run = run_of(Ruler(), dataset)
    load = dataset.load

    def damaged(case):
        if case.case_id == "bar9":
            raise DataError("bar9.png: damaged")
        return load(case)

    monkeypatch.setattr(dataset, "load", damaged)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^bar9\.png: damaged$"):
            evaluate_run(EvaluateRun(run, scoring=FEW, workers=workers))
    assert [*run.iterdir()] == []


def test_a_network_without_finite_output_is_named_and_not_scored(run_of):
    class Broken(Ruler):
        def forward(self, image_B1HW):
            return super().forward(image_B1HW) * torch.tensor(float("nan"))

    run = run_of(Broken(), Bars())
    with pytest.raises(DataError, match=r"output for bar0 is not finite"):
        evaluate_run(EvaluateRun(run, scoring=FEW))
    assert [*run.iterdir()] == []


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


def test_of_a_run_of_another_data_set_nothing_is_scored(run_of, monkeypatch):
    run = run_of(Ruler(), Bars())
    other = Bars()
    other.classes = ("background", "bar", "comma")
    monkeypatch.setattr(prediction, "open_dataset", lambda settings, **known: other)
    with pytest.raises(DataError, match=r"was trained for .*but the data are .*comma"):
        evaluate_run(EvaluateRun(run, scoring=FEW))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scoring": Scoring(tolerance=-1)}, "tolerance: got -1"),
        ({"scoring": Scoring(tolerance=float("nan"))}, "tolerance: got nan"),
        ({"scoring": Scoring(resamples=10)}, "resamples: got 10"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"device": "abacus"}, "abacus cannot be used"),
    ],
)
def test_settings_that_cannot_be_are_an_error_before_anything_is_read(run_of, change, words):
    dataset = Bars()
    run = run_of(Ruler(), dataset)
    with pytest.raises(DataError, match=words):
        evaluate_run(EvaluateRun(run, **{"scoring": FEW} | change))
    assert dataset.loaded == []


# A trained network's own files, through the front door.


@pytest.fixture(scope="module")
def phantom_run(tmp_path_factory):
    """A run folder of an untrained small TransUNet on the phantom."""
    settings = PhantomSettings(cases=12, test_cases_per_group=4, image_size=40)
    recipe = Recipe(
        data=DataSettings("phantom", phantom=settings),
        model=TransUNetSettings(variant="small"),
        framing=ImageFramingSettings(32, "whole"),
        batch_size=4,
        epochs=1,
    )
    dataset = evaluation.open_dataset(recipe.data)
    run = tmp_path_factory.mktemp("runs") / "phantom"
    write_run(run, recipe, Task.of(dataset), make_splits(dataset, 0))
    torch.manual_seed(3)
    save_best(run, 0, build_model(recipe, Task.of(dataset)).state_dict())
    return run, recipe


def test_predicted_masks_score_exactly_what_the_run_scores(phantom_run, tmp_path):
    run, recipe = phantom_run
    own = evaluate_run(EvaluateRun(run, scoring=FEW, out=tmp_path / "own"))
    folder = predict(PredictSettings(run, out=tmp_path / "predicted"))
    other = evaluate_predictions(
        EvaluatePredictions(folder / "masks", recipe.data, out=tmp_path / "other", scoring=FEW)
    )
    assert other.conditions[0].scores == own.conditions[0].scores
    assert (tmp_path / "own/cases.csv").read_bytes() == (tmp_path / "other/cases.csv").read_bytes()
    assert own.n_cases == 12
    assert own.conditions[0].load["site"]
    assert any(
        group.metrics["dice"].value > 0
        for region in own.conditions[0].scores["site"]
        for group in region.groups
    )
    for case_id in (f"phantom{i:05}" for i in range(12, 24)):
        with Image.open(folder / "masks" / f"{case_id}.png") as mask:
            assert (mask.size, mask.mode) == ((40, 40), "L")
        with Image.open(folder / "overlays" / f"{case_id}.png") as seen:
            assert (seen.size, seen.mode) == ((40, 40), "RGB")


def test_all_predicts_every_case(phantom_run, tmp_path):
    run, _ = phantom_run
    folder = predict(PredictSettings(run, split="all", out=tmp_path / "all"))
    assert len([*(folder / "masks").iterdir()]) == 24


# Other tools' masks.


@pytest.fixture
def other_tool(run_of, tmp_path):
    """Bars, a folder with a perfect mask for each, and the settings to score it."""
    dataset = Bars()
    run_of(Ruler(), dataset)
    folder = tmp_path / "masks"
    folder.mkdir()
    for case in dataset.cases:
        Image.fromarray(dataset.load(case).mask_S).save(folder / f"{case.case_id}.png")
    settings = EvaluatePredictions(
        folder, DataSettings("phantom"), out=tmp_path / "out", scoring=FEW
    )
    return dataset, folder, settings


def test_masks_come_as_grey_palette_or_one_bit_png_or_as_npy(other_tool):
    dataset, folder, settings = other_tool
    masks = [dataset.load(case).mask_S for case in dataset.cases]
    palette = Image.fromarray(masks[0], mode="P")
    palette.putpalette([200, 10, 10, 10, 200, 10])  # colours are not labels
    palette.save(folder / "bar0.png")
    Image.fromarray(masks[1] > 0).save(folder / "bar1.png")
    for number, dtype in ((2, np.int64), (3, bool), (4, np.uint16)):
        (folder / f"bar{number}.png").unlink()
        np.save(folder / f"bar{number}.npy", masks[number].astype(dtype))
    (folder / "dataset.json").write_text(
        "{}", encoding="utf-8"
    )  # as nnU-Net leaves beside its masks
    (folder / "._bar0.png").write_bytes(b"\0")  # as macOS leaves beside its copies
    (folder / "overlays").mkdir()
    summary = evaluate_predictions(settings)
    assert dice_of(summary, "as given") == [1, 1, 1]
    assert [c.name for c in summary.conditions] == ["as given"]
    assert summary.source == str(folder)
    assert sorted(p.name for p in settings.out.iterdir()) == [
        "cases.csv", "report.html", "summary.json",
    ]  # fmt: skip


def test_empty_masks_are_scored_by_the_policy_and_counted(other_tool):
    _, folder, settings = other_tool
    for number in (0, 3, 6, 9):  # all of value "one"
        Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folder / f"bar{number}.png")
    summary = evaluate_predictions(settings)
    (region,) = summary.conditions[0].scores["width"]
    one = region.groups[0]
    assert (one.missed, one.n, one.n_defined["hd95"]) == (4, 4, 0)
    assert [one.metrics[metric].value for metric in METRICS] == [0, 0, None, 0]
    assert read_json(settings.out)["conditions"][0]["scores"]["width"][0]["overall"]["hd95"] == {
        "value": None, "low": None, "high": None,
    }  # fmt: skip
    with (settings.out / "cases.csv").open(newline="", encoding="utf-8") as file:
        assert [row["hd95_mm"] for row in csv.DictReader(file)][:2] == ["", "0.0"]


def test_everything_wrong_with_a_folder_of_masks_is_in_one_error_and_nothing_is_written(other_tool):
    dataset, folder, settings = other_tool
    good = dataset.load(dataset.cases[0]).mask_S
    (folder / "bar0.png").unlink()
    Image.fromarray(good).save(folder / "bar00.png")
    Image.fromarray(good[:, 1:]).save(folder / "bar1.png")
    Image.fromarray(good * 255).save(folder / "bar2.png")
    Image.fromarray(np.stack([good] * 3, -1)).save(folder / "bar3.png")
    (folder / "bar4.png").write_bytes((folder / "bar5.png").read_bytes()[:60])
    np.save(folder / "bar5.npy", good)
    (folder / "bar6.png").unlink()
    np.save(folder / "bar6.npy", good.astype(np.float32))
    (folder / "bar7.png").unlink()
    np.save(folder / "bar7.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "bar8.png").unlink()
    np.save(folder / "bar8.npy", good.astype(np.int16) - 1)
    (folder / "bar9.png").write_bytes(b"")
    Image.fromarray(good.astype(np.uint16)).save(folder / "bar10.png")
    (folder / "bar11.png").unlink()
    (folder / "bar11.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00{'a':(")
    with pytest.raises(DataError) as caught:
        evaluate_predictions(settings)
    text = str(caught.value)
    for words in (
        "1 of 12 cases have no mask (<case id>.png or <case id>.npy): bar0.",
        "1 masks are of no case of this split: bar00.png.",
        "bar1.png: got size (16, 15), expected the image's, (16, 16)",
        "bar2.png: got label 255, expected labels, not grey levels: 0 background, 1 bar",
        "bar3.png: cannot be read (a PNG of mode RGB",
        "bar4.png: cannot be read",
        "bar5.npy and bar5.png: two masks of one case",
        "bar6.npy: cannot be read (got float32, expected integer labels",
        "bar7.npy: cannot be read",
        "bar8.npy: got label -1, expected labels",
        "bar9.png: cannot be read",
        "bar10.png: cannot be read (a PNG of mode I;16",
        "bar11.npy: cannot be read",
    ):
        assert words in text, words
    assert len(text.splitlines()) == 14
    assert not settings.out.exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["masks", "run"]


def test_a_folder_that_is_not_there_is_named(other_tool, tmp_path):
    _, _, settings = other_tool
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        evaluate_predictions(dataclasses.replace(settings, folder=tmp_path / "nowhere"))


def unknown(size):
    """A sample of this size whose mask nobody knows."""
    return Sample("mask", np.zeros((1, *size), np.float32), None, (), (1.0,) * len(size))


def test_no_damaged_byte_of_a_png_goes_unnoticed(tmp_path):
    mask = (np.random.default_rng(0).random((40, 30)) > 0.5).astype(np.uint8)
    Image.fromarray(mask).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "damaged.png").write_bytes(damaged)
        try:
            read = read_mask(tmp_path / "damaged.png", unknown(mask.shape), ("background", "bar"))
        except DataError:
            continue
        assert (read == mask).all(), place


def test_a_palette_whose_places_may_not_be_the_labels_is_refused(tmp_path):
    path, size, classes = tmp_path / "mask.png", (6, 4), ("background", "rim", "cup")
    mask = np.zeros(size, np.uint8)
    mask[1:3], mask[4] = 1, 2
    for greys in ((0, 1, 2), (0, 128, 255), (0, 0, 0)):
        image = Image.fromarray(mask, mode="P")
        image.putpalette(np.repeat(greys, 3).tolist())
        image.save(path)
        assert (read_mask(path, unknown(size), classes) == mask).all()
    empty = np.zeros(size, np.uint8)
    for labels in (mask, empty):
        # As Pillow and tools that make PNGs small do: 2, 1, 0 for 0, 1, 2.
        image = Image.fromarray(2 - labels, mode="P")
        image.putpalette(np.repeat([2, 1, 0], 3).tolist())
        image.save(path)
        with pytest.raises(DataError, match=r"mask\.png: .*greys are 2, 1, 0"):
            read_mask(path, unknown(size), classes)


def test_a_pickle_in_a_mask_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"trap\.npy"):
        read_mask(tmp_path / "trap.npy", unknown((1,)), ("background",))
    assert not (tmp_path / "sprung").exists()
