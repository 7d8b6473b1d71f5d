"""swap_mlps: replaces the MLPs of an existing model by DMoE layers."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checks import check_flag, describe
from .foreign.hosts import (
    HostMlp,
    as_block,
    find_host_mlps,
    leave_nested_tensors,
    replace_host_mlp,
    try_host_mlp,
)
from .foreign.kinds import Trials
from .foreign.matching import as_predicate, outermost
from .foreign.read_mlp import Mlp, advice_for, read_mlp
from .layer import DMoE
from .tensors import Routing
from .upcycling import upcycled


class SwappedDMoE(DMoE):
    """A [`DMoE`][] in the place of a model's MLP block, which the model calls like the old block.

    The first argument holds the tokens. They may also come under the name that the old block had
    for them, such as ``hidden_states``. The layer ignores other arguments that are no tensors, such
    as a size, a flag or None. The attributes come from the open scope. ``attributes=``, ``mask=``
    and ``return_routing=`` mean what they mean in [`DMoE`][], unless the old block had a parameter
    with that name.

    Raises:
        TypeError: The model passes an argument that the old block did not have, or a second
            tensor. The layer never reads a second tensor as attributes.
    """

    _block_parameters: tuple[str, ...] = ("x",)
    _block_took_more = False  # by *args or **kwargs

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Routing]:
        names = self._block_parameters
        options = {
            name: kwargs.pop(name)
            for name in ("attributes", "mask", "return_routing")
            if name in kwargs and name not in names
        }
        given = [(names[i] if i < len(names) else f"{i + 1}", arg) for i, arg in enumerate(args)]
        if not given and names[0] in kwargs:
            given = [(names[0], kwargs.pop(names[0]))]
        if not given:
            raise TypeError(
                f"forward: got no tokens. Pass them as the first argument or as {names[0]}=. Got "
                f"the arguments {', '.join(kwargs) or '()'}."
            )
        for name, value in (*given[1:], *kwargs.items()):
            if name not in names and not self._block_took_more:
                raise TypeError(
                    f"forward: got an argument {name!r} ({describe(value)}), but the block that "
                    f"this layer replaced had the parameters {', '.join(names)}. Pass attributes "
                    "by `with routing(attributes):`, or by name, layer(x, attributes=...)."
                )
            if _holds_tensor(value):
                raise TypeError(
                    f"forward: got a second tensor, argument {name!r} ({describe(value)}). A DMoE "
                    "that replaces an MLP takes only its tokens. It does not do what the old block "
                    "did with a second tensor, and it does not read that as attributes. Pass "
                    "attributes by `with routing(attributes):`, or by name, "
                    "layer(x, attributes=...)."
                )
        return super().forward(given[0][1], **options)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(each) for each in value)
    return isinstance(value, Tensor)


def swap_mlps(
    model: nn.Module,
    pattern: str | Callable[..., bool],
    *,
    upcycle: bool = False,
    **options: Any,
) -> list[str]:
    """Replaces MLP blocks of ``model`` by [`DMoE`][] layers, in place.

    ``pattern`` selects the blocks by name. Each new layer takes its width (D and H), its device,
    its dtype and its train/eval state from the block that it replaces. The model calls it like the
    old block ([`SwappedDMoE`][]). Either all matching blocks are replaced or, if one cannot be
    read, none of them.

    **What can be replaced.**

    - A module that holds nothing but an MLP: two linear layers with an activation between them.
    - A gated MLP (SwiGLU, GEGLU). Its first part is one linear layer D -> 2·H or two layers D -> H.
    - An MLP of convolutions of size 1 on maps (B, C, ...). The layer then has ``channel_dim=1``.
    - An MLP whose two linear layers are part of a larger module, the *host*. Known hosts are
      ``torch.nn.TransformerEncoderLayer``, Hugging Face's OPT, Whisper, BERT, VideoMAE and
      ConvNeXt, and any ``nn.Sequential`` that holds linear layer, activation and linear layer one
      after another. The new layer replaces the first linear layer. The activation and the second
      linear layer become ``nn.Identity``.

    The function runs a copy of each block on random tokens, to make sure that the block computes an
    MLP. Of blocks that differ only in their weights, it runs one.

    **What you should know.**

    - A block that occurs in several places of the model is replaced by one layer in all of them.
    - Hooks on a replaced block are lost.
    - The new parameters require gradients even if the old ones were frozen.
    - All dropouts of a host stay, and now act on the layer's output. So the layer's own dropout is
      0 there unless you pass one.
    - If a host is sequence-first, the layer has ``batch_dim=1``.
    - Pass the model that contains the whole ``torch.nn.TransformerEncoder``, not only its layers.
      The encoder must stop using its fast path too.

    Args:
        model: Any module that contains MLP blocks D -> H -> D.
        pattern: Which modules to replace: a glob on the names that ``model.named_modules()``
            gives, or a function ``(name, module) -> bool`` or ``(module) -> bool``. In a glob,
            ``*`` matches dots too. A match inside another match is ignored.
        upcycle: Whether every expert starts as a copy of the old MLP ([`DMoE.from_mlp`][]). In
            eval mode the model's output then does not change.
        **options: Further arguments of [`DMoE`][], such as ``attribute_sizes``. Without
            ``upcycle``, new experts take only their width from the block. Their activation (ReLU)
            and dropout (0.1) are the defaults of [`DMoE`][], unless you pass others.

    Returns:
        The names of the new layers: those of the replaced blocks, or those of the first linear
            layers of hosts.

    Raises:
        ValueError: No module matches, and the error names modules that could be replaced. Or a
            matching module is no two-layer MLP and contains none, and the error names the part
            that could not be read.
        TypeError: An argument has the wrong type, or ``upcycle`` is set together with an option
            that the block decides.

    Examples:
        >>> from torch import nn
        >>> from dmoe_layer import swap_mlps
        >>> mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        >>> model = nn.Sequential(nn.LayerNorm(16), mlp)
        >>> swap_mlps(model, "1", n_experts=8, k=2, attribute_sizes=3)
        ['1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    check_flag("upcycle", upcycle)
    # With the names of shared modules, since a block must be replaced wherever it occurs.
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n]
    matching = {m for _, m in outermost(named, as_predicate(pattern))}
    if not matching:
        hint = _hint(model, pattern, named, upcycle, options)
        raise ValueError(f"pattern: {pattern!r} matches no module.{hint}")
    blocks = outermost(named, lambda name, module: module in matching)
    matches: dict[nn.Module, _Match] = {}
    layers: dict[nn.Module, SwappedDMoE] = {}
    trials = Trials()
    for name, block in blocks:
        if block not in matches:
            with _named_in_errors(name):
                matches[block] = _read(block, upcycle, options, trials)
    for name, block in blocks:
        if block not in layers:
            mlp = matches[block].host_mlp
            with _named_in_errors(name if mlp is None else f"{name}: {_on_host(block, mlp)}"):
                layers[block] = _replacement(block, matches[block], upcycle)
    hosts = {block: match.host_mlp for block, match in matches.items() if match.host_mlp}
    names = []
    for name, block in blocks:
        if block in hosts:
            replace_host_mlp(block, hosts[block], layers[block])
            name = f"{name}.{hosts[block].first}"
        else:
            model.set_submodule(name, layers[block])
        names.append(name)
    leave_nested_tensors(model, {*hosts})
    return names


