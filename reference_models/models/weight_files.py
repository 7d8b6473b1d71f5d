"""Reads files of trained weights without unpickling, and checks that every entry of them is used.

Shapes: O and I output and input channels, h and w a kernel's sides; A routers, E experts, H hidden
units, D features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import DataError

Shape: TypeAlias = tuple[int, ...]
Weights: TypeAlias = dict[str, Tensor]  # by the names in the network here
# How a file names a layer's parameter: (its layer, "weight", "bias" or a batch norm's statistic,
# its shape) -> (the entry's name, its shape, and einops' pattern that gives PyTorch's order of
# axes, or None if it is the same).
Spelling: TypeAlias = Callable[[str, str, Shape], tuple[str, Shape, str | None]]


class WeightsError(DataError, ValueError):
    """A file of weights is damaged, or belongs to another network."""


class Entries:
    """The entries of a file of weights; it collects all faults for a single error.

    Args:
        path: the file.
        entries: its tensors by name.
        spelling: how the file names parameters.
    """

    def __init__(self, path: Path, entries: Mapping[str, Tensor], spelling: Spelling) -> None:
        self.path, self.entries, self.spelling = path, entries, spelling
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.taken: set[str] = set()

    def take(self, layer: str, parameter: str, shape: Shape) -> Tensor:
        """Gives a parameter in PyTorch's order of axes; zeros if the entry is missing or wrong."""
        name, spelled, pattern = self.spelling(layer, parameter, tuple(shape))
        entry = self.entry(name, spelled)
        return entry if pattern is None else rearrange(entry, pattern)

    def entry(self, name: str, shape: Shape) -> Tensor:
        """Gives an entry of this shape, which may have further leading axes of length 1."""
        self.taken.add(name)
        entry = self.entries.get(name)
        if entry is None:
            self.missing.append(name)
        elif entry.numel() != math.prod(shape) or entry.shape[entry.ndim - len(shape) :] != shape:
            self.wrong.append(f"{name} has shape {tuple(entry.shape)}, expected {shape}")
        elif shape and not entry.is_floating_point():  # a batch norm's count is a whole number
            self.wrong.append(f"{name} holds {entry.dtype}, expected floating-point numbers")
        elif not entry.isfinite().all():
            self.wrong.append(f"{name} holds NaN or infinity")
        else:
            return entry.reshape(shape)
        return torch.zeros(shape)

    def count(self, prefix: str) -> int:
        """Counts the different numbers that follow ``prefix`` in the entries' names."""
        numbered = re.compile(rf"{re.escape(prefix)}(\d+)\.")
        return len({match[1] for match in map(numbered.match, self.entries) if match})

    def finish(self, unused: tuple[str, ...] = (), advice: tuple[str, ...] = ()) -> None:
        """Raises unless every entry has been taken or is in `unused`, and none was wrong.

        Args:
            unused: the names of entries that the network does not need.
            advice: sentences on what else is wrong, and what to do.

        Raises:
            WeightsError: an entry is missing, left over or wrong, or there is advice.
        """
        left = sorted(self.entries.keys() - self.taken - {*unused})
        problems = [
            f"{what}: {', '.join(names)}."
            for what, names in (
                ("missing", self.missing),
                ("left over", left),
                ("not as expected", self.wrong),
            )
            if names
        ]
        if problems or advice:
            raise WeightsError(
                "\n  ".join(
                    [f"{self.path}: this file does not fit the network.", *advice, *problems]
                )
            )


