"""`export`: writes a trained run as one file, an ONNX model or a program of torch.export.

The file holds the network, the attributes' names and values and the preprocessing's numbers; it
needs neither this repository nor, of ONNX, PyTorch. Its inputs are `image`, what the network sees
(B, C, S), and `attribute`, int64 (B,), or (B, A) of several attributes; its output is `output`, the
logits (B, K, S). The batch is open, the sizes are the run's.

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
from .description import ATTRIBUTES, describe, require_told
from .onnx_network import BodyAsChannel, import_onnxruntime, start_session

# A file's logit is near the network's if they differ by less than this share of the largest logit;
# so many of a batch's may be off, as some tokens go to another expert by rounding: the convolutions
# behind carry one voxel's to some hundreds of logits. Of a trained 3D network with experts in all
# five stages none of 1.6 million was off, and the largest difference was 7e-7.
_NEAR, _MOST_OFF = 1e-3, 0.01


@dataclass(frozen=True)
class ExportSettings:
    """A run as one file: its network, the attributes' names, the preprocessing's numbers."""

    run: Path
    """The run's folder."""
    to: Path
    """File to write: .onnx for ONNX Runtime, .pt2 for torch.export.load. Nothing may be there."""
    which: Which = "best"
    """The checkpoint to export."""
    experts: Literal["auto", "sparse", "dense"] = "auto"
    """How the file computes experts. sparse: each token's own; dense: all of them for every token,
    for runtimes that want fixed shapes; auto: as the network's sizes ask for."""


def export(settings: ExportSettings) -> str:
    """Writes the file, whole or not at all, and runs it beside the network before it is there.

    Returns:
        What was written and how far it is from the network, in words.

    Raises:
        RunError: there is no such run or checkpoint, or its network cannot be exported; the file
            cannot be written or is there; or a package is missing.
    """
    kind = settings.to.suffix
    if kind not in _WRITERS:
        raise RunError(f"to: got {settings.to}, expected a name that ends in .onnx or .pt2.")
    _require_free(settings.to)
    if kind == ".onnx":
        import_onnxruntime()
    recipe, task, model = load_model(settings.run, settings.which)
    require_told(settings.run, recipe, model)
    said = describe(recipe, task, model)
    network = BodyAsChannel(model) if recipe.framing.body else model
    try:
        found = _WRITERS[kind](settings, network, _example(recipe, task), said, task)
    except (RuntimeError, ValueError, ImportError) as error:
        raise RunError(f"{settings.run}: cannot be exported: {error}") from error
    except OSError as error:
        raise _unwritable(settings.to, error) from error
    return f"{settings.to} ({settings.to.stat().st_size / 2**20:.1f} MiB): {found}"


def _require_free(to: Path) -> None:
    """Raises unless a new file can be written there; nothing is left behind."""
    if to.exists():
        raise RunError(f"{to}: is there already; choose another --to, or remove it first.")
    try:
        tempfile.TemporaryFile(dir=to.parent).close()
    except OSError as error:
        raise _unwritable(to, error) from error


def _unwritable(to: Path, error: OSError) -> RunError:
    return RunError(f"{to}: cannot be written ({error.strerror or error}); choose another --to.")


class _Example(NamedTuple):
    """An input of two samples, since an exporter takes a batch of one for the only one there is."""

    image_BCS: Tensor
    told: Tensor


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
        target.unlink()  # an empty file, which stands for the name
        export_onnx(
            network,
            target,
            *example,
            experts=settings.experts,
            attribute_values={each.name: each.values for each in task.attributes},
            metadata={key: text for key, text in said.items() if key != ATTRIBUTES},
            tolerance=math.inf,  # see _hold_against
        )
        session = start_session(target)

        def answer(image_BCS: Tensor, told: Tensor) -> Tensor:
            given = {"image": image_BCS.numpy(), "attribute": told.numpy()}
            return torch.from_numpy(session.run(None, given)[0])

        return _hold_against(network, answer, example, task)

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
        _require_refusals(network, answer, example, task)  # as export_onnx does of its files
        return _hold_against(network, answer, example, task)

    return _written(settings.to, write)


def _written(to: Path, write: Callable[[Path], str]) -> str:
    """What `write` says of the file that it has written, whole or not at all."""
    words = []
    write_whole(to, lambda target: words.append(write(target)))
    return words[0]


def _require_refusals(
    network: nn.Module, answer: Callable[..., Tensor], example: _Example, task: Task
) -> None:
    """Raises a RuntimeError if a program takes an attribute that the network refuses."""
    own = with_attributes(network)
    for i, attribute in enumerate(task.attributes):
        for value in (-1, len(attribute.values)):
            told = example.told.clone()
            told.view(told.shape[0], -1)[0, i] = value
            if _refuses(own, example.image_BCS, told) > _refuses(answer, example.image_BCS, told):
                raise RuntimeError(
                    f"the program takes the attributes {told.tolist()}, of which the network "
                    "refuses the first sample's."
                )


def _refuses(run: Callable[..., Tensor], image_BCS: Tensor, told: Tensor) -> bool:
    try:
        with torch.inference_mode():
            run(image_BCS, told)
    except Exception:  # eager and exported programs have none in common but this one
        return True
    return False


def _hold_against(
    network: nn.Module, answer: Callable[..., Tensor], example: _Example, task: Task
) -> str:
    """Runs a file beside the network on every value of every attribute.

    Not by the largest difference alone: where two experts score alike, rounding decides which a
    token goes to, and of the thousands of tokens of a volume some are such.

    Raises:
        RuntimeError: too many logits differ.
    """
    own, largest, off, count, runs = with_attributes(network), 0.0, 0, 0, 0
    for image_BCS, told in _trials(example, task):
        with torch.inference_mode():
            true_BKS = own(image_BCS, told)
            error_BKS = (answer(image_BCS, told) - true_BKS).abs() / true_BKS.abs().max()
        here, logits = int((~(error_BKS <= _NEAR)).sum()), error_BKS.numel()  # NaN too
        # Of each batch: of many values one that is wrong throughout is few of all logits.
        if here > _MOST_OFF * logits:
            raise RuntimeError(
                f"with the attributes {told.tolist()} {here:,} of {logits:,} logits differ from "
                f"the network's by more than {_NEAR} of the largest, expected at most "
                f"{_MOST_OFF:.1%} of them."
            )
        largest = max(largest, float(error_BKS.max()))
        off, count, runs = off + here, count + logits, runs + 1
    return (
        f"run on {runs} batches with every value of every attribute, its logits differ from the "
        f"network's by at most {largest:.1e} of the largest, {off:,} of {count:,} by more than "
        f"{_NEAR}"
    )


def _trials(example: _Example, task: Task) -> Iterator[_Example]:
    """Batches of two and of one, in which every value of every attribute is."""
    sizes = [len(attribute.values) for attribute in task.attributes]
    for value in range(max(sizes)):
        row = torch.tensor([value % size for size in sizes])
        batch = 1 + value % 2
        told = row.expand(batch, -1) if example.told.ndim == 2 else row.expand(batch)
        yield _Example(example.image_BCS[:batch], told)


_WRITERS = {".onnx": _write_onnx, ".pt2": _write_pt2}
