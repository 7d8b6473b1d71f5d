"""nnU-Net's commands from planning to the report by subgroup, and what they refuse."""

import functools
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from harness.nnunet_home import SITE

from dmoe_layer import routing
from reference_models.errors import DataError
from reference_models.nnunet.__main__ import main

pytestmark = pytest.mark.usefixtures("home", "one_thread")


@pytest.fixture(scope="module")
def trained(home):
    """What training and resuming it print; both were run by the command that users type."""
    train = functools.partial(
        home.run, "nnUNetv2_train", 1, "3d_fullres", 0, "-tr", "ShortDMoE", "-device", "cpu"
    )
    return train(fails=True, STOP="1"), train("--c")


@pytest.fixture
def predict(home, trained, tmp_path):
    """Predicts the two test cases by our command, in this process."""

    def run(*arguments, images=home.dataset / "imagesTs"):
        given = ["-i", images, "-o", tmp_path / "masks", "-d", 1, "-c", "3d_fullres", "-f", 0]
        given += ["-tr", "ShortDMoE", "-device", "cpu", "-npp", 1, "-nps", 1, *arguments]
        return main([str(argument) for argument in given])

    return run


def test_training_goes_on_where_it_stopped(home, trained):
    resumed = trained[1]
    assert [re.findall(r"Epoch (\d)", text) for text in trained] == [["0"], ["1"]]
    assert "Validation complete" in resumed
    fold = home.trained() / "fold_0"
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 2
    assert checkpoint["init_args"]["plans"]["dmoe"] == {"site": ["A", "B"]}
    plans = json.loads((home.trained() / "plans.json").read_text(encoding="utf-8"))
    assert plans["dmoe"] == {"site": ["A", "B"]}
    # The plans that other trainers start from know nothing of it.
    planned = home.preprocessed / home.dataset.name / "nnUNetPlans.json"
    assert "dmoe" not in json.loads(planned.read_text(encoding="utf-8"))
    summary = json.loads((fold / "validation" / "summary.json").read_text(encoding="utf-8"))
    assert len(summary["metric_per_case"]) == 2


def test_predictions_by_our_command_are_scored_by_subgroup(home, trained, tmp_path):
    masks, report = tmp_path / "masks", tmp_path / "report"
    home.run(
        *("reference_models.nnunet", "-i", home.dataset / "imagesTs", "-o", masks, "-d", 1),
        *("-c", "3d_fullres", "-f", 0, "-tr", "ShortDMoE", "-device", "cpu"),
    )
    for case in ("p10", "p11"):
        image = nib.load(home.dataset / "imagesTs" / f"{case}_0000.nii.gz")
        mask = nib.load(masks / f"{case}.nii.gz")
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-5)
    home.run(
        *("reference_models", "evaluate", "predictions", "--folder", masks, "--data", "folder"),
        *("--root", home.dataset, "--attributes", "site", "--out", report),
    )
    rows = (report / "cases.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [
        [case, SITE[case], region] for case in ("p10", "p11") for region in ("organ", "lesion")
    ]
    assert (report / "report.html").stat().st_size > 10_000


def test_each_window_in_each_mirroring_is_told_its_own_cases_attribute(predict, monkeypatch):
    from reference_models.nnunet import predictor as module

    told, opened = [], []
    load = module.nnUNetPredictor.initialize_from_trained_model_folder

    def load_and_listen(self, *arguments, **options):
        load(self, *arguments, **options)
        self.network.register_forward_pre_hook(
            lambda _, args: told.append(routing.attribute_values(args[0], 2).item())
        )

    def opening(attributes, *, record):
        opened.append(record)
        return routing(attributes, record=record)

    monkeypatch.setattr(
        module.nnUNetPredictor, "initialize_from_trained_model_folder", load_and_listen
    )
    monkeypatch.setattr(module, "routing", opening)
    assert predict() == 0
    assert told == [0] * 8 + [1] * 8  # p10 of site A, p11 of site B
    assert opened == [False, False]