@contextlib.contextmanager
def _named_in_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _on_host(host: nn.Module, mlp: HostMlp) -> str:
    return f"{type(host).__name__}: its MLP ({mlp})"


class _Match(NamedTuple):
    """A match of the pattern, and what is known about the layer that replaces it.

    Attributes:
        mlp: What has been read of the MLP.
        host_mlp: Where the MLP is on its host. None if the match itself is the MLP.
        options: The options of the layer.
    """

    mlp: Mlp
    host_mlp: HostMlp | None
    options: dict[str, Any]


def _read(block: nn.Module, upcycle: bool, options: dict[str, Any], trials: Trials) -> _Match:
    """Reads what is needed to replace a match. No random number is drawn.

    Raises:
        ValueError: It cannot be replaced. The error says why.
    """
    if isinstance(block, DMoE):
        raise ValueError("this module is a DMoE already. Match only modules that are not.")
    dropout = options.get("dropout")
    try:
        mlp = read_mlp(block, upcycle=upcycle, dropout=dropout, trials=trials)
        return _Match(mlp, None, options)
    except ValueError:
        mlps = find_host_mlps(block)
        if not mlps and not any(isinstance(module, DMoE) for module in block.modules()):
            raise
    kind = type(block).__name__
    if not mlps:
        raise ValueError(f"{kind} contains a DMoE already. Match only modules that do not.")
    if len(mlps) > 1:
        places = "; ".join(map(str, mlps[:3])) + ("; ..." if len(mlps) > 3 else "")
        raise ValueError(
            f"{kind} contains {len(mlps)} MLPs ({places}). Match a module that contains one."
        )
    axis = trials.of(block, lambda: try_host_mlp(block, mlps[0]))
    options = {"dropout": 0.0, **({"batch_dim": axis} if axis else {}), **options}
    part, dropout = as_block(block, mlps[0]), options["dropout"]
    with _named_in_errors(_on_host(block, mlps[0])):
        mlp = read_mlp(part, upcycle=upcycle, dropout=dropout, trials=trials)
    return _Match(mlp, mlps[0], options)


