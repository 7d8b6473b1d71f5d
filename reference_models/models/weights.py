"""Loads trained weights into any network here; a U-Net with experts can start from a dense U-Net.

Every entry of a file must fit a parameter of the network, or be known to be unneeded. Otherwise one
error lists everything that is wrong, and nothing is loaded. To let a new network load files, add it
to `LOADERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dmoe_layer import DMoE

from .resunet3d import ResUNet3D
from .transunet import TransUNet
from .unet import UNet
from .weight_files import Entries, Weights, WeightsError, put, pytorch
from .weights2d import load_google_npz, load_released_2d
from .weights3d import load_released_3d

# The parameters of experts, and the dense U-Net's parameters that they start as.
EXPERTS = {
    "w1_EHD": ("0", "weight"),
    "w1_bias": ("0", "bias"),
    "w2_EDH": ("2", "weight"),
    "w2_bias": ("2", "bias"),
}


def load_pretrained(model: nn.Module, path: Path) -> None:
    """Loads a file of weights into a network; network and ending of the file decide how.

    A TransUNet takes Google's weights from an `.npz`, and the paper's from a `.pth`. A ResUNet3D
    takes the paper's from a `.pth`. A UNet with experts takes those of a dense UNet from a
    `.safetensors`.

    Raises:
        WeightsError: the network takes no such files, or `load_google_npz`, `load_released_2d`,
            `load_released_3d` or `load_dense` raises it.
    """
    loaders: Mapping[str, Callable[[Any, Path], None]] = {}
    for kind, of_kind in LOADERS.items():
        if isinstance(model, kind):
            loaders = of_kind
    if path.suffix not in loaders:
        kinds = " or ".join(loaders)
        raise WeightsError(
            f"{path}: the network {type(model).__name__} can load "
            + (f"only files that end in {kinds}." if kinds else "no files of weights.")
        )
    loaders[path.suffix](model, path)


def load_dense(model: UNet, path: Path) -> None:
    """Starts a U-Net with experts from a dense one: every expert of a stage becomes the stage's
    MLP.

    In eval mode the network then computes the same as the dense one (upcycling, Komatsuzaki et al.,
    arXiv:2212.05055). The MLPs of the dense network must have as many hidden units as an expert.
    The routers are not changed.

    Raises:
        WeightsError: the network has no experts in place of its MLPs; or the file is missing,
            damaged, or not of a dense U-Net with these sizes. The network is then unchanged.
    """
    path = Path(path)
    layers = [stage.mlp for stage in model.stages]
    if not all(isinstance(layer, DMoE) for layer in layers):
        raise WeightsError(
            f"{path}: these weights cannot start this network, which has no experts in place of "
            "its MLPs; make the network with block='moe'."
        )
    try:
        file = Entries(path, load_file(path), pytorch)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{path}: this file is damaged or is not a safetensors file ({error})."
        ) from error
    units, dim = model.get_parameter("stages.0.mlp.w1_EHD").shape[1:]
    first = file.entries.get("stages.0.mlp.0.weight")
    if first is None or first.ndim != 2:
        raise WeightsError(
            f"{path}: this file holds no MLP from which experts can start; expected the "
            "model.safetensors of a run of a dense U-Net, block='mlp'."
        )
    advice = []
    if len(first) != units:
        advice.append(
            f"Its first MLP has {len(first)} hidden units, but an expert has {units}: train the "
            f"dense network with hidden={units / dim:g}."
        )
    new: Weights = {}
    for name, value in model.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        if parameter in EXPERTS:
            linear, kind = EXPERTS[parameter]
            new[name] = file.take(f"{layer}.{linear}", kind, value.shape[1:]).expand_as(value)
        elif ".mlp.router." not in name:
            new[name] = file.take(layer, parameter, value.shape)
    file.finish(advice=tuple(advice))
    put(model, new)


LOADERS: Mapping[type[nn.Module], Mapping[str, Callable[[Any, Path], None]]] = {
    TransUNet: {".npz": load_google_npz, ".pth": load_released_2d},
    ResUNet3D: {".pth": load_released_3d},
    UNet: {".safetensors": load_dense},
}
