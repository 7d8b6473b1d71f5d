"""Reads a foreign two-layer MLP: its linears, activation and dropout; or says what it could not."""

from __future__ import annotations

import copy
import inspect
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


class LinearPair(NamedTuple):
    """The two linear layers of an MLP, weights as (out, in)."""

    w1_HD: Tensor
    b1_H: Tensor | None
    w2_DH: Tensor
    b2_D: Tensor | None

    @property
    def dim(self) -> int:
        return self.w1_HD.shape[1]

    @property
    def hidden_dim(self) -> int:
        return self.w1_HD.shape[0]


class Frame(NamedTuple):
    """What new experts take over from the block whose place they take."""

    dim: int
    hidden_dim: int
    device: torch.device
    dtype: torch.dtype


def find_linears(mlp: nn.Module) -> tuple[str, str]:
    """The names of the two linear layers of a block D -> H -> D; looks only, runs nothing.

    Raises:
        ValueError: saying what keeps the block from being one.
    """
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"mlp: got {type(mlp).__name__}, expected a torch.nn.Module.")
    kind = type(mlp).__name__
    found = {name: m for name, m in mlp.named_modules() if _is_linear(m)}
    for name, linear in found.items():
        _check_weight(f"{kind}: could not read {name or 'it'!r}", linear)
    widths = [_widths(linear) for linear in found.values()]
    texts = [f"{n or 'itself'!r} {d} -> {h}" for n, (d, h) in zip(found, widths, strict=True)]
    listed = ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")
    if len(found) != 2:
        inside = "inside: " + ", ".join(sorted({type(m).__name__ for m in mlp.children()}))
        gated = len(found) == 3 and any(widths.count(w) == 2 and w[::-1] in widths for w in widths)
        hint = (
            " Two of the same widths are the mark of a gated MLP (GLU)."
            if gated
            else f" Match the module that holds the MLP and nothing else. {ADVICE}"
        )
        raise ValueError(
            f"{kind}: expected a two-layer MLP, found {len(found)} linear layers "
            f"({listed or inside}).{hint}"
        )
    if widths[0] != widths[1][::-1]:
        gated = widths[0][1] == 2 * widths[1][0]
        raise ValueError(
            f"{kind}: expected linear layers D -> H and H -> D, found {listed}."
            f"{' The double width is the mark of a gated MLP (GLU).' if gated else ''}"
        )
    _check_call(mlp)
    first, second = found
    return first, second


def read_frame(mlp: nn.Module) -> Frame:
    """The widths, device and dtype of a two-layer MLP, whatever its activation.

    Raises:
        ValueError: saying what of the block belongs to no two-layer MLP.
    """
    if part := _Run(mlp).foreign_part():
        raise ValueError(f"{type(mlp).__name__}: expected a two-layer MLP, but {part}.")
    linear = mlp.get_submodule(find_linears(mlp)[0])
    parameter = next(linear.parameters())
    return Frame(*_widths(linear), parameter.device, parameter.dtype)


def read_linears(mlp: nn.Module) -> LinearPair:
    """The weights of the two linear layers of a block D -> H -> D.

    Raises:
        ValueError: saying which part could not be read.
    """
    names = find_linears(mlp)
    linears = [mlp.get_submodule(name) for name in names]
    for name, linear in zip(names, linears, strict=True):
        for computed in {"weight", "bias"} - linear._parameters.keys():
            raise ValueError(
                f"{type(mlp).__name__}: could not read '{name}.{computed}': it is no parameter but "
                "computed from others (weight_norm, pruning, LoRA). Make it one first, for "
                "instance with torch.nn.utils.parametrize.remove_parametrizations."
            )
    (w1_HD, b1_H), (w2_DH, b2_D) = map(_weight_and_bias, linears)
    homes = [f"{w.dtype} on {w.device}" for w in (w1_HD, w2_DH)]
    if homes[0] != homes[1]:
        raise ValueError(
            f"{type(mlp).__name__}: expected one dtype and device, but {names[0]!r} is {homes[0]} "
            f"and {names[1]!r} is {homes[1]}."
        )
    return LinearPair(w1_HD, b1_H, w2_DH, b2_D)


