"""Several networks predict together, by the mean of their probabilities, if they fit together."""

import dataclasses

import numpy as np
import pytest
import torch
from harness.evaluations import FEW, SIZE, Bars, read_json
from harness.nifti_folders import nnunet_folder, save
from PIL import Image

from dmoe_layer import routing
from reference_models.data import DataSettings, open_dataset
from reference_models.data.cases import Attribute
from reference_models.data.splits import Splits
from reference_models.errors import DataError, RunError
from reference_models.evaluation import trained_run
from reference_models.evaluation.evaluate import EvaluateRun, evaluate_run
from reference_models.evaluation.inference import predictions
from reference_models.evaluation.prediction import PredictSettings, predict
from reference_models.evaluation.trained_run import RunSettings, open_run
from reference_models.models.inference import infer
from reference_models.recipes.framings import ImageFramingSettings, VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings, UNetSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.checkpoints import load_model, save_best, save_last
from reference_models.training.runs import Task, build_model, write_run

pytestmark = pytest.mark.usefixtures("one_thread")


def little_unet(**options):
    return UNetSettings(**{"widths": (4,), "hidden": 2} | options)


UNET = Recipe(DataSettings("phantom"), little_unet(), ImageFramingSettings(SIZE, "whole"))


def write(folder, recipe, dataset, seed, splits):
    """A run of a network with weights of its own."""
    task = Task.of(dataset)
    model = build_model(recipe, task)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    write_run(folder, recipe, task, splits)
    save_best(folder, 0, model.state_dict())
    return folder


