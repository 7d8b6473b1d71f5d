"""A model as a module of two tensors, (x, attributes)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..aten import FORMS, expert_form
from ..checks import check_choice, describe
from ..scope import routing


def with_attributes(model: nn.Module, *, experts: str = "auto") -> nn.Module:
    """Wraps ``model`` in a module of two inputs, ``forward(x, attributes)``, which opens the scope.

    A program that is exported needs the attributes as an input, and must open its own scope. The
    wrapper does both. It holds ``model`` itself under the name ``model``, and also works without
    export.

    A wrong attribute value is an error in the exported program too. A program of PyTorch raises it
    when it runs. A program that was exported to ONNX reads at an index out of range, which ONNX
    Runtime reports as an error.

    Args:
        model: A model that is called with x alone, and whose layers read the attributes from a
            scope. The scope records no routing. If ``model`` is such a wrapper already, the model
            inside is wrapped, and "auto" does not change how its experts are computed.
        experts: How an exported program computes the experts. It has no effect outside of export.
            "sparse": each expert computes the tokens that were sent to it, in shapes that depend
            on the data. "dense": all experts compute all tokens. That is n_experts/k times the
            work, but all shapes are fixed, as TensorRT and ExecuTorch need. "auto": dense if k =
            n_experts, or if the number of tokens is fixed and all experts together need at most
            2²¹ multiply-adds; otherwise sparse. (A multiply-add is a product and a sum.)

    Returns:
        A module whose ``forward`` takes x, as ``model`` does, and the attributes: integers of shape
            (batch,), or (batch, n) for n attributes.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: ``experts`` is none of the three names.

    Examples:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> from dmoe_layer.export import with_attributes
        >>> model = torch.nn.Sequential(DMoE(16, attribute_sizes=3)).eval()
        >>> model = with_attributes(model)
        >>> x, attributes = torch.randn(2, 10, 16), torch.tensor([0, 2])
        >>> program = torch.export.export(model, (x, attributes)).module()
        >>> torch.allclose(program(x, attributes), model(x, attributes), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {describe(model)}, expected a torch.nn.Module.")
    check_choice("experts", experts, FORMS)
    if isinstance(model, _WithAttributes):
        experts = model.experts if experts == "auto" else experts
        model = model.model
    return _WithAttributes(model, experts)


class _WithAttributes(nn.Module):
    def __init__(self, model: nn.Module, experts: str) -> None:
        super().__init__()
        self.model, self.experts = model, experts
        self.training = model.training  # and no part of the model, which may be in another mode

    def forward(self, x: Tensor, attributes: Tensor | None = None) -> Any:
        with routing(attributes, record=False), expert_form(self.experts):
            return self.model(x)

    def extra_repr(self) -> str:
        return f"experts={self.experts!r}"