def test_another_attribute_gives_another_answer(home, predict, tmp_path):
    def probabilities(*arguments):
        assert predict("--save_probabilities", *arguments) == 0
        return {c: np.load(tmp_path / f"masks/{c}.npz")["probabilities"] for c in ("p10", "p11")}

    told_truly = probabilities()
    csv = home.write_csv(tmp_path / "other.csv", p10="B")
    told_wrongly = probabilities("--attributes", csv)
    assert (told_truly["p10"] != told_wrongly["p10"]).any()
    np.testing.assert_array_equal(told_truly["p11"], told_wrongly["p11"])


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"p11": "C"}, "p11: site is 'C', expected one of A, B, or an empty cell"),
        ({"p10": ""}, "1 of 2 cases have an unknown attribute (p10)"),
        ({"p11": "b"}, "p11: site is 'b', expected one of A, B, or an empty cell"),
    ],
)
def test_a_case_whose_value_was_not_trained_is_refused_before_any_work(
    home, predict, tmp_path, capsys, changed, text
):
    csv = home.write_csv(tmp_path / "other.csv", **changed)
    assert predict("--attributes", csv) == 1
    assert text in capsys.readouterr().err
    assert not [*(tmp_path / "masks").iterdir()]


def test_a_case_without_a_row_is_refused_before_any_work(home, predict, tmp_path, capsys):
    csv = tmp_path / "other.csv"
    csv.write_text("case,site\np10,A\n", encoding="utf-8")
    assert predict("--attributes", csv) == 1
    assert "no row for case p11" in capsys.readouterr().err
    assert predict("--attributes", tmp_path / "none.csv") == 1
    assert "none.csv: there is no such file" in capsys.readouterr().err
    assert not [*(tmp_path / "masks").iterdir()]


def test_prediction_without_further_processes_is_refused(predict, capsys):
    assert predict("-npp", 0, "-nps", 0) == 1
    assert "add -npp 1 -nps 1" in capsys.readouterr().err


def test_a_control_is_trained_and_predicted_by_nnunets_own_commands(home, tmp_path, capsys):
    home.run("nnUNetv2_train", 1, "3d_fullres", 0, "-tr", "ShortPlainMoE", "-device", "cpu")
    arguments = ["-i", home.dataset / "imagesTs", "-o", tmp_path / "masks", "-d", 1]
    arguments += ["-c", "3d_fullres", "-f", 0, "-tr", "ShortPlainMoE", "-device", "cpu"]
    home.run("nnUNetv2_predict", *arguments)
    assert len([*(tmp_path / "masks").glob("*.nii.gz")]) == 2
    assert main([str(argument) for argument in arguments]) == 1
    assert "predict by nnUNetv2_predict" in capsys.readouterr().err


@pytest.fixture
def copied(home, tmp_path, monkeypatch):
    """A csv of the test's own in the preprocessed folder, which is read before the raw one."""
    path = home.preprocessed / home.dataset.name / "attributes.csv"
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    yield functools.partial(home.write_csv, path)
    path.unlink()


def test_training_refuses_a_fold_with_an_unknown_attribute(home, copied):
    copied(p03="")
    trainer = home.trainer()
    with pytest.raises(DataError, match=re.escape("1 of 10 cases have an unknown attribute (p03)")):
        trainer.run_training()
    assert trainer.dataloader_train is None


def test_training_refuses_a_fold_that_lacks_a_value(home, copied):
    trainer = home.trainer()
    trainer.initialize()
    _, validation = trainer.do_split()
    copied(**{validation[0]: "C"})
    with pytest.raises(DataError, match="no training case of this fold has site C"):
        home.trainer().run_training()


def test_training_refuses_to_go_on_with_other_values(home, trained, copied, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(home.results))
    copied(p03="C")
    with pytest.raises(DataError, match=r"was begun with \{'site': \['A', 'B'\]\}"):
        home.trainer().initialize()
