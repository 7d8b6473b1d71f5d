"""What a file says of its network: the attributes' names, the classes, the preprocessing's numbers.

A text for each key of `describe`, as ONNX keeps metadata; all but the last are json.

    dmoe_layer.attributes       [{"name": "stage", "size": 2, "values": ["T1", "T2"],
                                "unknown": "error"}]: a value's place is its number; unknown is what
                                the number -1 does: error, average or learned
    reference_models.classes    the classes' names by label
    reference_models.channels   of each channel its name and how it is scaled, as of `_channels`
    reference_models.framing    what the network sees of an image or volume, as of `_framing`
    reference_models.weights    sha256 of the network's weights, by which a file is known to be of
                                a run
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

# Written by the layer's exporter itself.
ATTRIBUTES = "dmoe_layer.attributes"
_WEIGHTS = "reference_models.weights"

# How the data sets of images scale intensities, as of `_channels`.
SCALES: dict[str, dict[str, Any]] = {
    "fairseg": {"scale": "divide", "by": 255},
    "ham10000": {"scale": "divide", "by": 255},
    "mni152": {"scale": "z-score"},
    "phantom": {"scale": "none"},
}


def describe(recipe: Recipe, task: Task, model: nn.Module) -> dict[str, str]:
    """What a file says of the network of a run.

    Args:
        recipe, task: of the run.
        model: its network, with the weights that the file holds.
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


def require_told(run: Path, recipe: Recipe, model: nn.Module) -> None:
    """Raises unless the experts of a run's network are told attributes, without noise.

    Raises:
        RunError: they are not: dense networks, plain mixtures of experts, and those of the study
            that are told in another way.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, DMoE)]
    if all(layer.attribute_sizes is None for layer in layers):
        raise RunError(
            f"{run}: its network has no experts that are told attributes, which a file has for its "
            "second input. Export a network without them by torch.onnx.export."
        )
    if recipe.model.noise == "always":
        raise RunError(
            f"{run}: was trained with --noise always, so that its routers are noisy in evaluation "
            "too, and a file would give another mask each time."
        )


def require_same(
    found: Mapping[str, str], expected: Mapping[str, str], path: Path, run: Path
) -> None:
    """Raises unless a file is of this run, and of the checkpoint that was asked for.

    Args:
        found: what the file says.
        expected: what `describe` says of the run.
        path: of the file.
        run: its folder.

    Raises:
        RunError: it is another's, or says nothing.
    """
    if missing := [key for key in expected if key not in found]:
        raise RunError(
            f"{path}: does not say of which run it is (its metadata lack {', '.join(missing)}); "
            f"write one by `export --run {run}`."
        )
    others = [key for key in expected if key != _WEIGHTS and found[key] != expected[key]]
    if others:
        told = "; ".join(f"{key}: {found[key]}, but the run has {expected[key]}" for key in others)
        raise RunError(f"{path}: is of another run or network than {run} ({told}).")
    if found[_WEIGHTS] != expected[_WEIGHTS]:
        raise RunError(
            f"{path}: holds other weights than this checkpoint of {run}. It is of another run of "
            "the same kind, of another checkpoint (--which), or the run has gone on since: export "
            "it anew, or name the run that it is of."
        )


def _channels(recipe: Recipe, task: Task) -> list[dict[str, Any]]:
    """Of each channel of the input its name, where there is one, and its scale.

    divide: by that number. clip: to low..high, which become 0..1. range: its own lowest and highest
    value become 0 and 1. z-score: mean 0 and variance 1 over the voxels that are not 0, the
    background. none: as it is. body: 1 where the patient's body is, else 0.
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
    """What the network sees.

    Of an image: the central `crop` pixels a side (null: all), padded with zeros to a square and
    resized to `size`, rows and columns. Of a volume: turned to RAS+, resampled to `spacing_mm`,
    padded with each channel's lowest value to the `window` at least, and answered in windows that
    overlap by that share.
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
    raise TypeError(f"framing: got {type(settings).__name__}, of which a file cannot tell.")


def _fingerprint(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
