"""Loads a checkpoint of the paper's released 3D code into a ResUNet3D."""

from __future__ import annotations

from pathlib import Path

from .resunet3d import ResUNet3D
from .weight_files import (
    Entries,
    Weights,
    WeightsError,
    layer_of,
    put,
    pytorch,
    read_pth,
    released_moe,
    routers_advice,
)

ENCODER = ("encoder1", "encoder2", "encoder3", "encoder4", "encoder10")
DECODER = ("decoder4", "decoder3", "decoder2", "decoder1")
CONVOLUTIONS = ("conv1.conv", "conv2.conv", "conv3.conv")
EXPERTS = "sparseMoE"


def load_released_3d(model: ResUNet3D, path: str | Path) -> None:
    """Loads a checkpoint of the paper's released 3D code into the whole network.

    That code has experts after all five stages, with five routers each, whatever the number of
    attribute values: make the network with `attribute_sizes=5`. It adds routing noise in evaluation
    too, as noise="always" does here.

    Raises:
        WeightsError: the file is missing, damaged or pickled, or its entries do not fit the
            network. The text names everything that is wrong and how to make a network that fits;
            the network is unchanged.
    """
    path = Path(path)
    file = Entries(path, read_pth(path), pytorch)
    if not any(name.startswith((*ENCODER, *DECODER)) for name in file.entries):
        raise WeightsError(
            f"{path}: this file is not of the paper's released 3D network, whose entries have "
            f"names that begin with {ENCODER[0]}, {DECODER[0]}, {EXPERTS} and out."
        )
    advice = _differences(file, model)
    new: Weights = {}
    for n, theirs in enumerate(ENCODER):
        for convolution in CONVOLUTIONS:
            ours = f"encoder.{n}.block.{convolution}"
            new |= layer_of(file, model, ours, f"{theirs}.layer.{convolution}")
        if model.get_submodule(f"encoder.{n}").moe is not None:
            new |= released_moe(file, model, f"encoder.{n}.moe", f"{EXPERTS}.{n}")
    for n, theirs in enumerate(DECODER):
        for part in ("transp_conv.conv", *(f"conv_block.{c}" for c in CONVOLUTIONS)):
            new |= layer_of(file, model, f"decoder.{n}.{part}", f"{theirs}.{part}")
    new |= layer_of(file, model, "head", "out.transp_conv.conv")
    file.finish(advice=advice)
    put(model, new)


def _differences(file: Entries, model: ResUNet3D) -> tuple[str, ...]:
    """Says how to make the network so that the file fits; nothing if it fits already."""
    advice = []

    def compare(what: str, option: str, name: str, axis: int, made: int) -> None:
        entry = file.entries.get(name)
        held = made if entry is None or entry.ndim <= axis else entry.shape[axis]
        if held != made:
            advice.append(f"It has {held} {what}: make the network with {option}={held}.")

    first = "encoder1.layer.conv1.conv.weight"
    features, n_classes = model.head.weight.shape[:2]
    compare("channels in its first stage", "features", first, 0, features)
    compare("channels in its images", "in_channels", first, 1, model.in_channels)
    compare("classes", "n_classes", "out.transp_conv.conv.weight", 1, n_classes)
    numbers = range(len(ENCODER))
    held = [n for n in numbers if file.count(f"{EXPERTS}.{n}.router.")]
    made = [n for n in numbers if model.get_submodule(f"encoder.{n}").moe is not None]
    if made and not held:
        advice.append("It has no experts: make the network with moe='none'.")
    elif made != held:
        stages = tuple(n + 1 for n in held)
        advice.append(
            f"It has experts after its stages {', '.join(map(str, stages))}: make the network with "
            f"moe='per_block' and stages={stages}."
        )
    elif made:  # all stages are alike
        layer = model.get_submodule(f"encoder.{made[0]}.moe")
        advice += routers_advice(file.count(f"{EXPERTS}.{made[0]}.router."), layer)
        experts = file.count(f"{EXPERTS}.{made[0]}.experts.")
        if experts != len(layer.get_parameter("w1_EHD")):
            advice.append(f"It has {experts} experts: make the network with n_experts={experts}.")
    return tuple(advice)
