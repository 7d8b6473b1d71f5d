"""Runs that the tests of export write: untrained networks, of large weights."""

import numpy as np
import torch
from PIL import Image

from reference_models.data import DataSettings, PhantomSettings, open_dataset
from reference_models.data.splits import Splits
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.networks import UNetSettings
from reference_models.recipes.recipe import Recipe
from reference_models.training.checkpoints import save_best
from reference_models.training.runs import Task, build_model, write_run

PHANTOM = DataSettings(
    "phantom", phantom=PhantomSettings(cases=12, test_cases_per_group=4, image_size=40)
)


def small_recipe(**model):
    """A network of one stage, few experts, and so a small program."""
    settings = UNetSettings(**{"widths": (4,), "hidden": 2, "n_experts": 3, "k": 2, **model})
    return Recipe(PHANTOM, settings, ImageFramingSettings(16, "whole"), batch_size=5)


def write_untrained(folder, recipe, seed=1):
    """A run that tests on all cases but two; returns its folder.

    The network's parameters are large and unlike, so that its masks depend on image and attribute.
    """
    dataset = open_dataset(recipe.data)
    ids = tuple(case.case_id for case in dataset.cases)
    write_run(folder, recipe, Task.of(dataset), Splits(dataset.name, 0, ids[:1], ids[1:2], ids[2:]))
    model, generator = build_model(recipe, Task.of(dataset)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    save_best(folder, 0, model.state_dict())
    return folder


def masks_in(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}
