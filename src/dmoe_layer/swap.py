"""swap_mlps: puts layers in the place of the MLPs of a model that somebody else wrote."""

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
    """A :class:`DMoE` in the place of somebody else's MLP, called as that was.

    It takes its tokens first, or under the name that the old block had for them, such as
    ``hidden_states``. What else the host passes and the block could do without, a size, a flag or
    None, is ignored. Attributes come from the open scope; ``attributes=``, ``mask=`` and
    ``return_routing=`` ask for what they do in :class:`DMoE`, unless the old block had a
    parameter of that name.

    Raises:
        TypeError: for an argument that the old block did not take, and for a second tensor, which
            is never read as attributes.
    """

    _block_parameters: tuple[str, ...] = ("x",)
    _block_took_more = False  # than those, by *args or **kwargs

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
                f"forward: got no tokens, expected them first or as {names[0]}=; got the "
                f"arguments {', '.join(kwargs) or '()'}."
            )
        for name, value in (*given[1:], *kwargs.items()):
            if name not in names and not self._block_took_more:
                raise TypeError(
                    f"forward: got an argument {name!r} ({describe(value)}), which the block had "
                    f"no place for whose this layer has taken; it took {', '.join(names)}. "
                    "Attributes come from `with routing(attributes):`, or by name, "
                    "layer(x, attributes=...)."
                )
            if _holds_tensor(value):
                raise TypeError(
                    f"forward: got a second tensor, argument {name!r} ({describe(value)}). A DMoE "
                    "in the place of an MLP takes its tokens and nothing else: a second tensor "
                    "of the host is not read as attributes, and what the old block did with it "
                    "the layer does not do. Attributes come from `with routing(attributes):`, or "
                    "by name, layer(x, attributes=...)."
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
    """Replaces MLP blocks of ``model`` with :class:`DMoE` layers, in place.

    Each new layer takes its width (D and H), device, dtype and train/eval state from the block
    it replaces, and is called as that was (:class:`SwappedDMoE`). A block that stands in several
    places of the model is replaced by one layer, in all of them. Either all matching blocks are
    replaced or, if one cannot be read, none. Hooks on a block go with it, and the new parameters
    require gradients even where the old were frozen.

    A block may be gated (SwiGLU, GEGLU), of one linear layer D -> 2·H or of two D -> H; H is then
    the layer's ``hidden_dim``. Its linear layers may be convolutions of size 1 on maps
    (B, C, ...); the layer then has ``channel_dim=1``. A copy of the block is tried, and of blocks
    that differ in nothing but their weights, one is.

    A match may also be a host on which an MLP's linear layers stand, as on
    ``torch.nn.TransformerEncoderLayer`` (``linear1``, ``activation``, ``linear2``), on Hugging
    Face's OPT and Whisper (``fc1``, ``activation_fn``, ``fc2``), BERT and VideoMAE
    (``intermediate.dense``, ``output.dense``) and ConvNeXt (``pwconv1``, ``act``, ``pwconv2``),
    or one after another in an ``nn.Sequential``. The layer then takes the place of the first one;
    activation and second one become ``nn.Identity``. The host's own dropouts, all of them, now
    act on the layer's output, so that the layer's own is 0 unless given. Where the host is
    sequence-first the layer has ``batch_dim=1``. Give the model that holds all of a
    ``torch.nn.TransformerEncoder``, which must leave its fast path too.

    Args:
        model: any module that has MLP blocks D -> H -> D inside.
        pattern: a glob on the names that ``model.named_modules()`` gives (``*`` matches dots
            too), or a predicate ``(name, module) -> bool`` or ``(module) -> bool``. A match
            inside a match is left out.
        upcycle: starts every expert as the old MLP (see :meth:`DMoE.from_mlp`): in eval mode
            the model's output stays what it was.
        options: further arguments of :class:`DMoE`, such as ``attribute_sizes``. Without
            ``upcycle`` new experts take only the width from the block (unless ``hidden_dim`` is
            given): their activation (ReLU) and dropout (0.1) are DMoE's defaults, whatever the
            block's are, unless given here.

    Returns:
        The names under which the layers stand: those of the replaced blocks, or of hosts' first
        linear layers.

    Raises:
        ValueError: if nothing matches (naming what could have), or if a matching block is no
            two-layer MLP and holds none (naming the part that could not be read).
        TypeError: for a model, pattern or option of another kind, and, with ``upcycle``, for an
            option that the block decides.

    Example:
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
    # Names of shared modules too: a block must be replaced wherever it stands.
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
    """What takes the place of a match: a layer as wide as an MLP that has been read.

    Attributes:
        mlp: what has been read.
        host_mlp: where the MLP stands on a host; None: the match itself is one.
        options: of the layer.
    """

    mlp: Mlp
    host_mlp: HostMlp | None
    options: dict[str, Any]


def _read(block: nn.Module, upcycle: bool, options: dict[str, Any], trials: Trials) -> _Match:
    """What takes the place of a match. Nothing is drawn.

    Raises:
        ValueError: saying why nothing can.
    """
    if isinstance(block, DMoE):
        raise ValueError("is a DMoE already; match the blocks that are not.")
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
        raise ValueError(f"{kind}: holds a DMoE already; match the blocks that do not.")
    if len(mlps) > 1:
        places = "; ".join(map(str, mlps[:3])) + ("; ..." if len(mlps) > 3 else "")
        raise ValueError(f"{kind}: holds {len(mlps)} MLPs ({places}). Match what holds one.")
    axis = trials.of(block, lambda: try_host_mlp(block, mlps[0]))
    options = {"dropout": 0.0, **({"batch_dim": axis} if axis else {}), **options}
    part, dropout = as_block(block, mlps[0]), options["dropout"]
    with _named_in_errors(_on_host(block, mlps[0])):
        mlp = read_mlp(part, upcycle=upcycle, dropout=dropout, trials=trials)
    return _Match(mlp, mlps[0], options)


def _replacement(block: nn.Module, match: _Match, upcycle: bool) -> SwappedDMoE:
    """The layer, drawn or upcycled."""
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
    """The names by which a block may be given what it takes, and whether it takes others too."""
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
    """What was perhaps meant, of all that would be taken; or what to do where there is nothing."""
    if as_predicate(pattern)("", model):
        return " Only the model itself does, and it cannot replace itself: see DMoE.from_mlp."
    mlps: list[str] = []
    hosts: list[str] = []
    trials = Trials()
    for name, module in named:
        with contextlib.suppress(ValueError):
            match = _read(module, upcycle, options, trials)
            (mlps if match.host_mlp is None else hosts).append(name)
    if not mlps and not hosts and upcycle:
        hint = _hint(model, pattern, named, False, options)
        return f" No block can be upcycled. Without upcycle=True:{hint}"
    if not mlps and not hosts:
        return f" The model has no block that is a two-layer MLP. {advice_for(model)}"
    if isinstance(pattern, str):
        for names in (mlps, hosts):
            names.sort(key=lambda name: -difflib.SequenceMatcher(None, pattern, name).ratio())
    if mlps:
        return f" Close candidates: {_shown(mlps)}."
    # A layer has brothers, which one glob names, unless it matches others too.
    globs = {".".join("*" if part.isdigit() else part for part in h.split(".")) for h in hosts}
    matched = [name for glob in globs for name, _ in outermost(named, as_predicate(glob))]
    if sorted(matched) == sorted(hosts):
        hosts = [repr(glob) for glob in sorted(globs)]
    return (
        " The model has no block that is a two-layer MLP, but layers on which the linear layers of "
        f"one stand, as on torch.nn.TransformerEncoderLayer. Match those: {_shown(hosts)}."
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