def _replacement(block: nn.Module, match: _Match, upcycle: bool) -> SwappedDMoE:
    """Makes the layer, with new weights or upcycled."""
    mlp, options = match.mlp, match.options
    if upcycle:
        options = {name: value for name, value in options.items() if name != "dropout"}
        layer = upcycled(SwappedDMoE, mlp, **options)
    else:
        kept = {
            "hidden_dim": mlp.hidden_dim,
            "channel_dim": mlp.channel_dim,
            "device": mlp.device,
            "dtype": mlp.dtype,
        }
        layer = SwappedDMoE(mlp.dim, **{**kept, **options})
    old = block if match.host_mlp is None else block.get_submodule(match.host_mlp.first)
    layer._block_parameters, layer._block_took_more = _parameters_of(old)
    return layer.train(old.training)


def _parameters_of(block: nn.Module) -> tuple[tuple[str, ...], bool]:
    """The names of a block's parameters, and whether it accepts arguments of other names too."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(block.forward).parameters.values()
    names = tuple(each.name for each in parameters if each.kind not in starred) or ("x",)
    return names, any(each.kind in starred for each in parameters)


def _hint(
    model: nn.Module,
    pattern: Any,
    named: list[tuple[str, nn.Module]],
    upcycle: bool,
    options: dict[str, Any],
) -> str:
    """Names modules that may have been meant, or says what to do if there are none."""
    if as_predicate(pattern)("", model):
        return " Only the model itself matches, and it cannot replace itself. Use DMoE.from_mlp."
    mlps: list[str] = []
    hosts: list[str] = []
    trials = Trials()
    for name, module in named:
        with contextlib.suppress(ValueError):
            match = _read(module, upcycle, options, trials)
            (mlps if match.host_mlp is None else hosts).append(name)
    if not mlps and not hosts and upcycle:
        hint = _hint(model, pattern, named, False, options)
        return f" No module can be upcycled. Without upcycle=True:{hint}"
    if not mlps and not hosts:
        return f" The model has no module that is a two-layer MLP. {advice_for(model)}"
    if isinstance(pattern, str):
        for names in (mlps, hosts):
            names.sort(key=lambda name: -difflib.SequenceMatcher(None, pattern, name).ratio())
    if mlps:
        return f" Close candidates: {_shown(mlps)}."
    # A model has many such layers. One glob names them all, unless it matches other modules too.
    globs = {".".join("*" if part.isdigit() else part for part in h.split(".")) for h in hosts}
    matched = [name for glob in globs for name, _ in outermost(named, as_predicate(glob))]
    if sorted(matched) == sorted(hosts):
        hosts = [repr(glob) for glob in sorted(globs)]
    return (
        " The model has no module that is a two-layer MLP by itself, but it has layers that hold "
        "the parts of one, as torch.nn.TransformerEncoderLayer does. Match those layers: "
        f"{_shown(hosts)}."
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
