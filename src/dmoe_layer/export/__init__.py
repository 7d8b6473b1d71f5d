"""Programs that leave Python: a model as a function of (x, attributes), and as an ONNX file.

    torch.export.export(with_attributes(model), (x, attributes))    PyTorch's; C++ by AOTInductor
    export_onnx(model, "model.onnx", x, attributes)                 ONNX Runtime, without PyTorch

While a program is exported, layers compute by ``dmoe_layer.aten``: in what comes out there is no
operator that needs this package.
"""

from .onnx import export_onnx
from .scoped import with_attributes
from .trials import OnnxCheck

__all__ = ["OnnxCheck", "export_onnx", "with_attributes"]
