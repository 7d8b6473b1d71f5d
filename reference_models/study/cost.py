"""The costs of the study's methods: multiply-adds of a forward pass, milliseconds of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..data.loading import train_batches
from ..models.inference import forward_with_attributes
from ..recipes.recipe import Recipe
from ..training.loop import Run
from ..training.parallel import launch
from .candidates import Merged

# Steps of each method that are timed, and those before, in which memory is laid out.
_ROUNDS, _WARM_UP = 20, 2
# No further round is begun after so many seconds.
_SECONDS = 25.0


def multiply_adds(model: nn.Module, image: tuple[int, int, int], n_attributes: int) -> int:
    """Counts the multiply-adds for one image: of convolutions, matrix products and active experts.

    Args:
        model: a 2D network, in eval mode.
        image: channels, rows and columns.
        n_attributes: number of attributes of the data.
    """
    merging = 0

    def count_merging(block: Merged, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # Once an image, the weights of k experts: a sum of rows, which the counter does not see.
        nonlocal merging
        _, hidden, dim = block.experts.w1_EHD.shape
        merging += 2 * block.experts.k * dim * hidden

    hooks = [
        module.register_forward_hook(count_merging)
        for module in model.modules()
        if isinstance(module, Merged)
    ]
    image_1CHW = torch.zeros(1, *image)
    told_1A = torch.zeros(1, n_attributes, dtype=torch.int64)
    try:
        # With gradients: without them the counter stumbles over parametrized weights.
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            forward_with_attributes(model, [image_1CHW], told_1A, record=False)
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + merging


def step_milliseconds(recipes: Mapping[str, Recipe]) -> dict[str, float]:
    """Milliseconds of a training step of each recipe, the median over rounds.

    A round is one step of each, so that whatever else the machine does meets all of them alike;
    torch.utils.benchmark times one statement to its end before it comes to the next.
    A step is that of training: forward and backward pass, losses and optimizer; no data are made.

    Args:
        recipes: by name, of images; their folders are not written to.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.ExitStack() as held,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        runs, batches = {}, {}
        for name, recipe in recipes.items():
            elsewhere = dataclasses.replace(recipe, out=Path(folder) / name)
            runs[name] = run = Run(launch(elsewhere), elsewhere, False, held)
            run.model.train()
            batches[name] = next(
                train_batches(run.frames, batch_size=recipe.batch_size, epoch=0)
            ).to(run.fabric.device)
        times: dict[str, list[float]] = {name: [] for name in recipes}
        started = time.perf_counter()
        for done in range(_WARM_UP + _ROUNDS):
            for name, run in runs.items():
                begun = time.perf_counter()
                run.step(batches[name], recipes[name].learning_rate)
                times[name].append(1000 * (time.perf_counter() - begun))
            if done > _WARM_UP and time.perf_counter() - started > _SECONDS:
                break
    return {name: statistics.median(taken[_WARM_UP:]) for name, taken in times.items()}
