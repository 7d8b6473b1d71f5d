"""The example with which a file is exported, and the other inputs on which it is tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attributes import as_attributes
from ..checks import describe
from ..router import AttributeRouter


class FlatOutput(nn.Module):
    """A model whose outputs come as a tuple of tensors, whatever the original returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, attributes: Tensor | None = None) -> tuple[Tensor, ...]:
        return tuple(named_outputs(self.model(x, attributes)).values())


def named_outputs(output: Any, name: str = "output") -> dict[str, Tensor]:
    """The tensors of a model's output by name: a tensor, a tuple or a dict, which may be nested."""
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
            f"model: its output contains {describe(output)}, expected only tensors, which may be "
            "in tuples or dicts."
        )
    return {key: tensor for part in parts for key, tensor in part.items()}


class Example:
    """The example, once the model has run on it.

    Attributes:
        x: The input.
        attributes: Its attributes, int64, with a row for each sample.
        sizes: The number of values of each attribute.
        lowest: The lowest value that is no error: -1 if unknown is allowed, else 0.
        output_names: The names of the model's outputs.
    """

    def __init__(self, x: Tensor, attributes: Any, wrapped: FlatOutput) -> None:
        routers = [m for m in wrapped.modules() if isinstance(m, AttributeRouter) and m.sizes]
        if attributes is not None and not routers:
            raise ValueError(
                "attributes: got attributes, but no layer of the model has attribute_sizes, so "
                "nothing would use them. Pass None."
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
                    f"model: its {name} is torch.bfloat16, which NumPy does not support. Export it "
                    "outside of torch.autocast, or make the model return output.float()."
                )
        self.output_names = list(outputs)
        # Not before the run, since the layers refuse what does not fit.
        if self.attributes is not None:
            self.attributes = self.attributes.to(torch.int64)
        self.sizes = [min(sizes) for sizes in zip(*(r.sizes or () for r in routers), strict=True)]
        self.lowest = 0 if any(router.unknown == "error" for router in routers) else -1
        self.unknown = ", ".join(sorted({router.unknown for router in routers}))

    def batch(self, size: int, rows: Iterator[list[int]]) -> tuple[Tensor, Tensor | None]:
        """A batch of ``size`` samples: the example's in turn, with the next rows of values."""
        x = self.x[[i % self.x.shape[0] for i in range(size)]]
        if self.attributes is None:
            return x, None
        values = self.attributes.new_tensor([next(rows) for _ in range(size)])
        return x, values.reshape(size, *self.attributes.shape[1:])

    def rows(self) -> list[list[int]]:
        """Rows of values that contain every value of every attribute."""
        values = [range(self.lowest, size) for size in self.sizes]
        count = max(map(len, values), default=1)
        return [[own[i % len(own)] for own in values] for i in range(count)]
