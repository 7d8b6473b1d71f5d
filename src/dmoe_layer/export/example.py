"""The example that a file is exported with, and what else it is tried on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attributes import as_attributes
from ..checks import describe
from ..router import AttributeRouter


class FlatOutput(nn.Module):
    """The model with its outputs as a tuple of tensors, whatever they come in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, attributes: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.model(x, attributes)).values())


def named_outputs(output: Any, name: str = "output") -> dict[str, Tensor]:
    """The tensors of a model's output by name; it may be one, a tuple, a dict, or nested ones."""
    if isinstance(output, Tensor):
        return {name: output}
    if isinstance(output, Mapping):
        parts = [named_outputs(part, key) for key, part in output.items() if part is not None]
    elif isinstance(output, (tuple, list)):
        parts = [
            named_outputs(part, f"{name}_{i}") for i, part in enumerate(output) if part is not None
        ]
    else:
        raise TypeError(
            f"model: its output has {describe(output)}, expected tensors, in tuples or dicts."
        )
    return {key: tensor for part in parts for key, tensor in part.items()}


class Example:
    """The example, once the model has run on it.

    Attributes:
        x, attributes: the example; attributes are int64, a row for each sample.
        sizes: how many values each attribute has.
        lowest: the lowest value of each attribute that is no error: -1 where unknown is allowed.
        output_names: of the model's outputs.
    """

    def __init__(self, x: Tensor, attributes: Any, wrapped: FlatOutput) -> None:
        routers = [m for m in wrapped.modules() if isinstance(m, AttributeRouter) and m.sizes]
        if attributes is not None and not routers:
            raise ValueError(
                "attributes: got some, but no layer of the model has attribute_sizes, and nothing "
                "would look at them. Pass None."
            )
        self.x, self.attributes = x.detach().as_subclass(Tensor), None
        if attributes is not None:
            values = as_attributes(attributes).values.detach()
            values = values.reshape(1) if values.ndim == 0 else values
            if values.shape[0] == 1:
                values = values.expand(x.shape[0], *values.shape[1:])
            self.attributes = values
        with torch.no_grad():
            outputs = named_outputs(wrapped.model(self.x, self.attributes))
        for name, output in outputs.items():
            if output.dtype == torch.bfloat16:
                raise ValueError(
                    f"model: its {name} is torch.bfloat16, which NumPy does not have. Leave "
                    "torch.autocast, or have the model return output.float()."
                )
        self.output_names = list(outputs)
        # Only now, since the layers themselves have refused what does not fit.
        if self.attributes is not None:
            self.attributes = self.attributes.to(torch.int64)
        self.sizes = [min(sizes) for sizes in zip(*(r.sizes or () for r in routers), strict=True)]
        self.lowest = 0 if any(router.unknown == "error" for router in routers) else -1
        self.unknown = ", ".join(sorted({router.unknown for router in routers}))

    def batch(self, size: int, rows: Iterator[list[int]]) -> tuple[Tensor, Tensor | None]:
        """So many samples, the example's again and again, with the next rows of values."""
        x = self.x[[i % self.x.shape[0] for i in range(size)]]
        if self.attributes is None:
            return x, None
        values = self.attributes.new_tensor([next(rows) for _ in range(size)])
        return x, values.reshape(size, *self.attributes.shape[1:])

    def rows(self) -> list[list[int]]:
        """Rows of values, in which every value of every attribute is."""
        values = [range(self.lowest, size) for size in self.sizes]
        count = max(map(len, values), default=1)
        return [[own[i % len(own)] for own in values] for i in range(count)]
