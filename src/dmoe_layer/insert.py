"""insert_after: puts DMoE layers behind modules of an existing model, such as a U-Net."""

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
_OF_TOKENS = (nn.Linear, nn.LayerNorm)  # They act on the last axis, where tokens have channels.
# A forward method that uses one of these may run all children in turn, and so the new one too.
_CHILDREN = {"children", "named_children", "modules", "named_modules", "_modules"}
# The side of the image on which a copy on meta is tried. A large image costs nothing there, and
# after six halvings it still has more than one pixel, as instance norms need.
_SIDE = 128


class Inserted(NamedTuple):
    """The result of [`insert_after`][], a tuple ``(names, undo)``.

    Attributes:
        names: The names of the new layers, such as "encoder.stages.0.moe".
        undo: A function without arguments that removes the layers again. The model then has the
            modules, hooks and parameters that it had before. A second call does nothing. The
            function changes this model, and no copies of it.
    """

    names: list[str]
    undo: Callable[[], None]


class _Trial(NamedTuple):
    output: Tensor
    runs_layer: bool  # The module runs all of its children, so that no hook is needed.


def insert_after(model: nn.Module, pattern: str | Callable[..., bool], **options: Any) -> Inserted:
    """Puts a residual [`DMoE`][] behind each matching module of ``model``, in place.

    This is the placement of the paper (Oh et al., ICML 2025,
    [arXiv:2502.00619](https://arxiv.org/abs/2502.00619)), and it suits convolutional networks.
    Every pixel or voxel of the module's output (B, C, ...) is a token, and the layer adds the
    experts' output to it. Either all matching modules get a layer or, if one cannot, none of them.

    The layer becomes the child ``moe`` of the matching module. All modules, parameters and hooks
    that were there keep their names. A forward hook runs the layer, after the other hooks. If the
    model calls the module with the keyword ``mask=``, the layer gets that mask. An
    ``nn.Sequential`` runs the layer as its last child.

    **What you should know.**

    - The model must call the matching module itself. If it calls only the parts of that module, the
      layer never runs.
    - Each layer takes its device, dtype and train/eval state from its module. It takes its width
      from a trial: a copy of the module on the "meta" device runs on an image that has as many
      channels as the module's first convolution takes.
    - A module without a convolution, such as a block of a transformer, may return tokens
      (B, ..., C). Pass ``channel_dim=-1`` for these.
    - If the trial is not possible, because there is no convolution or a second input, the layer
      learns its width at its first call. Then run the model once before you pass its parameters to
      an optimizer, or wrap it for distributed training.
    - The new parameters require gradients even if those of the module are frozen.
    - A module that occurs in several places of the model gets one layer.
    - Models that torch.compile has compiled are compiled again, because they do not see new hooks.

    Args:
        model: Any module.
        pattern: Behind which modules to put a layer: a glob on the names that
            ``model.named_modules()`` gives, or a function ``(name, module) -> bool`` or
            ``(module) -> bool``. In a glob, ``*`` matches dots too. A match inside another match
            is ignored, so that "encoder.stages.*" gives one layer for each stage.
        **options: Further arguments of [`DMoE`][], such as ``attribute_sizes``. Here
            ``residual=True`` and ``channel_dim=1`` are the defaults. With ``zero_init=True`` the
            model's output does not change at first.

    Returns:
        The names of the new layers, and a function that removes them: ``(names, undo)``.

    Raises:
        ValueError: No module matches, and the error suggests names. Or a matching module is never
            called itself (such as an ``nn.ModuleList``), does not return one tensor, already has
            a child ``moe``, or may return tokens while ``channel_dim`` is not given.
        TypeError: An argument has the wrong type. When the model runs, a layer raises this error
            if its module was not tried here and does not return one tensor.

    Examples:
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
    with contextlib.ExitStack() as stack:  # If one fails, those before it are removed again.
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
    """Removes the layer, or what has replaced it since."""
    if place_was_kept:
        module.register_module("moe", None)
    else:
        module._modules.pop("moe", None)


def add_experts(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Tensor:
    """The forward hook of a module that a layer follows.

    It is a function without state, so that it is copied and pickled with the module, by this name.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"{_returned(module, output)}.")
    y: Tensor = module.moe(output, mask=kwargs.get("mask"))
    return y


