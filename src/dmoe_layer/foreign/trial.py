"""Finds the activation and the dropout of a block by a trial, or says why the block is no MLP.

The output of a ``Probe`` is compared with w2·act(w1·x + b1) + b2 for every known activation. For a
gated one, either half may be the gate. So an activation that is a plain function is found too. A
residual, a norm, a scale or a hook would change the output, and is not overlooked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from .linears import apply_linear, is_1x1_convolution, shown_linears
from .probe import Probe, same_output


class Layers(NamedTuple):
    """The linear layers of a block, by name.

    Attributes:
        first: The layers that get the block's input: one, or the two of a gated MLP.
        last: The layer behind the activation.
        dim: The width D.
        hidden_dim: The width H.
        gated: Whether the first layers give 2·H together.
    """

    first: tuple[str, ...]
    last: str
    dim: int
    hidden_dim: int
    gated: bool

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.first, self.last)


class Reading(NamedTuple):
    """The result of a trial.

    Attributes:
        names: The names of the linear layers, the last one last.
        activation: The name of the activation, or "" if it is not a known one.
        gate_last: Whether the gate of a gated MLP is the second half of the first layers' output.
        dropout: The rate of the dropout at the end, if it was read.
    """

    names: tuple[str, ...]
    activation: str
    gate_last: bool
    dropout: float


@torch.inference_mode(False)  # The trial is the same if the user swaps in it.
def try_block(mlp: nn.Module, layers: Layers, *, upcycle: bool, with_rate: bool) -> Reading:
    """Finds out what a block computes.

    Args:
        mlp: The block.
        layers: Its linear layers.
        upcycle: Whether it must have one of the known activations.
        with_rate: Whether to read the rate of its dropout.

    Raises:
        ValueError: It is no two-layer MLP, or it could not be run. The error says why.
    """
    kind, probe = type(mlp).__name__, Probe(mlp, layers.names)
    output = _run(probe)
    # If three layers have the same width, only the run shows which one is the last.
    ran = [*probe.inputs]
    if layers.dim == layers.hidden_dim and {*ran} == {*probe.names}:
        probe.names, probe.linears = (*ran,), [probe.linears[probe.names.index(n)] for n in ran]
    activation, gate_last = _activation_of(probe, layers, output)
    if not activation and (fault := _fault_of(probe, layers, output, upcycle)):
        what = "it as a two-layer MLP"
        if layers.gated:
            what = f"its linear layers ({shown_linears(mlp)}) as a gated MLP (GLU)"
        given = f" In the trial it got {probe.shown_made_up()}." if probe.made_up else ""
        raise ValueError(f"{kind}: could not read {what}: {fault}.{given}")
    rate = _dropout_of(kind, probe, output) if with_rate else 0.0
    return Reading(probe.names, activation, gate_last, rate)


def _run(probe: Probe) -> Tensor:
    """Runs the block on the first layout of tokens that it accepts."""
    forms = [lambda x: x, lambda x: x.unflatten(1, (4, 4)), lambda x: x.unflatten(1, (4, 2, 2))]
    if is_1x1_convolution(probe.linears[0]):
        n_axes = len(probe.linears[0].kernel_size)
        channels_last = forms[n_axes - 1]
        forms = [lambda x: channels_last(x).movedim(-1, 1).contiguous()]
    errors = []
    for probe.form in forms:
        try:
            return probe.run(training=False)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _activation_of(probe: Probe, layers: Layers, output: Tensor) -> tuple[str, bool]:
    """The activation for which the formula gives the output, and whether the gate comes last."""
    x = probe.form(probe.x)
    if output.shape != x.shape:
        return "", False
    *first, last = probe.linears
    with torch.no_grad():
        z_NH = torch.cat([apply_linear(linear, probe.rows(x)) for linear in first], dim=1)
        for gate_last in (False, True) if layers.gated else (False,):
            z_NH = z_NH.roll(layers.hidden_dim, 1) if gate_last else z_NH
            for name, activation in ACTIVATIONS.items():
                if activation.gated is layers.gated:
                    y_ND = apply_linear(last, activation.forward(z_NH))
                    if same_output(probe.rows(output), y_ND):
                        return name, gate_last
    return "", False


def _fault_of(probe: Probe, layers: Layers, output: Tensor, upcycle: bool) -> str | None:
    """Says why a block is no MLP: the first reason in the order in which data pass through it.

    An unknown activation, or a norm beside it, is only a fault for upcycling, since new experts
    have an activation of their own.
    """
    x, rows = probe.form(probe.x), probe.rows
    if output.shape != x.shape:
        return f"its output for {tuple(x.shape)} has the shape {tuple(output.shape)}"
    *first, last = probe.names
    from_to = f"{' and '.join(map(repr, first))} and {last!r}"
    before, *inside, after = probe.others if len(probe.others) > 2 else [[], *probe.others, []]
    between = _modules_there([name for names in inside for name in names])
    if probe.ran_in_order():
        for name in first:
            if not same_output(rows(probe.inputs[name]), rows(x)):
                return f"{name!r} does not get the block's input{_modules_there(before)}"
        mixes = f"what lies between {from_to} mixes hidden units or tokens{between}"
        if probe.mixes_tokens():
            return mixes
        if upcycle and probe.mixes_units():
            return f"{mixes}. Only new experts can replace it, without upcycle=True"
        if not same_output(rows(output), rows(probe.outputs[last])):
            what = f"its output is not that of {last!r}{_modules_there(after)}"
            return f"{what}. It may contain a residual, a norm, a scale or a hook"
        if upcycle:
            for name, linear in zip(probe.names, probe.linears, strict=True):
                expected = apply_linear(linear, rows(probe.inputs[name]))
                if not same_output(rows(probe.outputs[name]), expected):
                    return f"{name!r} does not compute what its weight and bias say (a hook? LoRA?)"
    elif not upcycle and (fault := _fault_of_functional(probe, output)):
        return fault
    if not upcycle:
        return None
    known = ", ".join(
        n for n, activation in ACTIVATIONS.items() if activation.gated is layers.gated
    )
    only = "Only new experts can replace it, without upcycle=True"
    return f"the activation between its linear layers is none of {known}{between}. {only}"


def _fault_of_functional(probe: Probe, output: Tensor) -> str | None:
    """The reason for a block with an unknown activation, whose linear layers do not run in turn."""
    if probe.others_change(lambda output: output):
        return "it mixes tokens"
    with torch.no_grad():
        for parameter in probe.linears[-1].parameters():
            parameter.zero_()
    if probe.run(training=False).any():
        return f"with {probe.names[-1]!r} at zero its output is not zero. It may contain a residual"
    return None


def _modules_there(names: list[str]) -> str:
    return f" (modules there: {', '.join(names)})" if names else ""


def _dropout_of(kind: str, probe: Probe, output: Tensor) -> float:
    """Reads the rate of the dropout behind the last linear layer from its effect."""
    name = probe.names[-1]
    after = probe.run(training=True)
    before = probe.outputs.get(name, output)  # what was dropped before does not count
    before = (before if before.numel() == output.numel() else output).reshape(after.shape)
    kept = after != 0
    share_kept = (before[kept] / after[kept]).detach()
    if not kept.any():
        return 1.0
    rate = round(1 - float(share_kept.mean()), 6)
    uneven = not same_output(share_kept, share_kept.mean().expand_as(share_kept))
    # Stochastic depth, which drops whole samples, may drop any number of them.
    kept_by_sample = kept.flatten(1)
    a_sample_lost = not kept_by_sample.any(dim=1).all()
    none_lost = bool(kept.all()) and rate * kept.numel() > 30  # of dropout, once in e³⁰ times
    # Dropout of whole channels keeps or drops a channel in all tokens of a sample.
    kept_BTD = probe.rows(kept).view(len(probe.x), -1, probe.x.shape[2])
    by_channel = rate > 0 and bool((kept_BTD.all(dim=1) | ~kept_BTD.any(dim=1)).all())
    if uneven or a_sample_lost or none_lost or by_channel:
        raise ValueError(
            f"{kind}: could not read its dropout: in training, what follows {name!r} does more "
            "than to drop some values and scale the others. Pass dropout= with the rate to use."
        )
    return rate
