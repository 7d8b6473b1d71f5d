"""A probe of a foreign block: a copy of it with random weights, and what passes through it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .linears import (
    describe_convolution,
    is_1x1_convolution,
    is_spatial_convolution,
    widths_of,
)

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
_BATCH, _TOKENS = 4, 16
_TOKEN = 24  # one of these 64 that has neighbours
# What stands in for an argument that a block requires beside its input: mostly that is the height
# or width of a map, and 16 tokens are one of 4 x 4.
_MADE_UP = 4
_SIZES = ("h", "w", "height", "width")


class Probe:
    """A copy of a block on the CPU in double precision, with random weights and a random input.

    Random weights, because real ones that are zero, as some are before training, would hide what
    is done with them. A copy, so that nothing of the block changes, not even its random state, and
    a block on "meta" can be tried too.

    Args:
        mlp: the block.
        names: of its linear layers, the last one last.

    Attributes:
        linears: the copy's linear layers.
        x: (4, 16, D), the tokens that the copy is given.
        form: what makes of them the layout in which it is given them.
        inputs, outputs: by name, what went into and came out of each linear layer in the last run.
        others: names of the other modules that ran before the first linear layer, between the
            linear layers, and after the last.
        made_up: the arguments beside the tokens that the copy requires, and what it is given.

    Raises:
        ValueError: the block cannot be copied.
    """

    def __init__(self, mlp: nn.Module, names: tuple[str, ...]) -> None:
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
        size_T1 = torch.logspace(-3, 2, _TOKENS, dtype=torch.float64, device="cpu")[:, None]
        self.x = _random((_BATCH, _TOKENS, widths_of(self.linears[0])[0]), generator) * size_T1
        self.form: Callable[[Tensor], Tensor] = lambda x_BTD: x_BTD
        self._more, self._named = _arguments_of(self._module)
        self.made_up = {**self._more, **self._named}

    def run(self, *, training: bool) -> Tensor:
        """The copy's output, always with the same random numbers.

        Raises:
            ValueError: it cannot be run on one tensor, or returns something else.
        """
        self.inputs, self.outputs, self.others = {}, {}, [[]]
        x = self.form(self.x.clone())
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.default_generator.manual_seed(0)
                y = self._module.train(training)(x, *self._more.values(), **self._named)
            if not isinstance(y, Tensor):
                raise TypeError(f"it returned {type(y).__name__}, expected one tensor")
        except Exception as error:
            width, maps = self.x.shape[2], is_1x1_convolution(self.linears[0])
            given = (
                f"one tensor of shape (batch, {f'{width}, ...' if maps else f'tokens, {width}'})"
            )
            more = f" and {self.shown_made_up()}" if self.made_up else ""
            raise ValueError(f"{self._kind}: could not run it on {given}{more}: {error}") from error
        return y

    def shown_made_up(self) -> str:
        """The arguments beside the tokens, in an error's words."""
        sizes = [f"{n}={v}" for n, v in self.made_up.items() if n.lower() in _SIZES]
        others = [repr(name) for name in self.made_up if name.lower() not in _SIZES]
        if others:
            sizes.append(f"{_MADE_UP} for what could not be made up ({', '.join(others)})")
        return ", ".join(sizes)

    def rows(self, t: Tensor) -> Tensor:
        """(N, channels), a row for every token, of whatever layout a block has made."""
        t = t.movedim(1, -1) if is_1x1_convolution(self.linears[0]) else t
        return t.reshape(-1, t.shape[-1])

    def ran_in_order(self) -> bool:
        """Whether each linear layer ran once, the last one last."""
        ran = [*self.inputs]
        once = len(self.others) == len(self.names) + 1 and {*ran} == {*self.names}
        return once and ran[-1] == self.names[-1]

    def mixes_tokens(self) -> bool:
        """Whether an input of the last linear layer depends on other tokens than its own."""
        *first, last = self.names
        between = [*(self.outputs[name] for name in first), self.inputs[last]]
        if any(self.rows(t).shape[0] != _BATCH * _TOKENS for t in between):
            return True
        return self.others_change(lambda output: self.inputs[last])

    def others_change(self, look: Callable[[Tensor], Tensor]) -> bool:
        """Whether something of other tokens changes with one token.

        Tried, not derived: what a block has detached has no gradient. ``look`` is given the output
        of a run, and returns what is looked at.
        """
        noted = self.x, self.inputs, self.outputs, self.others
        before = look(self.run(training=False))
        self.x = self.x.clone()
        self.x.view(-1, self.x.shape[2])[_TOKEN] += 1
        changed_NH = self.rows(look(self.run(training=False))) != self.rows(before)
        self.x, self.inputs, self.outputs, self.others = noted
        return bool(_without_row(changed_NH, _TOKEN).any())

    def mixes_units(self) -> bool:
        """Whether an input of the last linear layer depends on several units of one before.

        Of a layer that is twice as wide as the last one's input it may be one unit in each half.
        """
        *first, last = self.names
        h_NH, z = self.rows(self.inputs[last]), [self.outputs[name] for name in first]
        if not h_NH.requires_grad:
            return False
        # The largest: hardly one where the activation is flat.
        unit = int(h_NH[_TOKEN].argmax())
        try:
            slopes = torch.autograd.grad(
                h_NH[_TOKEN, unit], z, retain_graph=True, materialize_grads=True
            )
        except RuntimeError as error:
            raise ValueError(f"{self._kind}: could not run it backward: {error}") from error
        width = widths_of(self.linears[-1])[0]
        parts = [self.rows(slope)[_TOKEN].view(-1, width).T for slope in slopes]
        return any(_without_row(part, unit).any() for part in parts)

    def _note(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Notes what passes through a module; a forward hook."""
        if name in self.names:
            given = [*args, *kwargs.values()]
            self.inputs[name] = given[0].clone()
            self.outputs[name] = output
            self.others.append([])
            return output.clone()  # An activation may work in place.
        if not isinstance(module, _TRANSPARENT):
            described = f"{name!r} {type(module).__name__}"
            if is_spatial_convolution(module):
                described += f", a {describe_convolution(module)}"
            self.others[-1].append(described)
        return None


def _arguments_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a module requires beside its first argument, by place and by name."""
    try:
        parameters = [*inspect.signature(module.forward).parameters.values()]
    except (TypeError, ValueError):  # it is no Python function
        return {}, {}
    required = [p for p in parameters if p.default is p.empty]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    more = {p.name: _MADE_UP for p in required if p.kind in by_place and p is not parameters[0]}
    return more, {p.name: _MADE_UP for p in required if p.kind is p.KEYWORD_ONLY}


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


def _without_row(rows: Tensor, row: int) -> Tensor:
    return torch.cat([rows[:row], rows[row + 1 :]])


def same_output(a: Tensor, b: Tensor) -> bool:
    """Whether two results of a probe are those of one formula."""
    # A block that casts to fp32 inside is off by 1e-7 of its token's largest; GELU and its tanh
    # form differ by 1e-4 of it.
    if a.shape != b.shape:
        return False
    allowed = 1e-6 * (1 + b.abs().amax(dim=-1, keepdim=True))
    return bool(((a - b).abs() <= allowed).all())
