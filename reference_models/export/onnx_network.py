"""An exported file as a network: onnxruntime computes, the recipes around it stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmoe_layer import routing

from ..errors import RunError
from ..recipes.recipe import Recipe
from ..training.runs import Task
from .description import describe, require_same, require_told


def import_onnxruntime() -> ModuleType:
    """The package, which is no part of what every recipe needs.

    Raises:
        RunError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError(
            f"onnxruntime cannot be imported here ({error}); install what files of networks need: "
            "pip install '.[export]'"
        ) from error
    module: ModuleType = onnxruntime
    return module


class BodyAsChannel(nn.Module):
    """A network that is told where the body is by the image's last channel, as a file's is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, image_BCS: Tensor) -> Tensor:
        logits_BKS: Tensor = self.model(image_BCS[:, :-1], image_BCS[:, -1] > 0.5)
        return logits_BKS


class OnnxNetwork(nn.Module):
    """A network that onnxruntime runs on the CPU; it takes attributes from the open scope.

    Args:
        session: of the file, an ``onnxruntime.InferenceSession``.
        attribute_sizes: how many values each attribute has.
        unknown: what the file does with an unknown attribute.
    """

    def __init__(self, session: Any, attribute_sizes: tuple[int, ...], unknown: str) -> None:
        super().__init__()
        self._session, self._sizes, self._unknown = session, attribute_sizes, unknown

    def forward(self, image_BCS: Tensor, *body_BS: Tensor) -> Tensor:
        """Logits (B, K, S), as of the network that was exported; everything is on the CPU.

        Raises:
            dmoe_layer.MissingAttributesError: no scope with attributes is open.
            ValueError: an attribute that the network does not know.
        """
        told_BA = routing.attribute_values(image_BCS, self._sizes, unknown=self._unknown)
        told = told_BA[:, 0] if len(self._sizes) == 1 else told_BA
        channels = [image_BCS, *(each_BS[:, None].to(image_BCS.dtype) for each_BS in body_BS)]
        given = {"image": torch.cat(channels, dim=1).numpy(), "attribute": told.numpy()}
        (logits_BKS,) = self._session.run(None, given)
        return torch.from_numpy(logits_BKS)


@dataclass
class Twin:
    """PyTorch's network beside the one in a file, and in how far their masks agree.

    Args:
        file: that is run.
        model: PyTorch's network.
        differing, voxels: so far.
    """

    file: Path
    model: nn.Module
    differing: int = 0
    voxels: int = 0

    def compare(self, masks: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> None:
        """Counts the voxels of masks that differ from PyTorch's own."""
        for mask_S, own_S in zip(masks, own, strict=True):
            self.differing += int((mask_S != own_S).sum())
            self.voxels += mask_S.size

    def note(self) -> str:
        return (
            f"masks by onnxruntime from {self.file.name}: {self.differing:,} of {self.voxels:,} "
            "voxels differ from PyTorch's"
        )


def start_session(path: Path) -> Any:
    """An ``onnxruntime.InferenceSession`` of a file, with as many threads as PyTorch has.

    Raises:
        RunError: it is no network, or onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common but this one
        raise RunError(
            f"{path}: onnxruntime cannot read it as a network ({error}); export it anew."
        ) from error


def open_onnx(path: Path, run: Path, recipe: Recipe, task: Task, model: nn.Module) -> OnnxNetwork:
    """The network in a file, once the file is known to be of this run.

    Args:
        path: of the file.
        run: the folder of a run.
        recipe, task, model: what it holds.

    Raises:
        RunError: there is no such file or it cannot be read, it is of another run, checkpoint or
            network, or onnxruntime is not installed.
    """
    import_onnxruntime()
    require_told(run, recipe, model)
    if not path.is_file():
        raise RunError(f"{path}: no such file; write it by `export --run {run} --to {path}`.")
    session = start_session(path)
    said = session.get_modelmeta().custom_metadata_map
    require_same(said, describe(recipe, task, model), path, run)
    sizes = tuple(len(attribute.values) for attribute in task.attributes)
    return OnnxNetwork(session, sizes, recipe.model.unknown)
