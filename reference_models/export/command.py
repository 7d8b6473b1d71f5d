"""`export`: writes a trained run as one file, an ONNX model or a program of torch.export.

The file holds the network, the names and values of the attributes, and the numbers of the
preprocessing. It does not need this repository; an ONNX file does not need PyTorch either. Its
inputs are `image`, the preprocessed images (B, C, S), and `attribute`, int64 (B,), or (B, A) for
several attributes. Its output is `output`, the logits (B, K, S). The batch may have any size; the
sizes of images are those of the run.

Shapes: B samples or windows, C channels, K classes, S spatial axes, A attributes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dmoe_layer.export import export_onnx, with_attributes

from ..errors import RunError
from ..files import write_whole
from ..recipes.recipe import Recipe
from ..training.checkpoints import Which, load_model
from ..training.runs import Task
from .description import ATTRIBUTES, describe, require_attributes
from .onnx_network import BodyAsChannel, import_onnxruntime, start_session

# A logit of the file is near the network's if they differ by less than _NEAR of the largest logit.
# A share of _MOST_OFF of a batch's logits may be off, since rounding sends some tokens to another
# expert, and the convolutions behind spread one voxel to some hundreds of logits. For a trained 3D
# network with experts in all five stages, none of 1.6 million was off, and the largest difference
# was 7e-7.
_NEAR, _MOST_OFF = 1e-3, 0.01


@dataclass(frozen=True)
class ExportSettings:
    """Settings of `export`."""

    run: Path
    """Folder of the trained run to export."""
    to: Path
    """File to write, which must not exist yet.
    - .onnx: for ONNX Runtime.
    - .pt2: for torch.export.load."""
    which: Which = "best"
    """The checkpoint to export: the one with the best
    validation score, or the last one."""
    experts: Literal["auto", "sparse", "dense"] = "auto"
    """How the file computes the experts.
    - auto: the method that suits the network's sizes.
    - sparse: each token is computed by its own
      experts.
    - dense: all experts compute every token, for
      runtimes that need fixed shapes."""


def export(settings: ExportSettings) -> str:
    """Writes the file, completely or not at all, and first compares its outputs with the network's.

    Returns:
        A sentence on what was written and how far its outputs are from the network's.

    Raises:
        RunError: there is no such run or checkpoint, its network cannot be exported, the file
            exists or cannot be written, or a package is missing.
    """
    kind = settings.to.suffix
    if kind not in _WRITERS:
        raise RunError(f"to: got {settings.to}, expected a file name that ends in .onnx or .pt2.")
    _require_free(settings.to)
    if kind == ".onnx":
        import_onnxruntime()
    recipe, task, model = load_model(settings.run, settings.which)
    require_attributes(settings.run, recipe, model)
    said = describe(recipe, task, model)
    network = BodyAsChannel(model) if recipe.framing.body else model
    try:
        found = _WRITERS[kind](settings, network, _example(recipe, task), said, task)
    except (RuntimeError, ValueError, ImportError) as error:
        raise RunError(f"{settings.run}: this run cannot be exported: {error}") from error
    except OSError as error:
        raise _unwritable(settings.to, error) from error
    return f"{settings.to} ({settings.to.stat().st_size / 2**20:.1f} MiB): {found}"


def _require_free(to: Path) -> None:
    """Raises unless a new file can be written there; it leaves no file."""
    if to.exists():
        raise RunError(f"{to}: this file exists already; choose another --to, or remove it first.")
    try:
        tempfile.TemporaryFile(dir=to.parent).close()
    except OSError as error:
        raise _unwritable(to, error) from error


def _unwritable(to: Path, error: OSError) -> RunError:
    return RunError(
        f"{to}: this file cannot be written ({error.strerror or error}); choose another --to."
    )


class _Example(NamedTuple):
    """An input of two samples; from a batch of one, an exporter would assume a fixed size of "
    "one."""

    image_BCS: Tensor
    attributes: Tensor


def _example(recipe: Recipe, task: Task) -> _Example:
    shape = (2, task.channels + recipe.framing.body, *recipe.framing.shape)
    image_BCS = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    n = len(task.attributes)
    return _Example(image_BCS, torch.zeros((2,) if n == 1 else (2, n), dtype=torch.int64))


