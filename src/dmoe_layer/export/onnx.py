"""Writes a model as an ONNX file of standard operators, once the file has proved itself."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..checks import check_count, describe
from ..router import AttributeRouter
from .example import Example, FlatOutput
from .scoped import with_attributes
from .trials import OnnxCheck, check

# The first opset whose ScatterElements and ReduceSum are as torch.onnx writes them.
LEAST_OPSET = 18


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    x: Tensor,
    attributes: Any = None,
    *,
    dynamic_axes: Sequence[int] = (0,),
    experts: str = "auto",
    opset: int = LEAST_OPSET,
    attribute_values: Mapping[str, Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    tolerance: float = 1e-3,
) -> OnnxCheck:
    """Writes ``model`` as an ONNX file of standard operators, and runs it beside the model.

    The file has the inputs ``image``, as x, and ``attribute``, int64 as ``attributes``; a tensor
    that the model returns is called ``output``, those of a tuple ``output_0`` and so on, and those
    of a dict as its keys. An attribute that is out of range, or unknown where a layer has
    unknown="error", makes a run fail: with "indices element out of data bounds" in ONNX Runtime.

    Before the file takes its name it is run by ONNX Runtime on the CPU: on the example; on every
    value of every attribute, unknown too where that is allowed, in batches of one and of one more
    than the example's; on an example twice as large along each further axis of ``dynamic_axes``;
    and on wrong values, which it must refuse.

    Args:
        model: in eval mode; in float32, float64 or float16, but not bfloat16, which NumPy does not
            have. Its layers read the attributes from the scope. What :func:`with_attributes` has
            made of a model is taken as that model, with its form of the experts.
        path: the file, in a folder that exists. A file that is there is replaced, whole or not at
            all, as the last thing that is done. Weights of more than 2 GiB go to a second one
            beside it, with ".data" at the end of its name.
        x: an example of its input, (batch, ...).
        attributes: that of its attributes, (batch,), or (batch, n) for n attributes; a batch of 1
            or a scalar applies to every sample. None for a model without layers that route by
            attributes: the file then has no second input.
        dynamic_axes: the axes of x whose size the file leaves open; 0 is the batch.
        experts: "sparse", "dense" or "auto"; see :func:`with_attributes`.
        opset: the version of ONNX's operators, 18 or newer.
        attribute_values: the attributes' names, and what their values mean, in order; written to
            the metadata. Example: ``{"site": ["Boston", "Leeds"]}``.
        metadata: more entries for the metadata. The file says of itself: ``dmoe_layer.version``,
            ``torch.version`` and ``dmoe_layer.attributes``, a JSON list of {"name", "size",
            "values", "unknown"}, one for each attribute; name and values are null where not given.
        tolerance: the largest difference, as :class:`OnnxCheck` has it, that is let pass.

    Returns:
        What was found.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing: ``pip install
            'dmoe-layer[export]'``.
        ValueError, TypeError: for arguments that do not fit, a model in training mode, and one
            that takes or returns bfloat16.
        RuntimeError: the file differs from the model, lets a wrong attribute pass, or has operators
            that are not ONNX's own. Nothing is written then; nor is it where PyTorch's exporter or
            ONNX Runtime raises an error of its own.
    """
    _require_packages()
    target = _checked_target(path)
    check_count("opset", opset)
    if opset < LEAST_OPSET:
        raise ValueError(f"opset: got {opset}, expected at least {LEAST_OPSET}.")
    axes = _checked_axes(x, dynamic_axes)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance!r}, expected a number of 0 or more.")
    two_inputs = with_attributes(model, experts=experts)
    _require_inference(model)
    _refuse_bfloat16(model, x)
    wrapped = FlatOutput(two_inputs).eval()
    example = Example(x, attributes, wrapped)
    notes = _metadata(example, attribute_values, metadata or {})
    program = _export(wrapped, example, axes, opset)
    program.model.metadata_props.update(notes)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        written = Path(folder, target.name)
        program.save(written)
        found = check(written, wrapped, example, axes, tolerance)
        # The file of the weights first: that of the program speaks of it.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == written):
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
            os.replace(file, target.parent / file.name)
    return found


def _checked_target(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: got {describe(path)}, expected a file's path.")
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"path: got {str(path)!r}, expected a file in a folder that exists.")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise ValueError(
            f"path: got {str(path)!r}, whose folder cannot be written to ({error.strerror})."
        ) from error
    return target


def _require_packages() -> None:
    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]
    if missing:
        raise ImportError(
            f"export_onnx: needs {', '.join(missing)}, not installed: pip install "
            "'dmoe-layer[export]'."
        )


def _require_inference(model: nn.Module) -> None:
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: {training[0]} is in training mode, expected eval mode, in which the file will "
            "be run. Call model.eval()."
        )
    for name, module in model.named_modules():
        if isinstance(module, AttributeRouter) and module.noise == "always":
            raise ValueError(
                f"model: {name} has noise='always', with which each run of a file answers "
                "otherwise, so that it cannot be checked. Set its noise to 'train' or 'never'."
            )


def _refuse_bfloat16(model: nn.Module, x: Tensor) -> None:
    if x.dtype == torch.bfloat16:
        raise ValueError(
            "x: got torch.bfloat16, which NumPy does not have, and so no run could be handed. Pass "
            "x.float(), and the model in float32."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16:
            raise ValueError(
                f"model: {name} is torch.bfloat16, in which ONNX Runtime does not compute on the "
                "CPU. Export copy.deepcopy(model).float(): the same weights, in float32."
            )


def _checked_axes(x: Any, axes: Sequence[int]) -> list[int]:
    if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] == 0:
        raise TypeError(f"x: got {describe(x)}, expected a tensor (batch, ...) of some samples.")
    if not isinstance(axes, Iterable):
        raise TypeError(f"dynamic_axes: got {describe(axes)}, expected axes of x, such as (0,).")
    wrong = [
        a for a in axes if isinstance(a, bool) or not isinstance(a, int) or not 0 <= a < x.ndim
    ]
    if wrong:
        raise ValueError(f"dynamic_axes: got {wrong[0]!r}, expected axes of x, 0 .. {x.ndim - 1}.")
    return sorted(set(axes))


def _checked_values(attribute_values: Any) -> Mapping[str, Sequence[str]]:
    """Names and values by which a reader of the file finds each value's number."""
    if attribute_values is None:
        return {}
    if not isinstance(attribute_values, Mapping):
        raise TypeError(
            f"attribute_values: got {describe(attribute_values)}, expected each attribute's name "
            'and values, such as {"site": ["Boston", "Leeds"]}.'
        )
    for name, values in attribute_values.items():
        listed = not isinstance(values, str) and isinstance(values, Sequence)
        if not listed or not all(isinstance(text, str) for text in [name, *values]):
            raise TypeError(
                f"attribute_values: got {name!r}: {values!r:.60}, expected a name and a list of "
                "texts."
            )
        if len({*values}) < len(values):
            raise ValueError(
                f"attribute_values: got {name!r}: {values!r:.60}, expected a text of its own for "
                "each value, by which its number is found."
            )
    return attribute_values


