"""A model as a module of two tensors, (x, attributes)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..aten import FORMS, expert_form
from ..checks import check_choice, describe
from ..scope import routing


def with_attributes(model: nn.Module, *, experts: str = "auto") -> nn.Module:
    """``model`` as a module of two tensors, whose ``forward(x, attributes)`` opens the scope.

    It is what exporters want: attributes are an input of the program, and the scope is its own. It
    holds ``model`` itself under the name ``model``, and serves without export too.

    Args:
        model: called with x alone; its layers read the attributes from the scope, of which no
            record is kept. What this function has returned is taken as the model that it holds,
            and "auto" then leaves the form as it is.
        experts: how the experts are computed in a program that is exported; outside of one it says
            nothing. "sparse": each expert computes the rows of its own tokens, k experts a token,
            in shapes that depend on the data. "dense": all experts compute all tokens, n_experts/k
            times the work, in fixed shapes, as TensorRT and ExecuTorch want them. "auto": dense
            where k = n_experts, and where the program's number of tokens is fixed and so small that
            all experts' multiply-adds are at most ``aten.DENSE_MULTIPLY_ADDS``; else sparse.

    Returns:
        A module whose ``forward`` takes x as ``model`` does, and attributes, integers (batch,), or
        (batch, n) for n attributes.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    In a program of PyTorch's a wrong attribute raises an error as the program runs; in one that was
    exported to ONNX, an index that is out of range.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> from dmoe_layer.export import with_attributes
        >>> model = with_attributes(torch.nn.Sequential(DMoE(16, attribute_sizes=3)).eval())
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