def read_activation(mlp: nn.Module) -> str:
    """The name of the activation, found by running the block.

    Its output is held against w2·act(w1·x + b1) + b2 for every activation this package knows.
    What the block computes decides, not what it is called: a functional activation is found, and
    a residual, a norm, a scale or a hook inside the block is not overlooked.

    Raises:
        ValueError: saying which part is not that of such an MLP, or why it could not be run.
    """
    run = _Run(mlp)
    for name, activation in ACTIVATIONS.items():
        if _same(run.y, run.second(activation.forward(run.first(run.x)))):
            return name
    part = run.foreign_part() or run.foreign_linear() or run.foreign_activation()
    raise ValueError(f"{type(mlp).__name__}: could not read its activation: {part}.")


def read_dropout(mlp: nn.Module) -> float:
    """The rate of the dropout behind the second linear layer, where an expert has its own.

    Read from what the block does in training, so that a functional dropout counts too.
    """
    run = _Run(mlp, training=True)
    called = run.names[1] in run.outputs
    before = (run.outputs[run.names[1]] if called else _Run(mlp).y).detach()
    after = run.y.detach()
    kept = after != 0
    share_kept = before[kept] / after[kept]
    if not _same(share_kept, share_kept.mean().expand_as(share_kept)):
        raise ValueError(
            f"{type(mlp).__name__}: could not read its dropout: in training, what follows "
            f"{run.names[1]!r} does more than to drop some values and scale the others."
        )
    return round(1 - float(share_kept.mean()), 6) if kept.any() else 1.0


class _Run:
    """What went through a stand-in of a block: its code, on random weights in double precision.

    Random weights, because real ones that are zero, as some are before training, would hide what
    is done with them. A copy on the CPU, so that nothing of the block changes, not even its
    random state, and a block on "meta" can be read too.
    """

    def __init__(self, mlp: nn.Module, *, training: bool = False) -> None:
        self.kind, self.names = type(mlp).__name__, find_linears(mlp)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.generator = torch.Generator("cpu").manual_seed(0)
        try:
            twin = copy.deepcopy(mlp, self._stand_ins(mlp))
            twin.to("cpu", torch.float64).train(training)
        except Exception as error:
            raise ValueError(f"{self.kind}: could not copy it to read it: {error}") from error
        self.linears = [twin.get_submodule(name) for name in self.names]
        for name, module in twin.named_modules():
            inside_a_linear = name.startswith(tuple(f"{n}." for n in self.names))
            if name in self.names or not (inside_a_linear or any(module.children())):
                module.register_forward_hook(self._watch(name), with_kwargs=True)
        dim, tokens = _widths(self.linears[0])[0], 16
        # From small to large, to meet an activation around 0 and where it saturates or is cut.
        size_T1 = torch.logspace(-3, 2, tokens, dtype=torch.float64, device="cpu")[:, None]
        self.x = self._random(2, tokens, dim) * size_T1
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                self.y = twin(self.x.clone())
        except Exception as error:
            raise ValueError(
                f"{self.kind}: calling it with one tensor of shape (batch, tokens, {dim}) "
                f"failed: {error}"
            ) from error
        if not isinstance(self.y, Tensor):
            raise ValueError(
                f"{self.kind}: expected a block that returns one tensor, but it returned "
                f"{type(self.y).__name__}."
            )

    def first(self, x: Tensor) -> Tensor:
        return F.linear(x, *_weight_and_bias(self.linears[0]))

    def second(self, h: Tensor) -> Tensor:
        return F.linear(h, *_weight_and_bias(self.linears[1]))

    def foreign_part(self) -> str | None:
        """What stands before, between or behind the linear layers that no MLP has there."""
        first, second = self.names
        if self.calls.count(first) != 1 or self.calls.count(second) != 1:
            return None  # It uses their weights in a way of its own.
        if not _same(self.inputs[first], self.x):
            return f"{first!r} is not given the block's input{self._called(None, first)}"
        if not self._is_pointwise():
            return (
                f"what stands between {first!r} and {second!r} mixes hidden units or tokens"
                f"{self._called(first, second)}"
            )
        if not _same(self.y, self.outputs[second]):
            return (
                f"its output is not that of {second!r}{self._called(second, None)}: it may hold "
                "a residual, a norm, a scale or a hook"
            )
        return None

    def foreign_linear(self) -> str | None:
        """A linear layer that computes something else than its weight and bias say."""
        for name, layer in zip(self.names, (self.first, self.second), strict=True):
            if name in self.inputs and not _same(self.outputs[name], layer(self.inputs[name])):
                return f"{name!r} does not compute what its weight and bias say (a hook? LoRA?)"
        return None

    def foreign_activation(self) -> str:
        known = ", ".join(ACTIVATIONS)
        return f"between its linear layers stands none of {known}{self._called(*self.names)}"

    def _is_pointwise(self) -> bool:
        """Whether an input of the second layer depends on one output of the first layer only."""
        z_BTH, h_BTH = self.outputs[self.names[0]], self.inputs[self.names[1]]
        if z_BTH.shape != h_BTH.shape:
            return False
        # The largest of a token with neighbours: hardly one where the activation is flat.
        token = z_BTH.shape[1] // 2
        place = (1, token, int(h_BTH[1, token].argmax()))
        if not h_BTH.requires_grad:
            return True
        (slope_BTH,) = torch.autograd.grad(h_BTH[place], z_BTH, allow_unused=True)
        if slope_BTH is None:
            return True
        slope_BTH[place] = 0
        return not slope_BTH.any()

    def _called(self, after: str | None, before: str | None) -> str:
        """The modules that ran between two linear layers, as the end of a sentence."""
        start = self.calls.index(after) + 1 if after in self.calls else 0
        stop = self.calls.index(before) if before in self.calls else len(self.calls)
        calls = self.calls[start:stop]
        return f" (modules there: {', '.join(calls)})" if calls else ""

    def _stand_ins(self, mlp: nn.Module) -> dict[int, Any]:
        """A memo for deepcopy, which takes what it holds for what it has copied already."""
        memo: dict[int, Any] = {
            id(p): nn.Parameter(self._random(*p.shape))
            for p in mlp.parameters()
            if p.is_floating_point()
        }
        for module in mlp.modules():
            # Kept from a forward pass, or put there by weight_norm; deepcopy refuses them.
            kept = [t for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf]
            memo.update({id(t): t.detach() for t in kept})
        return memo

    def _watch(self, name: str) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            if name not in self.names:
                if not isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
                    self.calls.append(f"{name!r} {type(module).__name__}")
                return None
            self.calls.append(name)
            self.inputs[name] = next(iter((*args, *kwargs.values()))).clone()
            self.outputs[name] = output
            return output.clone()  # An activation may work in place.

        return hook

    def _random(self, *shape: int) -> Tensor:
        """Uniform in -1 .. 1, which costs an eighth of a normal distribution."""
        values = torch.empty(shape, dtype=torch.float64, device="cpu")
        return values.uniform_(-1, 1, generator=self.generator)


