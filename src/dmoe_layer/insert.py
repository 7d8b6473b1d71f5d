"""insert_after: puts experts behind modules of a model of somebody else, such as a U-Net."""

from __future__ import annotations

import contextlib
import copy
import difflib
import itertools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._torch_private import drop_forward_hooks
from .foreign.matching import as_predicate, outermost
from .layer import DMoE

_CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
# By these a forward of one's own may run all children, and so a new one, one after another.
_CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}
# Of the image that a copy on meta is tried with. It costs nothing there, and leaves more than one
# pixel after six halvings, which instance norms ask for.
_SIDE = 128


class Inserted(NamedTuple):
    """What :func:`insert_after` has done.

    ``names`` are the new layers', such as "encoder.stages.0.moe". ``undo()`` takes them out again
    and leaves the model with the modules, hooks and parameters that it had; a second call does
    nothing. It is about this model, not about copies of it.
    """

    names: list[str]
    undo: Callable[[], None]


class _Trial(NamedTuple):
    output: Tensor
    runs_layer: bool  # as it runs all of its children, so that no hook has to


def insert_after(model: nn.Module, pattern: str | Callable[..., bool], **options: Any) -> Inserted:
    """Puts a residual :class:`DMoE` behind each matching module of ``model``, in place.

    This is the paper's placement, for convolutional networks above all: every pixel or voxel of
    the module's output (B, C, ...) is a token, and the experts' answer is added to it. Modules,
    parameters and hooks keep their names and places; the layer is the matched module's child
    ``moe``. It is run by a forward hook, after those that are there, and handed the keyword
    ``mask=`` if the module is called with one. ``nn.Sequential`` runs it as its last child. The
    model must call the module itself: behind one whose parts it calls one by one no experts run.

    Each layer takes its device, dtype and train/eval state from the module before it, and its
    width from a trial: a copy on "meta" is given an image of as many channels as the module's
    first convolution takes. Where that cannot be done (no convolution, or a second input) the
    layer learns its width at the first call: run the model once before you make an optimizer of
    its parameters or wrap it for distributed training. The new parameters require gradients even
    where the module's are frozen. A module that stands in several places gets one layer. Either
    all matching modules get a layer or, if one cannot, none. Models that torch.compile has compiled
    are compiled once more, since they do not see new hooks.

    Args:
        model: any module.
        pattern: a glob on the names that ``model.named_modules()`` gives, or a predicate
            ``(name, module) -> bool`` or ``(module) -> bool``. ``*`` matches dots too, and a
            match inside a match is left out: "encoder.stages.*" is one layer a stage.
        options: further arguments of :class:`DMoE`, such as ``attribute_sizes``, or
            ``zero_init=True``, with which the model's output is at first what it was.
            ``residual=True`` and ``channel_dim=1`` unless given here.

    Returns:
        The names of the new layers, and a function that takes them out: ``(names, undo)``.

    Raises:
        ValueError: if nothing matches (naming what could have), or if a matching module is of a
            kind that is never called, as ``nn.ModuleList``, returns anything but one tensor, or
            has a ``moe``.
        TypeError: for a model, pattern or option of another kind; and, when the model is run, for
            a module that was not tried here and does not return one tensor.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from dmoe_layer import insert_after, routing
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> names, undo = insert_after(model, "0", n_experts=8, k=2, attribute_sizes=3)
        >>> names
        ['0.moe']
        >>> with routing(torch.tensor([0, 2])):
        ...     model(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2, 2, 14, 14])

    The placement is that of Oh et al., ICML 2025 (arXiv:2502.00619).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n]
    matching = outermost(named, as_predicate(pattern))
    if not matching:
        raise ValueError(f"pattern: {pattern!r} matches no module.{_hint(model, pattern, named)}")
    layers: dict[nn.Module, tuple[DMoE, bool]] = {}
    names = []
    for name, module in matching:
        if module not in layers:
            try:
                _check(module)
                layers[module] = _make_layer(model, module, options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            names.append(f"{name}.moe")
    with contextlib.ExitStack() as stack:  # should one fail, those before it are taken out again
        stack.callback(_forget_compiled)
        for module, (layer, runs_layer) in layers.items():
            stack.callback(_take_out, module, hasattr(module, "moe"))
            module.register_module("moe", layer)
            if not runs_layer:
                hook = module.register_forward_hook(add_experts, with_kwargs=True)
                stack.callback(hook.remove)
        undo = stack.pop_all().close
    _forget_compiled()
    return Inserted(names, undo)


def _take_out(module: nn.Module, place_was_kept: bool) -> None:
    """Takes out the layer, or what has come in its place since."""
    if place_was_kept:
        module.register_module("moe", None)
    else:
        module._modules.pop("moe", None)


def add_experts(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Tensor:
    """The forward hook of a module that experts follow.

    A function that holds nothing: it is copied and pickled with the module, by this name.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"{_returned(module, output)}.")
    y: Tensor = module.moe(output, mask=kwargs.get("mask"))
    return y


