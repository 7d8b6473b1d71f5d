"""Attributes that are not known: a route for them, an average, or cases left out by name."""

import numpy as np
import pytest
import torch
from harness.evaluations import FEW, SIZE, Bars, Ruler

from dmoe_layer import routing
from reference_models.data import DataSettings
from reference_models.errors import DataError
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
    EvaluateRun,
    evaluate_predictions,
    evaluate_run,
)
from reference_models.evaluation.masks import read_mask, write_mask
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.evaluation.trained_run import RunSettings, open_run
from reference_models.models.inference import forward_with_attributes
from reference_models.models.unet import UNet
from reference_models.training.checkpoints import load_model


def test_without_a_route_for_the_unknown_the_routers_are_averaged_and_it_says_so(run_of):
    refusing = evaluate_run(EvaluateRun(run_of(Ruler(), Bars()), scoring=FEW))
    averaging = evaluate_run(EvaluateRun(run_of(Ruler(unknown="average"), Bars()), scoring=FEW))
    assert refusing.conditions[3].scores == averaging.conditions[3].scores
    assert refusing.conditions[3].load == averaging.conditions[3].load
    assert "here it averages over all values." in refusing.conditions[3].note
    assert "averages" not in averaging.conditions[3].note


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
    assert "here it averages over all values." in summary.conditions[3].note
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
    run = open_run(RunSettings(unet_run(Bars(), block, unknown=unknown)), "test")
    assert run.unknown == unknown
    settings = RunSettings(unet_run(Bars(unknown=(3,)), block, unknown=unknown))
    if unknown == "error":
        with pytest.raises(DataError, match=r"1 of 12 cases \(test\).*bar3.*no router for them"):
            open_run(settings, "test")
    else:
        assert len(open_run(settings, "test").cases) == 12


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
        run = open_run(settings, "test")
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
    assert "left out, because an attribute is not known: bar3, bar7" in capsys.readouterr().err


def test_cases_without_a_route_are_an_error_up_front_or_left_out_by_name(run_of, tmp_path):
    dataset = Bars(unknown=(3, 7))
    run = run_of(Ruler(), dataset)
    for refuse in (
        lambda: evaluate_run(EvaluateRun(run, scoring=FEW)),
        lambda: predict(PredictSettings(run)),
    ):
        with pytest.raises(
            DataError, match=r"2 of 12 cases \(test\).*bar3, bar7.*leave-out-unknown"
        ):
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
    assert "2 of 12 cases got their true values" in lies.note  # the unknown have no other
