"""Loads trained weights into any network here; a U-Net of experts can start from a dense U-Net's.

Each entry of a file is either taken, in the shape that the network has, or known to be of no use;
otherwise one error lists all that is wrong, and nothing is loaded. A new network that takes files
has a line in `LOADERS`.
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

# What becomes of a dense U-Net's linear layers.
EXPERTS = {
    "w1_EHD": ("0", "weight"),
    "w1_bias": ("0", "bias"),
    "w2_EDH": ("2", "weight"),
    "w2_bias": ("2", "bias"),
}


def load_pretrained(model: nn.Module, path: Path) -> None:
    """The weights of a file, by the network's kind and the file's.

    A TransUNet takes Google's from a `.npz` and the paper's from a `.pth`, a ResUNet3D the paper's
    from a `.pth`, a UNet of experts those of a dense one from a `.safetensors`.

    Raises:
        WeightsError: there are no such files for this network; or as of `load_google_npz`,
            `load_released_2d`, `load_released_3d`, `load_dense`.
    """
    loaders: Mapping[str, Callable[[Any, Path], None]] = {}
    for kind, of_kind in LOADERS.items():
        if isinstance(model, kind):
            loaders = of_kind
    if path.suffix not in loaders:
        kinds = " or ".join(loaders)
        raise WeightsError(
            f"{path}: a {type(model).__name__} takes "
            + (f"a file that ends in {kinds}." if kinds else "no files of weights.")
        )
    loaders[path.suffix](model, path)


def load_dense(model: UNet, path: Path) -> None:
    """Starts a U-Net of experts from a dense one: every expert of a stage becomes its MLP.

    In eval mode the network then computes what the dense one does (upcycling, Komatsuzaki et al.,
    arXiv:2212.05055). The dense one's MLPs have the hidden units of one expert. Routers stay as
    they are.

    Raises:
        WeightsError: the network has no experts in place of its MLPs, or the file is not there, is
            damaged, or no dense U-Net's of these sizes. The network is unchanged.
    """
    path = Path(path)
    layers = [stage.mlp for stage in model.stages]
    if not all(isinstance(layer, DMoE) for layer in layers):
        raise WeightsError(
            f"{path}: cannot start this network, which has no experts in place of its MLPs; make "
            "it with block='moe'."
        )
    try:
        file = Entries(path, load_file(path), pytorch)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: no safetensors file, or damaged ({error}).") from error
    units, dim = model.get_parameter("stages.0.mlp.w1_EHD").shape[1:]
    first = file.entries.get("stages.0.mlp.0.weight")
    if first is None or first.ndim != 2:
        raise WeightsError(
            f"{path}: holds no MLP for experts to start as; expected the model.safetensors of a "
            "run of a dense U-Net, block='mlp'."
        )
    advice = []
    if len(first) != units:
        advice.append(
            f"Its first MLP has {len(first)} hidden units, an expert has {units}: train it with "
            f"hidden={units / dim:g}."
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