def _check(module: nn.Module) -> None:
    """Raises unless experts can follow the module, as far as can be seen without running it."""
    kind = type(module).__name__
    if isinstance(module, DMoE):
        raise ValueError("is a DMoE itself; match the modules that are not.")
    if type(module).forward is nn.Module.forward:
        raise ValueError(
            f"is of the kind {kind}, which holds modules and is never called itself; match those "
            "that it holds."
        )
    free = "moe" not in vars(module) and not hasattr(type(module), "moe")
    if getattr(module, "moe", None) is not None or not free:
        raise ValueError(
            f"has an attribute 'moe' already ({type(module.moe).__name__}), which is the new "
            "layer's name; match modules that have none, or undo the insertion that put it there."
        )


def _make_layer(model: nn.Module, module: nn.Module, options: dict[str, Any]) -> tuple[DMoE, bool]:
    """The layer that follows the module, and whether the module runs it without a hook."""
    trial = _try_on_meta(module)
    width = None
    if trial is None:
        runs_layer = type(module).forward is nn.Sequential.forward
        container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        read = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
        if not runs_layer and (container or not _CHILDREN.isdisjoint(read)):
            raise ValueError(_runs_children(module))
    else:
        runs_layer = trial.runs_layer
        channel_dim = options.get("channel_dim", 1)
        with contextlib.suppress(IndexError, TypeError):  # for DMoE to complain of
            width = trial.output.shape[channel_dim]
    parameters = itertools.chain(module.parameters(), model.parameters())
    like = next((p for p in parameters if p.is_floating_point()), None)
    kept = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = DMoE(width, **{"channel_dim": 1, "residual": True, **kept, **options})
    return layer.train(module.training), runs_layer


def _try_on_meta(module: nn.Module) -> _Trial | None:
    """What a copy of the module gives for an image; None where it cannot be run on one.

    Raises:
        ValueError: it gives no single tensor, or does something behind the place of the layer.
    """
    convolution = next((m for m in module.modules() if isinstance(m, _CONVOLUTIONS)), None)
    if convolution is None:
        return None
    ran: list[Tensor] = []
    try:
        twin = _copy_on_meta(module)
        layer = nn.Identity()
        layer.register_forward_hook(lambda _, args, output: ran.append(output))
        twin.register_module("moe", layer)
        sides = [_SIDE] * len(convolution.kernel_size)
        x = convolution.weight.new_empty((2, convolution.in_channels, *sides), device="meta")
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = twin(x)
    except Exception:  # of whatever kind: the module is another's
        return None
    if not isinstance(output, Tensor):
        raise ValueError(f"{_returned(module, output)}; match a module that does.")
    if ran and output is not ran[0]:
        raise ValueError(_runs_children(module))
    return _Trial(output, bool(ran))


def _copy_on_meta(module: nn.Module) -> nn.Module:
    """A copy in evaluation whose tensors hold no numbers, and without the user's hooks."""
    # What its memo holds, deepcopy takes for copied.
    memo: dict[int, Any] = {}
    for part in module.modules():
        parameters, buffers = part.parameters(recurse=False), part.buffers(recurse=False)
        others = (value for value in vars(part).values() if isinstance(value, Tensor))
        for tensor in itertools.chain(parameters, buffers, others):
            on_meta = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(on_meta, False) if is_parameter else on_meta
    twin = copy.deepcopy(module, memo)
    drop_forward_hooks(twin)
    return twin.eval()


def _forget_compiled() -> None:
    """Has compiled models compiled again: Dynamo does not look whether a module has a new hook."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _returned(module: nn.Module, output: Any) -> str:
    return (
        f"insert_after: {type(module).__name__} returned {type(output).__name__}, and experts can "
        "follow one tensor alone"
    )


def _runs_children(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} runs its children by a forward of its own, and so would run the "
        "experts among them, not behind it; match a module around it, or one that it holds."
    )


def _hint(model: nn.Module, pattern: Any, named: list[tuple[str, nn.Module]]) -> str:
    """What was perhaps meant: names of a similar spelling, of modules that experts can follow."""
    if as_predicate(pattern)("", model):
        return " Only the model itself does; experts can follow the modules that it holds."
    possible = []
    for name, module in named:
        with contextlib.suppress(ValueError):
            _check(module)
            possible.append(name)
    close = difflib.get_close_matches(pattern, possible, 5) if isinstance(pattern, str) else []
    if close:
        return f" Close candidates: {', '.join(close)}."
    return " model.named_modules() gives the names."
