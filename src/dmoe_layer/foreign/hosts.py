"""Finds, tries and replaces MLPs whose linear layers are parts of a larger module, the host.

The new layer replaces the first linear layer. The activation and the second linear layer become
``nn.Identity``. All else of the host stays: its dropouts, norms and residuals act on the output of
the new layer as they did on that of the second linear layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS
from .linears import apply_linear, is_linear, widths_of
from .probe import Probe, same_output


class HostMlp(NamedTuple):
    """The names of an MLP's three parts inside its host."""

    first: str
    activation: str
    second: str

    def __str__(self) -> str:
        return ", ".join(map(repr, self))


_KNOWN = (
    HostMlp("linear1", "activation", "linear2"),  # torch.nn.TransformerEncoderLayer
    HostMlp("fc1", "activation_fn", "fc2"),  # Hugging Face's OPT, Whisper, BART
    HostMlp("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"),  # BERT
    HostMlp("pwconv1", "act", "pwconv2"),  # Hugging Face's ConvNeXt
)

# Arguments that a host may need besides its 16 tokens. For all others that it needs it gets None.
_FURTHER: dict[str, Callable[[Tensor], Any]] = {
    "memory": lambda x: x,
    "encoder_hidden_states": lambda x: x,
    "input_dimensions": lambda x: (4, 4),
    "height": lambda x: 4,
    "width": lambda x: 4,
}

# The layouts in which a host may take (batch, 16 tokens, D).
_FORMS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x_BTD: x_BTD,
    lambda x_BTD: x_BTD.mT.unflatten(2, (4, 4)),  # (B, D, H, W)
    lambda x_BTD: x_BTD.unflatten(1, (4, 4)),  # (B, H, W, D)
    lambda x_BTD: x_BTD.mT.unflatten(2, (4, 2, 2)),  # (B, D, D, H, W)
)


def find_host_mlps(host: nn.Module) -> list[HostMlp]:
    """Finds the MLPs of a host: by known names, or part after part in an ``nn.Sequential``."""
    parts = [known for known in _KNOWN if _is_mlp(*(_at(host, name) for name in known))]
    for name, module in host.named_modules():
        if isinstance(module, nn.Sequential):
            prefix = f"{name}." if name else ""
            parts += [HostMlp(*(prefix + part for part in mlp)) for mlp in _in_sequential(module)]
    return parts


def try_host_mlp(host: nn.Module, mlp: HostMlp) -> int:
    """Returns the axis of the samples in the input of the first linear layer, or raises.

    A copy of the host runs with random weights on random tokens. The output of the second linear
    layer must follow from the input of the first one by the formula of an MLP. If that formula
    replaces the MLP, the output of the host must be the same.

    Raises:
        ValueError: The MLP cannot be replaced. The error says why.
    """
    # The trial needs gradients, also if the user swaps under no_grad or inference_mode.
    with torch.inference_mode(False), torch.enable_grad():
        return _try(host, mlp)


def as_block(host: nn.Module, mlp: HostMlp) -> nn.Module:
    """The MLP of a host as one module, which shares its parts with the host."""
    first, activation, second = (_at(host, name) for name in mlp)
    block = nn.Sequential(
        first, activation if isinstance(activation, nn.Module) else _Called(activation), second
    )
    block.training = first.training  # not by train(), which would switch the host's parts
    return block


