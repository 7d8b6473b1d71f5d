"""Writes a model as an ONNX file of standard operators, after it has checked the file."""

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
    """Writes ``model`` as an ONNX file of standard operators, and checks the file.

    The file has the input ``image`` for x, and the input ``attribute`` (int64) for the attributes.
    If the model returns a tensor, the output is called ``output``. A tuple gives ``output_0``,
    ``output_1`` and so on. A dict gives its keys. A run fails if an attribute value is out of
    range, or if it is unknown and a layer has ``unknown="error"``. ONNX Runtime then reports
    "indices element out of data bounds".

    ONNX Runtime runs the file on the CPU before it gets its name, and the results are compared
    with those of the model. The inputs of this check are:

    - the example;
    - every value of every attribute, and the unknown value if it is allowed, in batches of one
      sample and of one sample more than the example has;
    - an example that is twice as large, for each further axis of ``dynamic_axes``;
    - wrong attribute values, which the file must refuse.

    Args:
        model: A model in eval mode, in float32, float64 or float16. bfloat16 is not possible,
            because NumPy does not support it. The layers of the model read the attributes from a
            scope. A wrapper that [`with_attributes`][] made is exported with its own form of the
            experts.
        path: The file, in a folder that exists. An existing file is replaced at the end, as a whole
            or not at all. If the weights take more than 2 GiB, they go into a second file beside
            it, whose name ends in ".data".
        x: An example of the model's input, (batch, ...).
        attributes: The attributes of the example, (batch,), or (batch, n) for n attributes. A
            scalar or a batch of 1 applies to every sample. Pass None for a model in which no layer
            routes by attributes. The file then has no second input.
        dynamic_axes: The axes of x whose size the file leaves open. 0 is the batch.
        experts: "sparse", "dense" or "auto", as in [`with_attributes`][].
        opset: The version of ONNX's operators, 18 or newer.
        attribute_values: The name of each attribute, and the meaning of its values in order, such
            as ``{"site": ["Boston", "Leeds"]}``. They are written into the file's metadata.
        metadata: Further entries of the metadata. The file always has ``dmoe_layer.version``,
            ``torch.version`` and ``dmoe_layer.attributes``. The last one is a JSON list with an
            entry {"name", "size", "values", "unknown"} for each attribute. Name and values are
            null without ``attribute_values``.
        tolerance: The largest difference between file and model that is allowed. It is relative,
            as in [`OnnxCheck`][].

    Returns:
        The result of the check.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed. The extra ``export`` of this
            package brings them.
        ValueError: An argument is out of range, the model is in training mode, or the model takes
            or returns bfloat16.
        TypeError: An argument has the wrong type.
        RuntimeError: The file's results differ from the model's, the file accepts a wrong attribute
            value, or it needs operators that are not ONNX's own. Nothing is written then. The same
            holds if PyTorch's exporter or ONNX Runtime raises an error.

    Examples:
        >>> import tempfile, torch
        >>> from dmoe_layer import DMoE
        >>> from dmoe_layer.export import export_onnx
        >>> model = torch.nn.Sequential(DMoE(16, attribute_sizes=3)).eval()
        >>> x, attributes = torch.randn(2, 10, 16), torch.tensor([0, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = export_onnx(model, f"{folder}/model.onnx", x, attributes)
        >>> found.largest_difference < 1e-3
        True
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
            f"export_onnx: not installed: {', '.join(missing)}. The extra 'export' of dmoe-layer "
            "brings all that is needed, such as by pip install '.[export]' in a clone."
        )


def _require_inference(model: nn.Module) -> None:
    training = [name or "the model" for name, m in model.named_modules() if m.training]
    if training:
        raise ValueError(
            f"model: {training[0]} is in training mode, but the file will run in eval mode. Call "
            "model.eval() first."
        )
    for name, module in model.named_modules():
        if isinstance(module, AttributeRouter) and module.noise == "always":
            raise ValueError(
                f"model: {name} has noise='always', so that each run gives another result, and the "
                "file cannot be checked. Set its noise to 'train' or 'never'."
            )


def _refuse_bfloat16(model: nn.Module, x: Tensor) -> None:
    if x.dtype == torch.bfloat16:
        raise ValueError(
            "x: got torch.bfloat16, which NumPy does not support, so that the file could not be "
            "run. Pass x.float(), and the model in float32."
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16:
            raise ValueError(
                f"model: {name} is torch.bfloat16, in which ONNX Runtime does not compute on the "
                "CPU. Export copy.deepcopy(model).float(), which has the same weights in float32."
            )


def _checked_axes(x: Any, axes: Sequence[int]) -> list[int]:
    if not isinstance(x, Tensor) or x.ndim == 0 or x.shape[0] == 0:
        raise TypeError(
            f"x: got {describe(x)}, expected a tensor (batch, ...) of at least one sample."
        )
    if not isinstance(axes, Iterable):
        raise TypeError(f"dynamic_axes: got {describe(axes)}, expected axes of x, such as (0,).")
    wrong = [
        a for a in axes if isinstance(a, bool) or not isinstance(a, int) or not 0 <= a < x.ndim
    ]
    if wrong:
        raise ValueError(f"dynamic_axes: got {wrong[0]!r}, expected axes of x, 0 .. {x.ndim - 1}.")
    return sorted(set(axes))


def _checked_values(attribute_values: Any) -> Mapping[str, Sequence[str]]:
    """Checks the names and values by which a reader of the file finds the number of a value."""
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
                f"attribute_values: got {name!r}: {values!r:.60}, expected a different text for "
                "each value, since a reader finds the value's number by it."
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
            f"attribute_values: got {dict(zip(attribute_values, lengths, strict=True))}, which are "
            f"names and numbers of values, expected {len(example.sizes)} attributes with "
            f"{example.sizes} values."
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
    """Exports the program; ``torch.onnx`` gets two samples, since it would fix a batch of one."""
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
            "export_onnx: torch.onnx.export returned no program, and gave no reason. Try another "
            f"version of PyTorch than {torch.__version__}."
        )
    if (written := program.model.opset_imports.get("")) != opset:
        raise ValueError(f"opset: got {opset}, but torch.onnx wrote the program in {written}.")
    _fold_weights(program.model)
    if attributes is not None and 0 in axes:
        _spread_rows(program.model.graph)
    # torch.onnx notes for each operator from which line of which file on this machine it came.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    foreign = {f"{n.domain}::{n.op_type}" for n in program.model.graph.all_nodes() if n.domain}
    if foreign:
        raise RuntimeError(
            f"model: its program needs the operators {', '.join(sorted(foreign))}, which ONNX does "
            "not define, so that other runtimes do not have them."
        )
    return program


def _spread_rows(graph: Any) -> None:
    """Makes a program accept one row of attributes for all samples, as layers do, or one for each.

    torch.export has one size for the batches of both inputs, and may read it from either. So what a
    program did with another number of rows would depend on the form of its experts.
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
    # A batch of one image would become as many as there are rows. This refuses it.
    rows = node("Reshape", [spread.outputs[0], shape[-1].outputs[0]])
    rows.outputs[0].shape, rows.outputs[0].type = attribute.shape, attribute.type
    convenience.replace_all_uses_with(attribute, rows.outputs[0])
    spread.replace_input_with(0, attribute)
    graph.insert_before(graph[0], [*shape, spread, rows])


def _fold_weights(program: Any) -> None:
    """Computes in advance what is done only to weights, such as to pick an expert's, or transpose.

    The file then contains the weights of each product as such, where quantizers look for them.
    """
    from onnxscript.optimizer import fold_constants_ir, remove_unused_nodes

    moves = {"Gather", "Reshape", "Slice", "Squeeze", "Transpose"}
    fold_constants_ir(program, should_fold=lambda node: True if node.op_type in moves else None)
    remove_unused_nodes(program)
