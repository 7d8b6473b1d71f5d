"""The metadata of an exported file: the attributes, the classes, and the preprocessing's numbers.

`describe` gives a text for each of these keys, as ONNX stores metadata. All but the last are json.

    dmoe_layer.attributes       [{"name": "stage", "size": 2, "values": ["T1", "T2"],
                                "unknown": "error"}]: the index of a value is its number; unknown
                                says what the number -1 does: error, average or learned
    reference_models.classes    the names of the labels, in their order
    reference_models.channels   the name of each channel and how it is scaled, as in `_channels`
    reference_models.framing    which part of an image or volume the network sees, as in `_framing`
    reference_models.weights    sha256 of the network's weights, which identifies the file's run
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmoe_layer import DMoE

from ..errors import RunError
from ..recipes.framings import FramingSettings, ImageFramingSettings, VolumeFramingSettings
from ..recipes.recipe import Recipe
from ..training.runs import Task

# The layer's exporter writes this key itself.
ATTRIBUTES = "dmoe_layer.attributes"
_WEIGHTS = "reference_models.weights"

# How the data sets of images scale intensities, as in `_channels`.
SCALES: dict[str, dict[str, Any]] = {
    "fairseg": {"scale": "divide", "by": 255},
    "ham10000": {"scale": "divide", "by": 255},
    "mni152": {"scale": "z-score"},
    "phantom": {"scale": "none"},
}


def describe(recipe: Recipe, task: Task, model: nn.Module) -> dict[str, str]:
    """Makes the metadata of an exported run.

    Args:
        recipe, task: the recipe and the task of the run.
        model: the run's network, with the weights that the file holds.
    """
    attributes = [
        {
            "name": each.name,
            "size": len(each.values),
            "values": each.values,
            "unknown": recipe.model.unknown,
        }
        for each in task.attributes
    ]
    said = {
        ATTRIBUTES: attributes,
        "reference_models.classes": task.classes,
        "reference_models.channels": _channels(recipe, task),
        "reference_models.framing": _framing(recipe.framing),
    }
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in said.items()}
    return texts | {_WEIGHTS: _fingerprint(model)}


def require_attributes(run: Path, recipe: Recipe, model: nn.Module) -> None:
    """Raises unless the experts of a run's network receive attributes, and are without noise.

    Raises:
        RunError: the network is dense, a plain mixture of experts, or one of the study's networks
            that receive attributes by another method; or its routers are noisy in evaluation.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, DMoE)]
    if all(layer.attribute_sizes is None for layer in layers):
        raise RunError(
            f"{run}: the network of this run has no experts that receive attributes, which are the "
            "second input of the file. Export it by torch.onnx.export."
        )
    if recipe.model.noise == "always":
        raise RunError(
            f"{run}: this run was trained with --noise always, so that its routers are noisy in "
            "evaluation too, and a file would give a different mask each time. Train with --noise "
            "train to export the run."
        )


def require_same(
    found: Mapping[str, str], expected: Mapping[str, str], path: Path, run: Path
) -> None:
    """Raises unless a file was exported from this run and checkpoint.

    Args:
        found: the file's metadata.
        expected: what `describe` gives for the run.
        path: the file.
        run: the run's folder.

    Raises:
        RunError: the file is of another run or checkpoint, or lacks metadata.
    """
    if missing := [key for key in expected if key not in found]:
        raise RunError(
            f"{path}: this file does not say which run it is of (its metadata lack "
            f"{', '.join(missing)}); export one by `export --run {run}`."
        )
    others = [key for key in expected if key != _WEIGHTS and found[key] != expected[key]]
    if others:
        said = "; ".join(f"{key}: {found[key]}, but the run has {expected[key]}" for key in others)
        raise RunError(f"{path}: this file is of another run or network than {run} ({said}).")
    if found[_WEIGHTS] != expected[_WEIGHTS]:
        raise RunError(
            f"{path}: this file holds other weights than this checkpoint of {run}. It was exported "
            "from another run, from another checkpoint (--which), or before the run went on: "
            "export the run again, or name the run of the file."
        )


def _channels(recipe: Recipe, task: Task) -> list[dict[str, Any]]:
    """Gives the name (or None) and the scale of each channel of the input.

    The scales are: divide: divided by that number. clip: clipped to low..high, which become 0..1.
    range: the channel's lowest and highest value become 0 and 1. z-score: mean 0 and variance 1
    over the voxels that are not 0, the background. none: not changed. body: 1 in the patient's
    body, else 0.
    """
    if not task.channel_names:
        return [{"name": None, **SCALES[recipe.data.data]}] * task.channels
    low, high = recipe.data.ct_window
    by_name: dict[str, dict[str, Any]] = {
        "ct": {"scale": "clip", "low": low, "high": high},
        "nonorm": {"scale": "none"},
        "rescale_to_0_1": {"scale": "range"},
        "rgb_to_0_1": {"scale": "divide", "by": 255},
    }
    z_score = {"scale": "z-score"}
    scaled = [{"name": name, **by_name.get(name.lower(), z_score)} for name in task.channel_names]
    return [*scaled, *([{"name": "body", "scale": "body"}] if recipe.framing.body else [])]


def _framing(settings: FramingSettings) -> dict[str, Any]:
    """Gives the numbers of the framing.

    An image is cropped to its central `crop` pixels on each side (null: not cropped), padded with
    zeros to a square, and resized to `size`, rows and columns. A volume is turned to RAS+,
    resampled to `spacing_mm`, and padded with each channel's lowest value to at least the `window`;
    the network sees windows that overlap by the share `overlap`.
    """
    if isinstance(settings, VolumeFramingSettings):
        return {
            "kind": "volume",
            "spacing_mm": settings.spacing,
            "window": settings.patch,
            "overlap": settings.overlap,
        }
    if isinstance(settings, ImageFramingSettings):
        crop = None if settings.crop == "whole" else settings.crop
        return {"kind": "image", "crop": crop, "size": settings.shape}
    raise TypeError(f"framing: got {type(settings).__name__}, which a file cannot describe.")


def _fingerprint(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