def replace_host_mlp(host: nn.Module, mlp: HostMlp, layer: nn.Module) -> None:
    """Replaces the MLP of a host by a layer."""
    for name, module in zip(mlp, (layer, nn.Identity(), nn.Identity()), strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(host.get_submodule(parent), leaf, module)
    # In eval mode PyTorch's own layer passes the weights of its linear layers to a fused operator,
    # if its activation is one of these two.
    if isinstance(host, nn.TransformerEncoderLayer):
        host.activation_relu_or_gelu = 0


def leave_nested_tensors(model: nn.Module, hosts: set[nn.Module]) -> None:
    """Stops PyTorch's encoders from packing padded batches, if their layers have been changed."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and not hosts.isdisjoint(module.layers):
            module.use_nested_tensor = False


def _try(host: nn.Module, mlp: HostMlp) -> int:
    kind = type(host).__name__
    try:
        probe = _HostProbe(host, mlp)
    except ValueError as failed:
        raise ValueError(
            f"{kind}: could not copy it to try its MLP ({mlp}): {failed.__cause__}"
        ) from failed
    output, error = None, None
    for probe.called.form in _FORMS:
        try:
            output, error = probe.run(training=False), None
            break
        except ValueError as failed:
            error = error or failed.__cause__
    if output is None:
        raise ValueError(
            f"{kind}: could not try its MLP ({mlp}). It does not run on one tensor of shape "
            f"(batch, tokens, {probe.x.shape[-1]}), or on maps: {error}. Move the MLP into a "
            "module of its own and match that."
        )
    fault = None
    if not probe.ran_in_order():
        fault = f"{mlp.first!r} and {mlp.second!r} do not run once each, one after the other"
    elif (activation := probe.activation()) is None:
        modules = ", ".join(probe.others[1]).replace("'host.", "'")
        between = f" (modules there: {modules})" if modules else ""
        fault = f"the activation between {mlp.first!r} and {mlp.second!r} is none of "
        fault += ", ".join(n for n, a in ACTIVATIONS.items() if not a.gated) + between
        if "convolution" in between:
            fault += ". A convolution mixes tokens"
    else:
        axis = probe.batch_axis()
        try:
            same = same_output(probe.run_without_mlp(activation), output)
        except ValueError as failed:
            same, error = False, failed.__cause__
        if not same:
            fault = "with a layer in its place the output of the host is different"
            fault += f": {error}" if error else ", as if it used one of the parts elsewhere too"
    if fault:
        raise ValueError(f"{kind}: could not replace its MLP ({mlp}): {fault}.")
    return axis


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _is_mlp(first: Any, activation: Any, second: Any) -> bool:
    linears = [isinstance(part, nn.Module) and is_linear(part) for part in (first, second)]
    if not all(linears) or not callable(activation) or is_linear(activation):
        return False
    return widths_of(first) == widths_of(second)[::-1]


def _in_sequential(sequential: nn.Sequential) -> list[HostMlp]:
    """Finds linear layer, activation and linear layer, among modules that do something else.

    If there is nothing else, the Sequential is an MLP itself. With a third linear layer, what it
    computes is not known.
    """
    # named_children gives only one name of a module that occurs twice.
    parts = {n: m for n, m in sequential._modules.items() if not _passes_on(m)}
    linears = [m for m in parts.values() if isinstance(m, nn.Module) and is_linear(m)]
    if len(parts) == 3 or len(linears) != 2:
        return []
    names = [*parts]
    mlps = [HostMlp(*names[i : i + 3]) for i in range(len(names) - 2)]
    return [mlp for mlp in mlps if _is_mlp(*(parts[name] for name in mlp))]


def _passes_on(module: Any) -> bool:
    return isinstance(module, (nn.Identity, nn.Dropout))


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _CalledHost(nn.Module):
    """A host that is called with tokens only, and returns one tensor."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.form = _FORMS[0]

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = self.form(x_BTD)
        parameters = [*inspect.signature(self.host.forward).parameters.values()]
        further = {
            each.name: _FURTHER.get(each.name, lambda x: None)(x)
            for each in parameters[1:]
            if each.default is each.empty
            and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        }
        y = self.host(x, **further)
        while not isinstance(y, Tensor):
            y = y[0]
        return y


class _HostProbe(Probe):
    """A probe of a host."""

    called: _CalledHost

    def __init__(self, host: nn.Module, mlp: HostMlp) -> None:
        super().__init__(_CalledHost(host), (f"host.{mlp.first}", f"host.{mlp.second}"))
        self.called, self._mlp = self._module, mlp  # type: ignore[assignment]

    def activation(self) -> str | None:
        """The activation by which the output of the second linear layer follows from the input."""
        first, second = self.linears
        y = self.outputs[self.names[1]]
        z = apply_linear(first, self.inputs[self.names[0]])
        for name, activation in ACTIVATIONS.items():
            if not activation.gated and same_output(y, apply_linear(second, activation.forward(z))):
                return name
        return None

    def batch_axis(self) -> int:
        """The axis of the samples in the input of the first linear layer: 0 or 1.

        Tokens of one sample depend on common tokens of the host. Tokens of two samples do not. If
        this does not distinguish the axes, it is 0, as in most models.
        """
        x_BTD = self.x
        # The numbers must be small: a softmax of large ones is that of the largest alone.
        small = x_BTD / x_BTD.abs().amax(dim=-1, keepdim=True) / 10
        self.x = small.requires_grad_()
        self.run(training=False)
        given, self.x = self.inputs[self.names[0]], x_BTD
        if given.ndim != 3 or not given.requires_grad:
            return 0

        def seen_by(i: int, j: int) -> Tensor:
            (slope_BTD,) = torch.autograd.grad(given[i, j].sum(), small, retain_graph=True)
            return slope_BTD.ne(0).any(dim=-1)

        last = seen_by(-1, -1)
        along_0, along_1 = ((seen_by(*place) & last).any() for place in ((0, -1), (-1, 0)))
        return int(bool(along_0) and not along_1)

    def run_without_mlp(self, activation: str) -> Tensor:
        """Runs the host with the formula of the MLP in the place of the MLP."""
        first, second = self.linears
        act = ACTIVATIONS[activation].forward
        formula = _Called(lambda x: apply_linear(second, act(apply_linear(first, x))))
        replace_host_mlp(self.called.host, self._mlp, formula)
        return self.run(training=False)