def _metadata(
    example: Example,
    attribute_values: Mapping[str, Sequence[str]] | None,
    metadata: Mapping[str, str],
) -> dict[str, str]:
    given = list(_checked_values(attribute_values).items())
    lengths = [len(values) for _, values in given]
    if attribute_values is not None and lengths != example.sizes:
        raise ValueError(
            f"attribute_values: got {dict(zip(attribute_values, lengths, strict=True))}, names and "
            f"numbers of values, expected {len(example.sizes)} of sizes {example.sizes}."
        )
    attributes = [
        {
            "name": given[i][0] if given else None,
            "size": size,
            "values": list(given[i][1]) if given else None,
            "unknown": example.unknown,
        }
        for i, size in enumerate(example.sizes)
    ]
    own = {
        "dmoe_layer.version": __version__,
        "torch.version": str(torch.__version__),
        "dmoe_layer.attributes": json.dumps(attributes, ensure_ascii=False),
    }
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: got {describe(metadata)}, expected a dict of texts.")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key in own:
            raise ValueError(
                f"metadata: got {key!r}: {value!r:.60}, expected texts, and none of {list(own)}."
            )
    return {**own, **metadata}


def _export(wrapped: nn.Module, example: Example, axes: list[int], opset: int) -> Any:
    """The program by ``torch.onnx``, which fixes a batch of one: of one it is shown two."""
    size = max(example.x.shape[0], 2) if 0 in axes else example.x.shape[0]
    x, attributes = example.batch(size, cycle(example.rows()))
    # The axes' names in the file.
    names = {axis: f"size_{axis}" if axis else "batch" for axis in axes}
    inputs: dict[str, tuple[Tensor, Any]] = {"image": (x, names)}
    if attributes is not None:
        inputs["attribute"] = attributes, {axis: name for axis, name in names.items() if axis == 0}
    program = torch.onnx.export(
        wrapped,
        tuple(tensor for tensor, _ in inputs.values()),
        dynamo=True,
        dynamic_shapes=tuple(shapes for _, shapes in inputs.values()),
        input_names=list(inputs),
        output_names=example.output_names,
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise RuntimeError(
            "export_onnx: torch.onnx.export gave no program back, and said nothing. Try another "
            f"PyTorch than {torch.__version__}."
        )
    if (written := program.model.opset_imports.get("")) != opset:
        raise ValueError(f"opset: got {opset}, but torch.onnx wrote the program in {written}.")
    _fold_weights(program.model)
    if attributes is not None and 0 in axes:
        _spread_rows(program.model.graph)
    # Of each operator torch.onnx says from which line of which file on this machine it came.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    foreign = {f"{n.domain}::{n.op_type}" for n in program.model.graph.all_nodes() if n.domain}
    if foreign:
        raise RuntimeError(
            f"model: its program has {', '.join(sorted(foreign))}, which ONNX does not define, and "
            "other runtimes do not have."
        )
    return program


def _spread_rows(graph: Any) -> None:
    """Takes one row of attributes for every sample, as layers do, and else a row for each.

    torch.export knows but one size for both inputs' batches, and reads it off either; so that what
    a program did with another number of rows would depend on the form of its experts.
    """
    from onnx_ir import convenience, node, tensor

    image, attribute = graph.inputs
    size = node("Shape", [image], {"start": 0, "end": 1})
    shape = [size]
    if attribute.shape.rank() == 2:
        columns = node("Constant", [], {"value": tensor([attribute.shape[1]])})
        both = [size.outputs[0], columns.outputs[0]]
        shape += [columns, node("Concat", both, {"axis": 0})]
    spread = node("Expand", [attribute, shape[-1].outputs[0]])
    # An image of one would take the number of rows: this refuses it.
    rows = node("Reshape", [spread.outputs[0], shape[-1].outputs[0]])
    rows.outputs[0].shape, rows.outputs[0].type = attribute.shape, attribute.type
    convenience.replace_all_uses_with(attribute, rows.outputs[0])
    spread.replace_input_with(0, attribute)
    graph.insert_before(graph[0], [*shape, spread, rows])


def _fold_weights(program: Any) -> None:
    """Does once and for all what is done to weights alone: picking an expert's, transposing them.

    A product's weights then stand in the file as such, where quantizers look for them.
    """
    from onnxscript.optimizer import fold_constants_ir, remove_unused_nodes

    moves = {"Gather", "Reshape", "Slice", "Squeeze", "Transpose"}
    fold_constants_ir(program, should_fold=lambda node: True if node.op_type in moves else None)
    remove_unused_nodes(program)
