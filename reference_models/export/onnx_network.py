"""Runs an exported file as a network, by onnxruntime, in the recipes' evaluation and prediction."""

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
from .description import describe, require_attributes, require_same


def import_onnxruntime() -> ModuleType:
    """Imports onnxruntime, an optional package.

    Raises:
        RunError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError(
            f"onnxruntime cannot be imported here ({error}); install it by pip install '.[export]'"
        ) from error
    module: ModuleType = onnxruntime
    return module


class BodyAsChannel(nn.Module):
    """A network that receives the mask of the body as the last channel of the image, as files "
    "do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, image_BCS: Tensor) -> Tensor:
        logits_BKS: Tensor = self.model(image_BCS[:, :-1], image_BCS[:, -1] > 0.5)
        return logits_BKS


class OnnxNetwork(nn.Module):
    """A network that onnxruntime runs on the CPU; it reads attributes from the open scope.

    Args:
        session: the ``onnxruntime.InferenceSession`` of the file.
        attribute_sizes: number of values of each attribute.
        unknown: what the file does with an unknown attribute: error, average or learned.
    """

    def __init__(self, session: Any, attribute_sizes: tuple[int, ...], unknown: str) -> None:
        super().__init__()
        self._session, self._sizes, self._unknown = session, attribute_sizes, unknown

    def forward(self, image_BCS: Tensor, *body_BS: Tensor) -> Tensor:
        """Computes logits (B, K, S) like the exported network; all tensors are on the CPU.

        Raises:
            dmoe_layer.MissingAttributesError: no scope with attributes is open.
            ValueError: the network does not know an attribute's value.
        """
        attributes_BA = routing.attribute_values(image_BCS, self._sizes, unknown=self._unknown)
        attributes = attributes_BA[:, 0] if len(self._sizes) == 1 else attributes_BA
        channels = [image_BCS, *(each_BS[:, None].to(image_BCS.dtype) for each_BS in body_BS)]
        given = {"image": torch.cat(channels, dim=1).numpy(), "attribute": attributes.numpy()}
        (logits_BKS,) = self._session.run(None, given)
        return torch.from_numpy(logits_BKS)


@dataclass
class Twin:
    """PyTorch's network beside the file that is run, with a count of differing voxels.

    Args:
        file: the file.
        model: PyTorch's network.
        differing, voxels: number of voxels that differ so far, and of all voxels.
    """

    file: Path
    model: nn.Module
    differing: int = 0
    voxels: int = 0

    def compare(self, masks: Sequence[np.ndarray], own: Sequence[np.ndarray]) -> None:
        """Counts the voxels in which the file's masks differ from PyTorch's."""
        for mask_S, own_S in zip(masks, own, strict=True):
            self.differing += int((mask_S != own_S).sum())
            self.voxels += mask_S.size

    def note(self) -> str:
        """Says how many voxels differ."""
        return (
            f"onnxruntime computed the masks from {self.file.name}: {self.differing:,} of "
            f"{self.voxels:,} voxels differ from PyTorch's."
        )


def start_session(path: Path) -> Any:
    """Opens a file as an ``onnxruntime.InferenceSession``, with as many threads as PyTorch has.

    Raises:
        RunError: the file is not a network, or onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have only this class in common
        raise RunError(
            f"{path}: onnxruntime cannot read this file as a network ({error}); export it again."
        ) from error


def open_onnx(path: Path, run: Path, recipe: Recipe, task: Task, model: nn.Module) -> OnnxNetwork:
    """Opens the network in a file, after a check that the file is of this run.

    Args:
        path: the file.
        run: the folder of the run.
        recipe, task, model: the run's recipe, task and network.

    Raises:
        RunError: the file does not exist or cannot be read; it is of another run, checkpoint or
            network; or onnxruntime is not installed.
    """
    import_onnxruntime()
    require_attributes(run, recipe, model)
    if not path.is_file():
        raise RunError(
            f"{path}: there is no such file; write it by `export --run {run} --to {path}`."
        )
    session = start_session(path)
    said = session.get_modelmeta().custom_metadata_map
    require_same(said, describe(recipe, task, model), path, run)
    sizes = tuple(len(attribute.values) for attribute in task.attributes)
    return OnnxNetwork(session, sizes, recipe.model.unknown)
