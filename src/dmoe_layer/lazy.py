"""Modules that learn their width from the first input or from a state_dict."""

from __future__ import annotations

import threading
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from ._torch_private import stop_being_lazy
from .operators import draw_seed, seeded_generator
from .pretrained import FORMER_NAMES, Pretrained

# Two threads may make the first call of one module. The second one then only checks its input.
_MATERIALIZING = threading.Lock()


class UnshapedParameter(UninitializedParameter):
    """A parameter whose layer does not know its width yet; its errors say what to do."""

    cls_to_become = nn.Parameter

    @property
    def shape(self) -> Any:  # type: ignore[override]
        raise RuntimeError(_advice("shape"))

    @property
    def ndim(self) -> Any:  # type: ignore[override]
        raise RuntimeError(_advice("ndim"))

    def share_memory_(self) -> Any:
        raise RuntimeError(_advice("share_memory_"))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except ValueError as error:
            raise ValueError(_advice(getattr(func, "__name__", str(func)))) from error


def _advice(asked: str) -> str:
    return (
        f"DMoE: {asked} was called, but the layer does not know its width yet, so that its "
        "parameters have no shape. Run the model once on an example first, or make the layer with "
        "its width, DMoE(dim). Then copy, count, average, move or distribute it."
    )


class LazyDim(LazyModuleMixin, Pretrained):
    """A module whose parameters' shapes depend on ``dim``, which it learns at once or later.

    A subclass returns its parameters' shapes from ``_shapes(dim)``, calls ``_create_parameters`` at
    the end of its ``__init__``, and names in ``_dim_from`` the parameter whose last axis is
    ``dim``. Unlike ``nn.LazyLinear`` it does not change its class, so that a user's subclass works.

    The methods of the mixin that are replaced here have private names. If PyTorch renames them, the
    mixin's own methods run instead. They learn the shapes too, but check less, and are not safe for
    threads.
    """

    _dim_from: str

    @abstractmethod
    def _shapes(self, dim: int) -> dict[str, tuple[int, ...]]: ...

    @property
    def dim(self) -> int | None:
        """The width D of a token, or None as long as it is not known."""
        parameter = getattr(self, self._dim_from)
        return None if isinstance(parameter, UninitializedParameter) else parameter.shape[-1]

    def _create_parameters(self, dim: int | None, device: Any, dtype: Any) -> None:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype.")
        lazy_parameter: Any = UnshapedParameter
        for name, shape in self._shapes(dim or 1).items():
            parameter = (
                lazy_parameter(device=device, dtype=dtype)
                if dim is None
                else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
            self.register_parameter(name, parameter)
        self._expect_values()
        # The seed is drawn here, so that the first call does not draw weights from the global
        # generator. When activation checkpointing repeats that call, it must find the same noise.
        if dim is None:
            self._init_seed = draw_seed()
        else:
            self.reset_parameters()
            self._learn_dim(dim)

    def _learn_dim(self, dim: int) -> None:
        """Gives the parameters their shapes if they have none yet; the module is then complete."""
        if self.dim is None:
            self._materialize(dim)
        stop_being_lazy(self)

    def _materialize(self, dim: int) -> None:
        # The first call may be one in inference mode; training must still be possible later.
        with torch.inference_mode(False), torch.no_grad():
            for name, shape in self._shapes(dim).items():
                getattr(self, name).materialize(shape)
            device = getattr(self, self._dim_from).device
            if device.type != "meta":
                self.reset_parameters(seeded_generator(device, self._init_seed))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for former, name in FORMER_NAMES.items():
            # If both are there, a loader may have filled in the model's own value as the new one.
            if prefix + former in state_dict and prefix + name not in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + former)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._has_values = True

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "DMoE: torch.jit.script cannot compile this layer. Use torch.export.export to export "
            "it, or torch.compile to make it faster."
        )

    def _infer_parameters(self, module: Any, args: Any, kwargs: Any = None) -> None:
        with _MATERIALIZING:
            self.initialize_parameters(*args, **(kwargs or {}))

    def _lazy_load_hook(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        source = state_dict.get(prefix + self._dim_from)
        lazy_source = not isinstance(source, Tensor) or isinstance(source, UninitializedParameter)
        if self.dim is not None or lazy_source:
            return
        shapes = self._shapes(source.shape[-1]) if source.ndim else {}
        found = {n: tuple(state_dict[prefix + n].shape) for n in shapes if prefix + n in state_dict}
        wrong = [
            f"{prefix}{name}: found {shape}, expected {shapes[name]}"
            for name, shape in found.items()
            if shape != shapes[name]
        ]
        if wrong or not shapes:
            errors.extend(wrong or [f"{prefix}{self._dim_from}: found a scalar"])
        else:
            self._materialize(source.shape[-1])

    def _replicate_for_data_parallel(self) -> Any:
        if self.dim is None:
            return super()._replicate_for_data_parallel()
        return nn.Module._replicate_for_data_parallel(self)