def _check(module: nn.Module) -> None:
    """Raises if a layer cannot follow the module, as far as this shows without running it."""
    kind = type(module).__name__
    if isinstance(module, DMoE):
        raise ValueError("this module is a DMoE itself. Match only modules that are not.")
    if type(module).forward is nn.Module.forward:
        raise ValueError(
            f"this module is a {kind}, which holds modules and is never called itself. Match the "
            "modules that it holds."
        )
    free = "moe" not in vars(module) and not hasattr(type(module), "moe")
    if getattr(module, "moe", None) is not None or not free:
        raise ValueError(
            f"this module has an attribute 'moe' already ({type(module.moe).__name__}), which is "
            "the name of the new layer. Match only modules that have none, or undo the insertion "
            "that put it there."
        )


def _make_layer(model: nn.Module, module: nn.Module, options: dict[str, Any]) -> tuple[DMoE, bool]:
    """Makes the layer; says whether the module runs it without a hook."""
    trial = _try_on_meta(module)
    width = None
    if trial is None:
        runs_layer = type(module).forward is nn.Sequential.forward
        container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        read = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
        if not runs_layer and (container or not _CHILDREN.isdisjoint(read)):
            raise ValueError(_runs_children(module))
        parts = [*module.modules()]
        of_tokens = any(isinstance(part, _OF_TOKENS) for part in parts)
        of_maps = any(isinstance(part, _CONVOLUTIONS) for part in parts)
        if of_tokens and not of_maps and "channel_dim" not in options:
            raise ValueError(
                f"channel_dim: got none. {type(module).__name__} has linear layers or layer norms "
                "and no convolution, so it may return tokens. Pass channel_dim=-1 if it returns "
                "tokens (B, ..., C), or channel_dim=1 if it returns feature maps (B, C, ...)."
            )
    else:
        runs_layer = trial.runs_layer
        channel_dim = options.get("channel_dim", 1)
        with contextlib.suppress(IndexError, TypeError):  # DMoE raises a better error.
            width = trial.output.shape[channel_dim]
    parameters = itertools.chain(module.parameters(), model.parameters())
    like = next((p for p in parameters if p.is_floating_point()), None)
    kept = {} if like is None else {"device": like.device, "dtype": like.dtype}
    layer = DMoE(width, **{"channel_dim": 1, "residual": True, **kept, **options})
    return layer.train(module.training), runs_layer


def _try_on_meta(module: nn.Module) -> _Trial | None:
    """Runs a copy of the module on an image; returns None if that is not possible.

    Raises:
        ValueError: It does not return one tensor, or it does something after the layer.
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
    except Exception:  # The module may raise anything.
        return None
    if not isinstance(output, Tensor):
        raise ValueError(f"{_returned(module, output)}. Match a module that returns one tensor.")
    if ran and output is not ran[0]:
        raise ValueError(_runs_children(module))
    return _Trial(output, bool(ran))


def _copy_on_meta(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors hold no numbers, without the user's hooks."""
    # deepcopy does not copy what its memo holds already.
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
    """Makes compiled models compile again, because Dynamo does not notice new hooks."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _returned(module: nn.Module, output: Any) -> str:
    return (
        f"insert_after: {type(module).__name__} returned {type(output).__name__}, but a layer can "
        "only follow a module that returns one tensor"
    )


def _runs_children(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} runs its children by a forward method of its own, and so would "
        "run the layer among them and not behind it. Match a module around it, or one that it "
        "holds."
    )


def _hint(model: nn.Module, pattern: Any, named: list[tuple[str, nn.Module]]) -> str:
    """Names modules of a similar name that a layer can follow."""
    if as_predicate(pattern)("", model):
        return " Only the model itself matches. A layer can follow the modules that it holds."
    possible = []
    for name, module in named:
        with contextlib.suppress(ValueError):
            _check(module)
            possible.append(name)
    close = difflib.get_close_matches(pattern, possible, 5) if isinstance(pattern, str) else []
    if close:
        return f" Close candidates: {', '.join(close)}."
    return " model.named_modules() gives the names."
