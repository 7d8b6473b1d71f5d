"""Runs to be evaluated: of a network of a test's own, a U-Net, a TransUNet; a tool's masks."""

import pytest
import torch
from harness.evaluations import FEW, SIZE, Bars, Ruler
from PIL import Image

from reference_models.data import DataSettings, PhantomSettings
from reference_models.data.splits import Splits, make_splits
from reference_models.evaluation import evaluate as evaluation
from reference_models.evaluation import masks as mask_files
from reference_models.evaluation import trained_run
from reference_models.evaluation.evaluate import (
    EvaluatePredictions,
)
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.networks import TransUNetSettings, UNetSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.checkpoints import save_best
from reference_models.training.runs import Task, build_model, write_run


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
        monkeypatch.setattr(trained_run, "load_model", lambda run, which, **_: loaded)
        ids = tuple(case.case_id for case in dataset.cases)
        splits = Splits(dataset.name, 0, ids if trained is None else trained, (), ids)
        for module in (trained_run, evaluation):
            monkeypatch.setattr(module, "open_dataset", lambda settings, **known: dataset)
        monkeypatch.setattr(trained_run, "read_splits", lambda *_, **__: splits)
        monkeypatch.setattr(mask_files, "choose_splits", lambda *_, **__: splits)
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return folder

    return place


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
        monkeypatch.setattr(trained_run, "read_splits", lambda *_, **__: splits)
        monkeypatch.setattr(trained_run, "open_dataset", lambda settings, **known: dataset)
        return run

    return write


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
