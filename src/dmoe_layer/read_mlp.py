"""Reads a two-layer MLP that somebody else wrote: its weights, activation and dropout.

What a block computes is not read from its code, which may be anything, but tried. A copy of it
gets random weights and runs on a random input, in double precision on the CPU (``probe``). The
output is held against w2·act(w1·x + b1) + b2 for every activation that is known here. So an
activation that is a plain function is found too, and no residual, norm, scale or hook is
overlooked: with any of them the output is another. The block itself is neither run nor changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .activations import ACTIVATIONS
from .probe import Probe, apply_linear, is_linear, same_output, weight_of, widths_of

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
    found = {name: module for name, module in mlp.named_modules() if is_linear(module)}
    for name, linear in found.items():
        _require_plain_weight(f"{kind}: could not read {name or 'it'!r}", linear)
    widths = [widths_of(linear) for linear in found.values()]
    if len(found) == 2 and widths[0] == widths[1][::-1]:
        first, second = found
        return first, second
    raise ValueError(
        f"{kind}: expected a two-layer MLP D -> H -> D, {_found_instead(mlp, found, widths)}"
    )


def read_mlp(mlp: nn.Module, *, upcycle: bool, dropout: float | None = None) -> Mlp:
    """The widths, device and dtype of a two-layer MLP; to ``upcycle`` it, all that it computes.

    Args:
        mlp: the block.
        upcycle: whether its weights and activation are wanted too; then it must have one of the
            activations that are known here.
        dropout: replaces the block's rate, which then is not read.

    Raises:
        ValueError: saying which part is not that of such an MLP, or why it could not be run.
    """
    kind, names = type(mlp).__name__, find_linears(mlp)
    linears: list[Any] = [mlp.get_submodule(name) for name in names]
    first, second = linears
    w1, w2 = next(first.parameters()), next(second.parameters())
    if upcycle:
        for name, linear in zip(names, linears, strict=True):
            _require_parameters(f"{kind}: could not read", name, linear)
        if (w1.dtype, w1.device) != (w2.dtype, w2.device):
            raise ValueError(
                f"{kind}: could not read it as one MLP: {names[0]!r} is {w1.dtype} on "
                f"{w1.device}, {names[1]!r} is {w2.dtype} on {w2.device}."
            )
    probe = Probe(mlp, names)
    output = probe.run(training=False)
    activation = _activation_of(probe, output)
    if activation is None and (fault := _fault_of(probe, output, upcycle)):
        raise ValueError(f"{kind}: could not read it as a two-layer MLP: {fault}.")
    dim, hidden_dim = widths_of(first)
    if not upcycle or activation is None:
        return Mlp(dim, hidden_dim, w1.device, w1.dtype)
    if dropout is None:
        dropout = _dropout_of(kind, probe, output)
    return Mlp(
        dim, hidden_dim, w1.device, w1.dtype,
        weight_of(first), first.bias, weight_of(second), second.bias, activation, dropout,
    )  # fmt: skip


def _require_plain_weight(label: str, linear: nn.Module) -> None:
    """Raises unless a linear layer's own weight has its shape; one that is computed is not read."""
    weight = dict(linear.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return
    if is_lazy(weight):
        raise ValueError(f"{label}: it has no shape yet. Run the model once first.")
    width_in, width_out = widths_of(linear)
    shape = (width_out, width_in) if isinstance(linear, nn.Linear) else (width_in, width_out)
    if weight.shape != shape or not weight.is_floating_point():
        raise ValueError(
            f"{label}: its weight is {weight.dtype} of shape {tuple(weight.shape)}, expected "
            f"floating point of shape {shape}. Is it quantized or sharded?"
        )


def _require_parameters(label: str, name: str, linear: nn.Module) -> None:
    """Raises unless a linear layer's weight and bias are parameters of its own."""
    # Without a look at a computed one: spectral_norm, for one, changes its buffers at each.
    computed = None
    if "weight" not in dict(linear.named_parameters(recurse=False)):
        computed = "weight"
    if "bias" in vars(linear) or parametrize.is_parametrized(linear, "bias"):
        computed = "bias"
    if computed:
        raise ValueError(
            f"{label} '{name}.{computed}': it is no parameter but computed from others "
            "(weight_norm, pruning, LoRA). Make it one first, for instance with "
            "torch.nn.utils.parametrize.remove_parametrizations."
        )


def _found_instead(
    mlp: nn.Module, found: dict[str, nn.Module], widths: list[tuple[int, int]]
) -> str:
    """What a block has in the place of two linear layers that fit, in an error's words."""
    texts = [f"{n or 'itself'!r} {d} -> {h}" for n, (d, h) in zip(found, widths, strict=True)]
    if not texts:
        texts = ["inside:", *sorted({type(m).__name__ for m in mlp.children()})]
    shown = ", ".join(texts[:6]) + (", ..." if len(texts) > 6 else "")
    doubled = len(found) == 2 and widths[0][1] == 2 * widths[1][0]
    paired = len(found) == 3 and any(widths.count(w) == 2 and w[::-1] in widths for w in widths)
    hint = f"Match the module that holds the MLP and nothing else. {ADVICE}"
    if doubled or paired:
        hint = "Such widths are the mark of a gated MLP (GLU)."
    return f"found {len(found)} linear layers ({shown}). {hint}"


def _activation_of(probe: Probe, output: Tensor) -> str | None:
    """The activation with which the formula gives the probe's output."""
    first, second = probe.linears
    z = apply_linear(first, probe.x)
    for name, activation in ACTIVATIONS.items():
        if activation.gated:  # its first layer is another's
            continue
        if same_output(output, apply_linear(second, activation.forward(z))):
            return name
    return None


def _fault_of(probe: Probe, output: Tensor, upcycle: bool) -> str | None:
    """The first thing by which a block is no MLP, in the order in which data pass through it.

    Its activation is a fault only to upcycle it: new experts have one of their own.
    """
    first, second = probe.names
    others = [f" (modules there: {', '.join(o)})" if o else "" for o in probe.others]
    if probe.ran_in_order():
        before, between, after = others
        if not same_output(probe.inputs[first], probe.x):
            return f"{first!r} is not given the block's input{before}"
        if not probe.is_pointwise():
            what = f"what stands between {first!r} and {second!r} mixes hidden units or tokens"
            return what + between
        if not same_output(output, probe.outputs[second]):
            what = f"its output is not that of {second!r}{after}: it may hold a residual, a norm, "
            return f"{what}a scale or a hook"
        if upcycle:
            for name, linear in zip(probe.names, probe.linears, strict=True):
                if not same_output(probe.outputs[name], apply_linear(linear, probe.inputs[name])):
                    return f"{name!r} does not compute what its weight and bias say (a hook? LoRA?)"
    if not upcycle:
        return None
    between = others[1] if len(others) > 1 else others[0]
    return f"between its linear layers stands none of {', '.join(ACTIVATIONS)}{between}"


def _dropout_of(kind: str, probe: Probe, output: Tensor) -> float:
    """The rate of the dropout behind the second linear layer, from what it makes of its output."""
    name = probe.names[1]
    after = probe.run(training=True)
    before = probe.outputs.get(name, output)  # what was dropped before does not count
    before = (before if before.numel() == output.numel() else output).reshape(after.shape)
    kept = after != 0
    share_kept = (before[kept] / after[kept]).detach()
    uneven = not same_output(share_kept, share_kept.mean().expand_as(share_kept))
    some_sample_lost = bool(kept.any()) and not kept.flatten(1).any(dim=1).all()  # DropPath
    if uneven or some_sample_lost:
        raise ValueError(
            f"{kind}: could not read its dropout: in training, what follows {name!r} does more "
            "than to drop some values and scale the others. Give a rate to use instead."
        )
    return round(1 - float(share_kept.mean()), 6) if kept.any() else 1.0
