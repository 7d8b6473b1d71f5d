"""Records the layer's own kernel launches, without running them, with other blocks if asked.

The one file outside ``dmoe_layer`` that uses other than its public names: the kernels' backend.
What needs Triton is imported when it is called: not every system has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch

from dmoe_layer import DMoE, backend
from dmoe_layer.activations import ACTIVATIONS

from ..layer.shapes import Shape
from ..paper import DROPOUT, N_EXPERTS, K


class Launch(NamedTuple):
    """A recorded launch: the kernel, what it was given, how it is compiled, how many programs."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def variant(self) -> str:
        """The options that this launch of the kernel uses."""
        flags = ("SPLIT", "NOISY")
        words = [flag.lower() for flag in flags if self.options.get(flag)]
        if self._has("kept_ptr"):
            words.append("drop")
        return " ".join(words)

    def value(self, name: str) -> Any:
        """The value of the kernel's parameter of this name."""
        names = [parameter.name for parameter in self.kernel.params[: len(self.arguments)]]
        return self.arguments[names.index(name)] if name in names else self.options[name]

    def _has(self, name: str) -> bool:
        """Whether the kernel has a parameter of this name, and it was given a tensor."""
        is_there = any(parameter.name == name for parameter in self.kernel.params)
        return is_there and self.value(name) is not None

    @property
    def programs(self) -> int:
        """The number of programs."""
        return math.prod(self.grid)

    @property
    def window_rows(self) -> int:
        """The rows of a window of tiles, in a launch that sums over an expert's rows."""
        from dmoe_layer.fused.kernels.common import TILE

        return int(self.value("window_tiles") * TILE.value)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that are compiled alike."""
        values = []
        for parameter in self.kernel.params:
            value = self.value(parameter.name)
            if isinstance(value, torch.Tensor):
                values.append(str(value.dtype))
            elif parameter.is_constexpr or not isinstance(value, int):
                values.append(repr(value) if value is None or parameter.is_constexpr else "float")
            else:  # as Triton's own launcher specializes it
                special = not parameter.do_not_specialize
                kinds = (abs(value) >= 2**31, special and value == 1, special and value % 16 == 0)
                values.append(repr(kinds))
        others = {n: v for n, v in self.options.items() if n.startswith(("num_", "enable_"))}
        return self.kernel.__name__, *values, *sorted(others.items())


@dataclass(frozen=True)
class LayerStep:
    """A step of a DMoE: a training step, or a call in eval mode, with gradients or without.

    Attributes:
        balanced: the loss has a term of the router's logits, as one that balances experts.
        blocks: other blocks than the layer's own, as :func:`other_blocks` reads them.
        capability: of the GPU that it is launched for.
        autocast: under ``torch.autocast`` in bf16, which leaves parameters and x in ``dtype``.
        x_dtype: of x, if it is another, as behind a convolution under autocast.
    """

    dim: int
    dtype: torch.dtype
    activation: str = "relu"
    n_experts: int = N_EXPERTS
    k: int = K
    batch: int = 2
    tokens: int = 256  # of a sample
    values: int = 3
    training: bool = True
    gradients: bool = True
    balanced: bool = True
    blocks: str = ""
    capability: int = 90
    autocast: bool = False
    x_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, **others: Any) -> LayerStep:
        """A step at a shape of the layer's benchmark."""
        return cls(
            shape.dim, dtype, n_experts=shape.experts, k=shape.k, batch=shape.batch,
            tokens=shape.tokens, values=shape.values, **others,
        )  # fmt: skip

    def launches(self) -> list[Launch]:
        """The launches of the step, in their order."""
        launches: list[Launch] = []
        with (
            intercepted(launches.append, self.capability),
            other_blocks(self.blocks),
            torch.autocast("cpu", torch.bfloat16, enabled=self.autocast),
        ):
            self._run()
        return launches

    def _run(self) -> None:
        layer = DMoE(
            self.dim,
            n_experts=self.n_experts,
            k=self.k,
            attribute_sizes=self.values,
            activation=self.activation,
            dropout=DROPOUT,
            backend="triton",
            device="meta",
            dtype=self.dtype,
        ).to_empty(device="cpu")
        x_dtype = self.x_dtype or self.dtype
        x = torch.empty(self.batch, self.tokens, self.dim, dtype=x_dtype)
        attributes_B = torch.arange(self.batch) % self.values
        layer.train(self.training)
        if not self.gradients:
            with torch.no_grad():
                layer(x, attributes_B)
            return
        y, routing = layer(x.requires_grad_(), attributes_B, return_routing=True)
        outputs = [y, routing.logits] if self.balanced else [y]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


@contextmanager
def intercepted(take: Callable[[Launch], object], capability: int = 90) -> Iterator[None]:
    """Gives ``take`` what is launched inside. Nothing is computed, and no memory touched.

    As if x were on a GPU of this compute capability; it is on the CPU.
    """
    from triton.runtime import JITFunction

    from dmoe_layer.fused import narrow, router, wide

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        take(Launch(kernel, arguments, options, grid))

    # In place of what Triton does for ``kernel[grid](...)``.
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(backend, "_obstacle_of_machine", return_value=""),
        mock.patch.object(narrow, "compute_capability", return_value=capability),
        mock.patch.object(wide, "compute_capability", return_value=capability),
        mock.patch.object(router, "compute_capability", return_value=capability),
    ):
        yield


def fused_activations() -> list[str]:
    """The activations that the kernels have."""
    return [name for name, activation in ACTIVATIONS.items() if activation.fused]


@contextmanager
def other_blocks(text: str) -> Iterator[None]:
    """The layer with other blocks in one of its launches: ``"weights:rows=128,warps=8"``.

    The launches: ``forward``, ``rows`` and ``weights`` of narrow experts, ``gemm`` of wide ones.
    Empty: the layer's own blocks.
    """
    launch, _, words = text.partition(":")
    if not launch:
        yield
        return
    changes = {name: int(n) for name, n in (word.split("=") for word in words.split(","))}
    with _patched(launch, changes):
        yield


def _patched(launch: str, changes: dict[str, int]) -> Any:
    from dmoe_layer.fused import narrow, wide

    experts = {
        "forward": (narrow, "_forward_blocks"),
        "rows": (narrow, "_row_blocks"),
        "weights": (narrow, "_weight_blocks"),
        "gemm": (wide, "_gemm_blocks"),
    }
    if launch not in experts:
        raise ValueError(f"blocks: got {launch!r}, expected one of {', '.join(experts)}.")
    module, name = experts[launch]
    own = getattr(module, name)
    return mock.patch.object(module, name, lambda *given: own(*given)._replace(**changes))
