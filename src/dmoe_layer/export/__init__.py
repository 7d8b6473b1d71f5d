"""Exports a model with its attributes as an input: for torch.export, and as an ONNX file.

``torch.export.export(with_attributes(model), (x, attributes))`` gives a program of PyTorch, which
AOTInductor compiles for C++. ``export_onnx(model, "model.onnx", x, attributes)`` writes a file that
ONNX Runtime runs without PyTorch.

While a program is exported, the layers compute by ``dmoe_layer.aten``, so that the program contains
no operator that needs this package.
"""

from .onnx import export_onnx
from .scoped import with_attributes
from .trials import OnnxCheck

__all__ = ["OnnxCheck", "export_onnx", "with_attributes"]
