"""swap_mlps: replaces the MLP blocks of a model that somebody else wrote."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable
from typing import Any

from torch import nn

from .checks import check_flag
from .layer import DMoE
from .matching import as_predicate, outermost
from .read_mlp import ADVICE, find_linears, read_mlp


def swap_mlps(
    model: nn.Module,
    pattern: str | Callable[..., bool],
    *,
    upcycle: bool = False,
    **options: Any,
) -> list[str]:
    """Replaces MLP blocks of ``model`` with :class:`DMoE` layers, in place.

    Each new layer takes its width (D and H), device, dtype and train/eval state from the block
    it replaces. A block that stands in several places of the model is replaced by one layer, in
    all of them. Either all matching blocks are replaced or, if one cannot be read, none. Hooks on
    a block go with it, and the new parameters require gradients even where the old were frozen.

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
        The names of the replaced blocks.

    Raises:
        ValueError: if nothing matches (naming what could have), or if a matching block is no
            two-layer MLP (naming the part that could not be read).
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
        raise ValueError(f"pattern: {pattern!r} matches no module.{_hint(model, pattern, named)}")
    blocks = outermost(named, lambda name, module: module in matching)
    layers: dict[nn.Module, DMoE] = {}
    for name, block in blocks:
        if block not in layers:
            try:
                layers[block] = _replacement(block, upcycle, options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for name, block in blocks:
        model.set_submodule(name, layers[block])
    return [name for name, _ in blocks]


def _replacement(block: nn.Module, upcycle: bool, options: dict[str, Any]) -> DMoE:
    if isinstance(block, DMoE):
        raise ValueError("is a DMoE already; match the blocks that are not.")
    if upcycle:
        return DMoE.from_mlp(block, **options)
    mlp = read_mlp(block, upcycle=False)
    kept = {"hidden_dim": mlp.hidden_dim, "device": mlp.device, "dtype": mlp.dtype}
    return DMoE(mlp.dim, **{**kept, **options}).train(block.training)


def _hint(model: nn.Module, pattern: Any, named: list[tuple[str, nn.Module]]) -> str:
    """What was perhaps meant: two-layer MLPs first, then names of a similar spelling."""
    if as_predicate(pattern)("", model):
        return " Only the model itself does, and it cannot replace itself: see DMoE.from_mlp."
    mlps, alike = [], []
    for name, module in named:
        with contextlib.suppress(ValueError):
            find_linears(module)
            mlps.append(name)
    if isinstance(pattern, str):
        mlps.sort(key=lambda name: -difflib.SequenceMatcher(None, pattern, name).ratio())
        alike = difflib.get_close_matches(pattern, [name for name, _ in named])
    candidates = list(dict.fromkeys([*mlps, *alike]))
    more = f" and {len(candidates) - 5} more" if len(candidates) > 5 else ""
    close = f" Close candidates: {', '.join(candidates[:5])}{more}." if candidates else ""
    return close if mlps else f"{close} The model has no block that is a two-layer MLP. {ADVICE}"
