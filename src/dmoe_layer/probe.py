"""A probe of a foreign block: a copy of it with random weights, and what passes through it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# These only pass on what they get, or drop of it what training drops.
_TRANSPARENT = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Probe:
    """A copy of a block on the CPU in double precision, with random weights and a random input.

    Random weights, because real ones that are zero, as some are before training, would hide what
    is done with them. A copy, so that nothing of the block changes, not even its random state, and
    a block on "meta" can be tried too.

    Args:
        mlp: the block.
        names: of its two linear layers.

    Attributes:
        linears: the copy's two linear layers.
        x: (8, 16, D), what the copy is given.
        inputs, outputs: by name, what went into and came out of each linear layer in the last run.
        others: names of the other modules that ran before the first linear layer, between the two,
            and after the second.

    Raises:
        ValueError: the block cannot be copied.
    """

    def __init__(self, mlp: nn.Module, names: tuple[str, str]) -> None:
        self._kind, self.names = type(mlp).__name__, names
        generator = torch.Generator("cpu").manual_seed(0)
        self._module = _copy_of(mlp, generator)
        self.linears: list[Any] = [self._module.get_submodule(name) for name in names]
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.others: list[list[str]] = [[]]
        for name, module in self._module.named_modules():
            if name in names or not any(module.children()):
                note = functools.partial(self._note, name)
                module.register_forward_hook(note, with_kwargs=True)
        # From small to large, to meet an activation around 0 and where it saturates or is cut.
        size_T1 = torch.logspace(-3, 2, 16, dtype=torch.float64, device="cpu")[:, None]
        self.x = _random((8, 16, widths_of(self.linears[0])[0]), generator) * size_T1

    def run(self, *, training: bool) -> Tensor:
        """The copy's output, always with the same random numbers.

        Raises:
            ValueError: it cannot be run on one tensor, or returns something else.
        """
        self.inputs, self.outputs, self.others = {}, {}, [[]]
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.default_generator.manual_seed(0)
                y = self._module.train(training)(self.x.clone())
            if not isinstance(y, Tensor):
                raise TypeError(f"it returned {type(y).__name__}, expected one tensor")
        except Exception as error:
            given = f"one tensor of shape (batch, tokens, {self.x.shape[-1]})"
            raise ValueError(f"{self._kind}: could not run it on {given}: {error}") from error
        return y

    def ran_in_order(self) -> bool:
        """Whether each linear layer ran once, the first one first."""
        return tuple(self.inputs) == self.names and len(self.others) == 3

    def is_pointwise(self) -> bool:
        """Whether an input of the second layer depends on one output of the first layer only."""
        z_BTH, h_BTH = self.outputs[self.names[0]], self.inputs[self.names[1]]
        if z_BTH.shape != h_BTH.shape or not h_BTH.requires_grad:
            return z_BTH.shape == h_BTH.shape
        # The largest of a token with neighbours: hardly one where the activation is flat.
        token = z_BTH.shape[1] // 2
        place = (1, token, int(h_BTH[1, token].argmax()))
        with torch.enable_grad():
            (slope_BTH,) = torch.autograd.grad(h_BTH[place], z_BTH, materialize_grads=True)
        slope_BTH[place] = 0
        return not slope_BTH.any()

    def _note(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Notes what passes through a module; a forward hook."""
        if name in self.names:
            given = [*args, *kwargs.values()]
            self.inputs[name] = given[0].clone()
            self.outputs[name] = output
            self.others.append([])
            return output.clone()  # An activation may work in place.
        if not isinstance(module, _TRANSPARENT):
            self.others[-1].append(f"{name!r} {type(module).__name__}")
        return None


def _copy_of(mlp: nn.Module, generator: torch.Generator) -> nn.Module:
    """A deep copy in double precision with other weights."""
    # What its memo holds, deepcopy takes for copied. It refuses tensors with a history, that were
    # kept from a forward pass or put there by weight_norm.
    kept = [t for m in mlp.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept}
    try:
        for parameter in mlp.parameters():
            if parameter.is_floating_point():
                memo[id(parameter)] = nn.Parameter(_random(parameter.shape, generator))
        for buffer in mlp.buffers():
            if buffer.is_meta:  # A table of indices, say, in which zeros are as good as any.
                memo[id(buffer)] = torch.zeros_like(buffer, device="cpu")
        return copy.deepcopy(mlp, memo).to("cpu", torch.float64)
    except Exception as error:
        kind = type(mlp).__name__
        raise ValueError(f"{kind}: could not copy it to read it: {error}") from error


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.empty(shape, dtype=torch.float64, device="cpu")
    return values.uniform_(-1, 1, generator=generator)  # an eighth of the cost of normal


def same_output(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a probe are those of one formula."""
    # A block that casts to fp32 inside is off by 1e-7; GELU and its tanh form differ by 5e-4.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer; Hugging Face's GPT-2 family has its own, ``Conv1D``."""
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return is_conv1d or isinstance(module, nn.Linear)


def widths_of(linear: Any) -> tuple[int, int]:
    """(in, out), without a look at a weight that is computed when looked at."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    width_in, width_out = linear.weight.shape
    return width_in, width_out


def weight_of(linear: Any) -> Tensor:
    """(out, in), as ``nn.Linear`` has it; ``Conv1D``'s is stored transposed."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.mT


def apply_linear(linear: Any, x: Tensor) -> Tensor:
    """What a linear layer's weight and bias say, whatever it does itself."""
    return F.linear(x, weight_of(linear), linear.bias)
