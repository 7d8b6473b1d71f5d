"""The kinds of program that run a network: functions without arguments that return its output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dmoe_layer.export import export_onnx, with_attributes

from .subjects import Subject, dense_twin

EAGER, SPARSE, DENSE_ONNX = "eager", "onnx-sparse", "mlp-onnx"
Run = Callable[[], np.ndarray]


def _torch(subject: Subject, model: nn.Module, compiled: bool = False) -> Run:
    two_inputs: Any = with_attributes(model)
    if compiled:
        two_inputs = torch.compile(two_inputs)
    x, attributes = subject.x(), subject.attributes()

    def run() -> np.ndarray:
        with torch.no_grad():
            return _first(two_inputs(x, attributes)).numpy()

    return run


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def _onnx(subject: Subject, build: Callable[[], nn.Module], file: Path, experts: str | None) -> Run:
    """By onnxruntime, from ``file``, which is written if it is not there."""
    import onnxruntime

    # None: the dense twin, which routes by nothing.
    attributes = None if experts is None else subject.attributes()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # The batch stays open, as it does in use, and so does the number of tokens.
        export_onnx(build(), file, subject.x(), attributes, experts=experts or "auto")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads spin on after a run, on the cores of the next in turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {"image": subject.x().numpy()}
    if attributes is not None:
        inputs["attribute"] = attributes.numpy()
    return lambda: session.run(None, inputs)[0]


# name: (subject, its folder of files) -> a run
WAYS: dict[str, Callable[[Subject, Path], Run]] = {
    EAGER: lambda s, folder: _torch(s, s.network()),
    "compiled": lambda s, folder: _torch(s, s.network(), compiled=True),
    SPARSE: lambda s, f: _onnx(s, s.network, f / "sparse.onnx", "sparse"),
    "onnx-dense": lambda s, f: _onnx(s, s.network, f / "dense.onnx", "dense"),
    "mlp-eager": lambda s, folder: _torch(s, dense_twin(s.network())),
    DENSE_ONNX: lambda s, f: _onnx(s, lambda: dense_twin(s.network()), f / "mlp.onnx", None),
}
# All but the twins compute the same.
TWINS = ("mlp-eager", DENSE_ONNX)