def _same(a: Tensor, b: Tensor) -> bool:
    # A block that casts to fp32 inside is off by 1e-7; GELU and its tanh form differ by 5e-4.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def _is_linear(module: nn.Module) -> bool:
    # Hugging Face's GPT-2 family keeps its linear layers as Conv1D, transposed.
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _check_weight(label: str, linear: nn.Module) -> None:
    weight = linear._parameters.get("weight")
    if weight is None:
        return
    if is_lazy(weight):
        raise ValueError(f"{label}: it has no shape yet. Run the model once first.")
    n_in, n_out = _widths(linear)
    shape = (n_out, n_in) if isinstance(linear, nn.Linear) else (n_in, n_out)
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(
            f"{label}: its weight is {weight.dtype} of shape {tuple(weight.shape)}, expected "
            f"floating point of shape {shape}. Is it quantized or sharded?"
        )


def _check_call(mlp: nn.Module) -> None:
    signature = inspect.signature(mlp.forward)
    try:
        signature.bind("x")
    except TypeError as error:
        raise ValueError(
            f"{type(mlp).__name__}: expected a block that is called with one tensor, as a DMoE "
            f"is, but its forward takes {signature}."
        ) from error


def _widths(linear: Any) -> tuple[int, int]:
    """(in, out), without a look at a weight that is computed when looked at."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    n_in, n_out = linear.weight.shape
    return n_in, n_out


def _weight_and_bias(linear: Any) -> tuple[Tensor, Tensor | None]:
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.mT
    return weight, linear.bias