def _write_onnx(
    settings: ExportSettings,
    network: nn.Module,
    example: _Example,
    said: dict[str, str],
    task: Task,
) -> str:
    def write(target: Path) -> str:
        target.unlink()  # an empty file that reserved the name
        export_onnx(
            network,
            target,
            *example,
            experts=settings.experts,
            attribute_values={each.name: each.values for each in task.attributes},
            metadata={key: text for key, text in said.items() if key != ATTRIBUTES},
            tolerance=math.inf,  # see _compare
        )
        session = start_session(target)

        def answer(image_BCS: Tensor, attributes: Tensor) -> Tensor:
            given = {"image": image_BCS.numpy(), "attribute": attributes.numpy()}
            return torch.from_numpy(session.run(None, given)[0])

        return _compare(network, answer, example, task)

    return _written(settings.to, write)


def _write_pt2(
    settings: ExportSettings,
    network: nn.Module,
    example: _Example,
    said: dict[str, str],
    task: Task,
) -> str:
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        with_attributes(network, experts=settings.experts),
        tuple(example),
        dynamic_shapes=({0: batch}, {0: batch}),
    )

    def write(target: Path) -> str:
        torch.export.save(program, target, extra_files=said)
        answer = torch.export.load(target).module()
        _require_refusals(network, answer, example, task)  # export_onnx checks its files itself
        return _compare(network, answer, example, task)

    return _written(settings.to, write)


def _written(to: Path, write: Callable[[Path], str]) -> str:
    """Writes a file by `write`, completely or not at all, and returns what `write` says about "
    "it."""
    words = []
    write_whole(to, lambda target: words.append(write(target)))
    return words[0]


def _require_refusals(
    network: nn.Module, answer: Callable[..., Tensor], example: _Example, task: Task
) -> None:
    """Raises a RuntimeError if a program accepts an attribute that the network refuses."""
    own = with_attributes(network)
    for i, attribute in enumerate(task.attributes):
        for value in (-1, len(attribute.values)):
            attributes = example.attributes.clone()
            attributes.view(attributes.shape[0], -1)[0, i] = value
            if _refuses(own, example.image_BCS, attributes) > _refuses(
                answer, example.image_BCS, attributes
            ):
                raise RuntimeError(
                    f"the program accepts the attributes {attributes.tolist()}, of which the "
                    "network refuses those of the first sample."
                )


def _refuses(run: Callable[..., Tensor], image_BCS: Tensor, attributes: Tensor) -> bool:
    try:
        with torch.inference_mode():
            run(image_BCS, attributes)
    except Exception:  # their errors have only this class in common
        return True
    return False


def _compare(
    network: nn.Module, answer: Callable[..., Tensor], example: _Example, task: Task
) -> str:
    """Compares a file's outputs with the network's, for every value of every attribute.

    The largest difference alone would not do: if two experts have the same score, rounding decides
    to which a token goes, and a volume has thousands of tokens.

    Raises:
        RuntimeError: too many logits differ.
    """
    own, largest, off, count, runs = with_attributes(network), 0.0, 0, 0, 0
    for image_BCS, attributes in _trials(example, task):
        with torch.inference_mode():
            true_BKS = own(image_BCS, attributes)
            error_BKS = (answer(image_BCS, attributes) - true_BKS).abs() / true_BKS.abs().max()
        here, logits = int((~(error_BKS <= _NEAR)).sum()), error_BKS.numel()  # NaN too
        # Each batch is checked: among many values, a wrong one has a small share of all logits.
        if here > _MOST_OFF * logits:
            raise RuntimeError(
                f"with the attributes {attributes.tolist()}, {here:,} of {logits:,} logits differ "
                f"from the network's by more than {_NEAR} of the largest logit; expected at most "
                f"{_MOST_OFF:.1%}."
            )
        largest = max(largest, float(error_BKS.max()))
        off, count, runs = off + here, count + logits, runs + 1
    return (
        f"the file was run on {runs} batches with every value of every attribute; its logits "
        f"differ from the network's by at most {largest:.1e} of the largest logit, and {off:,} of "
        f"{count:,} logits differ by more than {_NEAR}"
    )


def _trials(example: _Example, task: Task) -> Iterator[_Example]:
    """Gives batches of one and of two that together have every value of every attribute."""
    sizes = [len(attribute.values) for attribute in task.attributes]
    for value in range(max(sizes)):
        row = torch.tensor([value % size for size in sizes])
        batch = 1 + value % 2
        attributes = row.expand(batch, -1) if example.attributes.ndim == 2 else row.expand(batch)
        yield _Example(example.image_BCS[:batch], attributes)


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2}
