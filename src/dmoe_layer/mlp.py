"""Reads a foreign two-layer MLP: its linears, activation and dropout; or says what it could not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .activations import ACTIVATIONS

ADVICE = (
    "Where an MLP is no module of its own, as in torch.nn.TransformerEncoderLayer and BERT, move "
    "it into one first."
)


class Mlp(NamedTuple):
    """A two-layer MLP, weights as (out, in). All that follows dtype is for upcycling only."""

    dim: int
    hidden_dim: int
    device: torch.device
    dtype: torch.dtype
    w1_HD: Tensor | None = None
    b1_H: Tensor | None = None
    w2_DH: Tensor | None = None
    b2_D: Tensor | None = None
    activation: str = ""
    dropout: float = 0.0


def find_linears(mlp: nn.Module) -> tuple[str, str]:
    """The names of the two linear layers of a block D -> H -> D; looks only, runs nothing.

    Raises:
        ValueError: saying what keeps the block from being one.
    """
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: got {type(mlp).__name__}, expected a torch.nn.Module.")
    kind = type(mlp).__name__
    found = {name: module for name, module in mlp.named_modules() if _is_linear(module)}
    for name, linear in found.items():
        label, weight = f"{kind}: could not read {name or 'it'!r}", linear._parameters.get("weight")
        if is_lazy(weight):
            raise ValueError(f"{label}: it has no shape yet. Run the model once first.")
        shape = _widths(linear)[:: -1 if isinstance(linear, nn.Linear) else 1]
        if weight is not None and not (weight.shape == shape and weight.is_floating_point()):
            raise ValueError(
                f"{label}: its weight is {weight.dtype} of shape {tuple(weight.shape)}, expected "
                f"floating point of shape {shape}. Is it quantized or sharded?"
            )
    widths = [_widths(linear) for linear in found.values()]
    if len(found) == 2 and widths[0] == widths[1][::-1]:
        first, second = found
        return first, second
    texts = [f"{n or 'itself'!r} {d} -> {h}" for n, (d, h) in zip(found, widths, strict=True)]
    inside = texts or ["inside:", *sorted({type(m).__name__ for m in mlp.children()})]
    gated = (len(found) == 2 and widths[0][1] == 2 * widths[1][0]) or (
        len(found) == 3 and any(widths.count(w) == 2 and w[::-1] in widths for w in widths)
    )
    hint = f"Match the module that holds the MLP and nothing else. {ADVICE}"
    raise ValueError(
        f"{kind}: expected a two-layer MLP D -> H -> D, found {len(found)} linear layers "
        f"({', '.join(inside[:6])}{', ...' if len(inside) > 6 else ''}). "
        f"{'Such widths are the mark of a gated MLP (GLU).' if gated else hint}"
    )


def read_mlp(mlp: nn.Module, *, upcycle: bool, dropout: float | None = None) -> Mlp:
    """The widths, device and dtype of a two-layer MLP; to ``upcycle`` it, all that it computes.

    Its output is held against w2·act(w1·x + b1) + b2 for each known activation. So a functional
    activation is found, and a residual, a norm, a scale or a hook is not overlooked. ``dropout``
    replaces the block's, which then is not read.

    Raises:
        ValueError: saying which part is not that of such an MLP, or why it could not be run.
    """
    kind, names = type(mlp).__name__, find_linears(mlp)
    linears: list[Any] = [mlp.get_submodule(name) for name in names]
    for name, linear in zip(names, linears, strict=True) if upcycle else ():
        for computed in sorted({"weight", "bias"} - linear._parameters.keys()):
            raise ValueError(
                f"{kind}: could not read '{name}.{computed}': it is no parameter but computed "
                "from others (weight_norm, pruning, LoRA). Make it one first, for instance with "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
    w1, w2 = [next(linear.parameters()) for linear in linears]
    if upcycle and (w1.dtype, w1.device) != (w2.dtype, w2.device):
        raise ValueError(
            f"{kind}: could not read it as one MLP: {names[0]!r} is {w1.dtype} on {w1.device}, "
            f"{names[1]!r} is {w2.dtype} on {w2.device}."
        )
    twin = _Twin(mlp, names)
    y = twin.run(training=False)
    z = _linear(twin.linears[0], twin.x)
    outputs = {n: _linear(twin.linears[1], act.forward(z)) for n, act in ACTIVATIONS.items()}
    activation = next((name for name, output in outputs.items() if _same(y, output)), None)
    for wrong, part in twin.checks(y, upcycle) if activation is None else ():
        if wrong:
            raise ValueError(f"{kind}: could not read it as a two-layer MLP: {part}.")
    frame = (*_widths(linears[0]), w1.device, w1.dtype)
    if not upcycle or activation is None:
        return Mlp(*frame)
    if dropout is None:
        after = twin.run(training=True)
        before = twin.outputs.get(names[1], y)  # what was dropped before does not count
        before = (before if before.numel() == y.numel() else y).reshape(after.shape)
        kept = after != 0
        share_kept = (before[kept] / after[kept]).detach()
        uneven = not _same(share_kept, share_kept.mean().expand_as(share_kept))
        some_sample_lost = bool(kept.any()) and not kept.flatten(1).any(dim=1).all()  # DropPath
        if uneven or some_sample_lost:
            raise ValueError(
                f"{kind}: could not read its dropout: in training, what follows {names[1]!r} does "
                "more than to drop some values and scale the others. Give a rate to use instead."
            )
        dropout = round(1 - float(share_kept.mean()), 6) if kept.any() else 1.0
    (w1_HD, b1_H), (w2_DH, b2_D) = ((_weight(linear), linear.bias) for linear in linears)
    return Mlp(*frame, w1_HD, b1_H, w2_DH, b2_D, activation, dropout)


class _Twin:
    """A stand-in of a block, and what goes through it: its code, on random weights in fp64.

    Random weights, because real ones that are zero, as some are before training, would hide what
    is done with them. A copy on the CPU, so that nothing of the block changes, not even its
    random state, and a block on "meta" can be read too.
    """

    def __init__(self, mlp: nn.Module, names: tuple[str, str]) -> None:
        self.kind, self.names = type(mlp).__name__, names
        generator = torch.Generator("cpu").manual_seed(0)

        def random(*shape: int) -> Tensor:  # uniform, an eighth of the cost of normal
            values = torch.empty(shape, dtype=torch.float64, device="cpu")
            return values.uniform_(-1, 1, generator=generator)

        # What its memo holds, deepcopy takes for copied. It refuses tensors with a history, that
        # were kept from a forward pass or put there by weight_norm.
        kept = [t for m in mlp.modules() for t in vars(m).values() if isinstance(t, Tensor)]
        memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept}
        try:
            weights = [p for p in mlp.parameters() if p.is_floating_point()]
            memo.update({id(p): nn.Parameter(random(*p.shape)) for p in weights})
            self.module = copy.deepcopy(mlp, memo).to("cpu", torch.float64)
        except Exception as error:
            raise ValueError(f"{self.kind}: could not copy it to read it: {error}") from error
        self.linears = [self.module.get_submodule(name) for name in names]
        for name, module in self.module.named_modules():
            if name in names or not any(module.children()):
                see = functools.partial(self._see, name)
                module.register_forward_hook(see, with_kwargs=True)
        # From small to large, to meet an activation around 0 and where it saturates or is cut.
        size_T1 = torch.logspace(-3, 2, 16, dtype=torch.float64, device="cpu")[:, None]
        self.x = random(8, 16, _widths(self.linears[0])[0]) * size_T1

    def run(self, *, training: bool) -> Tensor:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.others: list[list[str]] = [[]]  # the other modules that ran before each linear layer
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                torch.default_generator.manual_seed(0)
                y = self.module.train(training)(self.x.clone())
            if not isinstance(y, Tensor):
                raise TypeError(f"it returned {type(y).__name__}, expected one tensor")
        except Exception as error:
            given = f"one tensor of shape (batch, tokens, {self.x.shape[-1]})"
            raise ValueError(f"{self.kind}: could not run it on {given}: {error}") from error
        return y

    def _see(self, name: str, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if name in self.names:
            self.inputs[name] = next(iter((*args, *kwargs.values()))).clone()
            self.outputs[name] = output
            self.others.append([])
            return output.clone()  # An activation may work in place.
        if not isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
            self.others[-1].append(f"{name!r} {type(module).__name__}")
        return None

    def checks(self, y: Tensor, upcycle: bool) -> Iterator[tuple[bool, str]]:
        """(whether something is wrong, what it is), in an order in which the first one counts."""
        there = [f" (modules there: {', '.join(o)})" if o else "" for o in self.others]
        first, second = self.names
        if (*self.inputs,) == self.names and len(there) == 3:
            wrong = not _same(self.inputs[first], self.x)
            yield wrong, f"{first!r} is not given the block's input{there[0]}"
            what = f"what stands between {first!r} and {second!r} mixes hidden units or tokens"
            yield not self._is_pointwise(), what + there[1]
            what = f"its output is not that of {second!r}{there[2]}: it may hold a residual, a "
            yield not _same(y, self.outputs[second]), f"{what}norm, a scale or a hook"
            for name, linear in zip(self.names, self.linears, strict=True):
                wrong = not _same(self.outputs[name], _linear(linear, self.inputs[name]))
                what = f"{name!r} does not compute what its weight and bias say (a hook? LoRA?)"
                yield wrong and upcycle, what
        what = f"between its linear layers stands none of {', '.join(ACTIVATIONS)}"
        yield upcycle, what + there[:2][-1]

    def _is_pointwise(self) -> bool:
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


def _same(a: Tensor, b: Tensor) -> bool:
    # A block that casts to fp32 inside is off by 1e-7; GELU and its tanh form differ by 5e-4.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def _is_linear(module: nn.Module) -> bool:
    # Hugging Face's GPT-2 family keeps its linear layers as Conv1D, transposed.
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return is_conv1d or isinstance(module, nn.Linear)


def _widths(linear: Any) -> tuple[int, int]:
    """(in, out), without a look at a weight that is computed when looked at."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    n_in, n_out = linear.weight.shape
    return n_in, n_out


def _weight(linear: Any) -> Tensor:
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.mT


def _linear(linear: Any, x: Tensor) -> Tensor:
    return F.linear(x, _weight(linear), linear.bias)