def google(heads: int) -> Spelling:
    """Gives the spelling of Google's JAX models: kernels have inputs first, and an axis of "
    "heads."""

    def spell(layer: str, parameter: str, shape: Shape) -> tuple[str, Shape, str | None]:
        splits = layer.endswith(("/query", "/key", "/value"))
        if parameter == "bias" and splits:
            return f"{layer}/bias", (heads, shape[0] // heads), "h d -> (h d)"
        if parameter == "bias":
            return f"{layer}/bias", shape, None
        if len(shape) == 1:
            return f"{layer}/scale", shape, None
        name = f"{layer}/kernel"
        o, i, *kernel = shape
        if kernel:
            return name, (*kernel, i, o), "h w i o -> o i h w"
        if splits:
            return name, (i, heads, o // heads), "i h d -> (h d) i"
        if layer.endswith("/out"):
            return name, (heads, i // heads, o), "h d o -> o (h d)"
        return name, (i, o), "i o -> o i"

    return spell


def pytorch(layer: str, parameter: str, shape: Shape) -> tuple[str, Shape, str | None]:
    """The spelling of a PyTorch state_dict."""
    return f"{layer}.{parameter}", shape, None


def read_npz(path: Path) -> dict[str, Tensor]:
    """Reads all arrays of an `.npz` file.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds other things than numbers.
    """
    name = ""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            entries = {}
            for name in file.files:
                entries[name] = torch.from_numpy(file[name])
            return entries
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}.") from error
    # A damaged archive, or a file of another kind, raises one of many exceptions.
    except Exception as error:
        entry = f"{path}, entry {name!r}" if name else f"{path}"
        raise WeightsError(
            f"{entry}: this is not an .npz file of plain arrays ({error}). If it is damaged, "
            "download it again. Pickled objects are not loaded: if you trust the file, load it "
            "yourself and save its arrays with numpy.savez."
        ) from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a saved state_dict, and removes the prefix that DataParallel adds.

    Raises:
        WeightsError: there is no such file, it is damaged, or it holds other things than tensors.
    """
    advice = "Save it with torch.save(model.state_dict(), path)."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise WeightsError(f"{path}: {error.strerror}.") from error
    except Exception as error:  # a damaged file raises one of many, also OSErrors
        raise WeightsError(
            f"{path}: this file is damaged, or holds other things than tensors, which are not "
            "unpickled. "
            f"{advice}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in state.items()
    ):
        held = f"a dict of {', '.join(map(str, state))}" if isinstance(state, dict) else type(state)
        raise WeightsError(f"{path}: expected a state_dict of tensors, got {held}. {advice}")
    if odd := [name for name, t in state.items() if t.layout != torch.strided or t.is_meta]:
        raise WeightsError(
            f"{path}: expected dense tensors, but {odd[0]} is sparse or has no numbers "
            f"({len(odd)} entries like that). {advice}"
        )
    prefix = "module."
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def layer_of(file: Entries, model: nn.Module, ours: str, theirs: str) -> Weights:
    """Takes all parameters of a convolution, a linear layer or a norm."""
    state = model.get_submodule(ours).state_dict()
    return {f"{ours}.{name}": file.take(theirs, name, value.shape) for name, value in state.items()}


def released_moe(file: Entries, model: nn.Module, ours: str, theirs: str) -> Weights:
    """Takes the released code's experts, and its router for each attribute value, as DMoE's."""
    state = model.get_submodule(ours).state_dict()
    n_routers = len(state["router.w_A2ED"])
    n_experts, hidden, dim = state["w1_EHD"].shape
    experts = [f"{theirs}.experts.{e}.net" for e in range(n_experts)]
    routers = [f"{theirs}.router.{a}" for a in range(n_routers)]

    def stacked(layers: list[str], kind: str, shape: Shape) -> Tensor:
        return torch.stack([file.take(layer, kind, shape) for layer in layers])

    new = {
        "w1_EHD": stacked([f"{e}.0" for e in experts], "weight", (hidden, dim)),
        "w1_bias": stacked([f"{e}.0" for e in experts], "bias", (hidden,)),
        "w2_EDH": stacked([f"{e}.2" for e in experts], "weight", (dim, hidden)),
        "w2_bias": stacked([f"{e}.2" for e in experts], "bias", (dim,)),
    }
    shapes = {"w_A2ED": ("weight", (n_experts, dim)), "bias": ("bias", (n_experts,))}
    for name, (kind, shape) in shapes.items():
        clean_and_noise = [
            stacked([f"{r}.{linear}" for r in routers], kind, shape)
            for linear in ("topkroute_linear", "noise_linear")
        ]
        new[f"router.{name}"] = torch.stack(clean_and_noise, 1)
    return {f"{ours}.{name}": value for name, value in new.items()}


def routers_advice(n: int, layer: nn.Module) -> list[str]:
    """Says how to make the network for a file with ``n`` routers, unless its layer fits already."""
    router = layer.get_submodule("router")
    # The number of rows is not enough: a learned unknown, or a second attribute, has rows too.
    if len(router.get_parameter("w_A2ED")) == n and (
        n == 1 or (router.attribute_sizes in (n, (n,)) and router.unknown != "learned")
    ):
        return []
    return [
        f"It has {n} routers, one for each value: make the network with attribute_sizes={n} and "
        "unknown='error' or 'average'."
    ]


@torch.no_grad()
def put(model: nn.Module, new: Weights) -> None:
    """Copies weights into the network's parameters."""
    state = model.state_dict()  # the parameters themselves
    for name, value in new.items():
        state[name].copy_(value)