def parts(*places):
    return Splits("bars", 0, *(tuple(f"bar{i}" for i in place) for place in places))


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Writes runs of a little U-Net on bars, each with weights of its own."""
    dataset = Bars(24)
    monkeypatch.setattr(trained_run, "open_dataset", lambda settings, **known: dataset)

    def place(recipe=UNET, seeds=(1, 2, 3), splits=None):
        splits = splits or parts(range(6), range(6, 12), range(12, 24))
        return tuple(
            write(tmp_path / f"run{len([*tmp_path.iterdir()])}", recipe, dataset, seed, splits)
            for seed in seeds
        )

    return dataset, place


def masks_in(folder):
    return {path.stem: np.asarray(Image.open(path)) for path in (folder / "masks").iterdir()}


def test_the_masks_are_those_of_the_mean_of_the_probabilities(three, tmp_path):
    dataset, place = three
    runs = place()
    found = masks_in(predict(PredictSettings(runs, out=tmp_path / "out", batch_size=5)))
    models = [load_model(run)[2] for run in runs]
    assert len(found) == 12
    alone = []
    for case in dataset.cases[12:]:
        image = torch.from_numpy(dataset.load(case).image_CS[None])
        with routing(torch.tensor([case.attributes])), torch.no_grad():
            each = torch.cat([model(image).softmax(1) for model in models])
        assert np.array_equal(found[case.case_id], each.mean(0).argmax(0))
        alone.append([np.array_equal(found[case.case_id], p.argmax(0)) for p in each])
    assert not np.any(alone, axis=1).all()  # no mask is one network's alone throughout


def test_a_network_and_its_copy_answer_as_it_does_alone_where_frames_are_resized_too(
    three, tmp_path
):
    _, place = three
    recipe = dataclasses.replace(UNET, framing=ImageFramingSettings(12, "whole"))
    (one,) = place(recipe, (1,))
    twice = place(recipe, (1, 1))
    alone = masks_in(predict(PredictSettings(one, out=tmp_path / "alone")))
    together = masks_in(predict(PredictSettings(twice, out=tmp_path / "together")))
    assert alone.keys() == together.keys()
    for case_id, mask_S in alone.items():
        assert np.array_equal(mask_S, together[case_id])
        assert 0 < mask_S.mean() < 1


def test_volumes_are_put_together_from_windows_by_each_network_first(tmp_path):
    settings = nnunet_folder(tmp_path / "data", n=2)
    rng = np.random.default_rng(0)
    for i in range(2):
        for name in (f"imagesTr/p{i}_0000", f"labelsTr/p{i}"):
            voxels = rng.integers(0, 2, (66, 30, 20)).astype(np.int16)
            save(settings.root / f"{name}.nii.gz", voxels, np.eye(4))
    recipe = Recipe(
        settings,
        ResUNet3DSettings(features=2),
        VolumeFramingSettings(spacing=(1.0, 1.0, 1.0), patch=(64, 32, 32)),
    )
    dataset = open_dataset(settings)
    splits = Splits(dataset.name, 0, (), (), ("p0",))
    runs = tuple(write(tmp_path / f"{n}", recipe, dataset, n, splits) for n in range(2))
    run = open_run(RunSettings(runs, batch_size=2), "test")
    told = np.array([case.attributes for case in run.cases])
    ((sample, masks),) = predictions(run, {"as given": told})
    frame = run.framing.apply(dataclasses.replace(sample, mask_S=None))
    image_BCS = torch.from_numpy(frame.image_CS[None])
    assert image_BCS.shape[2] > 64  # more than a window
    probabilities = [
        infer(
            load_model(folder)[2],
            [image_BCS],
            torch.from_numpy(told),
            windows=run.windows,
            device=torch.device("cpu"),
        ).softmax(1)
        for folder in runs
    ]
    expected_S = run.framing.restore(torch.stack(probabilities).mean(0).log()[0], sample)
    assert np.array_equal(masks["as given"], expected_S)
    for one in probabilities:
        assert not np.array_equal(masks["as given"], run.framing.restore(one.log()[0], sample))


def test_several_runs_are_scored_together_and_the_report_says_so(three, tmp_path):
    _, place = three
    runs = place()
    summary = evaluate_run(EvaluateRun(runs, scoring=FEW, out=tmp_path / "out"))
    assert summary.n_cases == 12
    assert summary.networks.startswith("3 networks predicted each case together")
    assert summary.source == ", ".join(map(str, runs))
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert summary.networks in page
    assert "several networks predicted together, whose experts have only" in page
    assert read_json(tmp_path / "out")["networks"] == summary.networks
    header = (tmp_path / "out/cases.csv").read_text(encoding="utf-8").split("\n")[0]
    assert "fold" not in header.split(",")
    alone = evaluate_run(EvaluateRun(runs[0], scoring=FEW, out=tmp_path / "alone"))
    assert alone.networks == ""


def test_scores_on_the_cases_that_chose_the_checkpoint_say_so(three, tmp_path):
    _, place = three
    (run,) = place(seeds=(1,))
    settings = EvaluateRun(run, split="validation", scoring=FEW, out=tmp_path / "out")
    assert "chose the checkpoint out of all epochs" in evaluate_run(settings).networks
    save_last(run, 0, load_model(run)[2].state_dict(), {})
    last = dataclasses.replace(settings, which="last")
    assert "was not chosen by them, as in nnU-Net." in evaluate_run(last).networks
    patient = place(dataclasses.replace(UNET, patience=7), (1,))
    save_last(patient[0], 0, load_model(run)[2].state_dict(), {})
    said = evaluate_run(dataclasses.replace(last, run=patient)).networks
    assert "could end the training early (--patience 7)" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"framing": ImageFramingSettings(12, "whole")}, "framing.size: .* has 16, .* 12"),
        ({"framing": ImageFramingSettings(SIZE, 14)}, "framing.crop: .* has None, .* 14"),
        ({"leave_out_unknown": True}, "leave_out_unknown: .* has False, .* True"),
        (
            {"model": UNetSettings(widths=(4,), hidden=2, unknown="average")},
            "unknown: .* has error",
        ),
        (
            {"model": UNetSettings(widths=(4,), hidden=2, block="mlp")},
            "the network of .* receives the attributes, and the network of .* does not",
        ),
        ({"data": DataSettings("mni152")}, "data.data: .* has phantom, .* mni152"),
    ],
)
def test_runs_that_see_or_know_other_things_do_not_predict_together(three, tmp_path, change, words):
    _, place = three
    runs = place(seeds=(1,)) + place(dataclasses.replace(UNET, **change), (2,))
    with pytest.raises(RunError, match=f"^{runs[1]}: cannot predict together .*; {words}|{words}"):
        predict(PredictSettings(runs, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_runs_of_other_attribute_values_do_not_predict_together(three, tmp_path):
    dataset, place = three
    (one,) = place(seeds=(1,))
    dataset.attributes = (Attribute("width", ("one", "two", "five")),)
    (two,) = place(seeds=(2,))
    with pytest.raises(RunError, match=r"attributes: .* has .*four.*five"):
        predict(PredictSettings((one, two), out=tmp_path / "out"))


def test_other_networks_of_the_same_frames_predict_together(three, tmp_path):
    _, place = three
    others = dataclasses.replace(
        UNET, model=little_unet(widths=(4, 8), block="film"), seed=5, learning_rate=0.1
    )
    runs = place(seeds=(1,)) + place(others, (2,))
    assert len(masks_in(predict(PredictSettings(runs, out=tmp_path / "out")))) == 12


def test_several_runs_need_one_set_of_cases_and_a_folder_to_write(three, tmp_path):
    _, place = three
    runs = place(seeds=(1,))
    runs += place(seeds=(2,), splits=parts(range(6, 12), range(6), range(12, 24)))
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"out: --run has 2 folders; name the folder to write to"):
        predict(PredictSettings(runs))
    with pytest.raises(DataError, match=r"has other validation cases than .*bar0, bar1, bar10 and"):
        predict(PredictSettings(runs, split="validation", out=out))
    with pytest.raises(DataError, match="name each folder once"):
        predict(PredictSettings((runs[0], runs[0]), out=out))
    with pytest.raises(DataError, match="got nothing; name each folder once"):
        predict(PredictSettings((), out=out))
    with pytest.raises(DataError, match="a file holds one network, but --run has 2"):
        predict(PredictSettings(runs, out=out, onnx=tmp_path / "x.onnx"))
    assert not out.exists()
    # Who was trained on which of them does not matter.
    for split in ("test", "all"):
        predict(PredictSettings(runs, split=split, out=tmp_path / split))


def test_what_one_of_them_has_not_learned_is_said_with_its_name(three, tmp_path):
    _, place = three
    # Of bars 2, 5, 8 and so on the width is four.
    runs = place(seeds=(1,), splits=parts(range(12), (), range(12, 24)))
    runs += place(seeds=(2,), splits=parts((0, 1, 3, 4), (), range(12, 24)))
    summary = evaluate_run(EvaluateRun(runs, scoring=FEW, out=tmp_path / "out"))
    assert f"never learned: width four ({runs[1].name})" in summary.conditions[0].note
