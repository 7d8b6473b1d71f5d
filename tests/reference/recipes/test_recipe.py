"""Recipes: the paper's numbers, flags, learning rates, and settings that do not fit together."""

import dataclasses
from pathlib import Path

import pytest
import tyro
from harness.trainings import (
    TINY,
)

from reference_models.data import DataSettings
from reference_models.data.datasets import DATASETS
from reference_models.errors import DataError, RunError
from reference_models.recipes.framings import ImageFramingSettings, VolumeFramingSettings
from reference_models.recipes.networks import ResUNet3DSettings, UNetSettings
from reference_models.recipes.presets import PRESETS
from reference_models.recipes.recipe import Recipe, learning_rate, resolve
from reference_models.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_papers_numbers_are_the_presets():
    paper, released = resolve(PRESETS["paper"]), resolve(PRESETS["released"])
    assert (paper.epochs, paper.framing.crop, paper.framing.size, paper.batch_size) == (
        300,
        512,
        224,
        42,
    )
    assert (paper.optimizer, paper.learning_rate, paper.schedule) == ("adamw", 0.01, "exponential")
    assert (paper.lambda_dice, paper.lambda_ce) == (0, 1)
    ham = resolve(dataclasses.replace(PRESETS["paper"], data=DataSettings("ham10000")))
    assert (ham.epochs, ham.framing.crop) == (100, 1024)
    assert (released.optimizer, released.learning_rate) == ("sgd", 0.0175)
    assert (released.momentum, released.weight_decay, released.schedule) == (0.9, 1e-4, "poly")
    assert (released.lambda_dice, released.lambda_ce) == (0.5, 0.5)


def test_a_recipe_becomes_flags():
    presets = {name: (name, recipe) for name, recipe in PRESETS.items()}
    flags = ["paper", "--root", "x", "--fairness", "febs", "--crop", "whole", "--epochs", "7"]
    recipe = tyro.extras.overridable_config_cli(presets, args=flags)
    assert isinstance(recipe, Recipe)
    assert (recipe.fairness, recipe.framing.crop, recipe.epochs) == ("febs", "whole", 7)
    assert recipe.data.root == Path("x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": "paper"}, "epochs: got 'paper', but the paper does not train on phantom"),
        ({"framing": ImageFramingSettings(32)}, "crop: got 'paper'.*whole"),
        ({"batch_size": 5, "devices": 2}, "batch_size: got 5, expected a multiple of 2"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, expected more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate: got inf, expected .* finite"),
        ({"balance_weight": float("inf")}, "balance_weight: got inf, expected .* finite"),
        ({"decay": 5.0}, "decay: got 5.0, expected more than 0 and at most 1"),
        ({"seed": -1}, "seed: got -1, expected 0 or more"),
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected .* less than"),
        ({"warmup": 1.0}, "warmup: got 1.0"),
        ({"patience": 0}, "patience: got 0"),
        ({"lambda_dice": 0.0, "lambda_ce": 0.0}, "both are 0, so that there is no loss"),
        ({"lambda_dice": 0.0, "fairness": "febs"}, "febs scales the Dice loss"),
        (
            {"strategy": "fsdp", "precision": "16-mixed"},
            "16-mixed, which the strategy fsdp does not support",
        ),
        ({"framing": ImageFramingSettings(40, "whole")}, "multiples of 16"),
        (
            {"batch_size": 30},
            "but there are only 18 training cases; choose --batch-size 18 or less",
        ),
        ({"attribute_dropout": 1.0}, "attribute_dropout: got 1.0"),
        (
            {"attribute_dropout": 0.5},
            r"refuses unknown attributes \(--unknown error\); choose --unknown learned",
        ),
        (
            {"attribute_dropout": 0.5, "model": UNetSettings(block="mlp", unknown="average")},
            "attribute_dropout: got 0.5, but this network receives no attributes",
        ),
        (
            {"model": UNetSettings(), "framing": ImageFramingSettings(36, "whole")},
            "size: got 36, expected a multiple of 8",
        ),
        (
            {"model": UNetSettings(block="film", aware=False)},
            "block: got film, which needs attributes",
        ),
        ({"model": UNetSettings(gradient_checkpointing=True)}, "gradient_checkpointing"),
        ({"model": UNetSettings(k=5, hidden=2)}, "hidden: got 2"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(RunError, match=words):
        train(dataclasses.replace(TINY, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_whether_data_are_images_or_volumes_stands_in_their_table(monkeypatch):
    images = dataclasses.replace(TINY, data=DataSettings("phantom"))
    volumes = Recipe(images.data, ResUNet3DSettings(), VolumeFramingSettings(), epochs=1)
    assert resolve(images).model.axes == 2
    with pytest.raises(RunError, match=r"^data: phantom has 2D images, but the preset is for vol"):
        resolve(volumes)
    row = dataclasses.replace(DATASETS["phantom"], axes=3)
    monkeypatch.setitem(DATASETS, "phantom", row)
    assert resolve(volumes).model.axes == 3
    with pytest.raises(RunError, match=r"^data: phantom has volumes, but the preset is for 2D im"):
        resolve(images)
    with pytest.raises(DataError, match=r"^data: got 'fairsag', expected one of fairseg"):
        resolve(dataclasses.replace(images, data=DataSettings("fairsag")))


def test_learning_rates_follow_their_schedules():
    recipe = dataclasses.replace(TINY, epochs=5, learning_rate=2.0, warmup=0.0)
    rates = {
        schedule: [
            learning_rate(dataclasses.replace(recipe, schedule=schedule), step, 10)
            for step in range(50)
        ]
        for schedule in ("exponential", "poly", "cosine")
    }
    by_epoch = [2.0 * 0.01 ** (epoch / 4) for epoch in range(5) for _ in range(10)]
    assert rates["exponential"] == pytest.approx(by_epoch)
    assert rates["poly"][25] == pytest.approx(2.0 * 0.5**0.9)
    assert rates["cosine"][25] == pytest.approx(1.0)
    warm = dataclasses.replace(recipe, schedule="poly", warmup=0.2)
    assert learning_rate(warm, 4, 10) == pytest.approx(rates["poly"][4] / 2)
    assert learning_rate(warm, 9, 10) == pytest.approx(rates["poly"][9])
