"""swap_mlps: replaces the MLP blocks of a model that somebody else wrote."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .layer import DMoE
from .mlp import read_linears


def swap_mlps(
    model: nn.Module,
    pattern: str | Callable[..., bool],
    *,
    upcycle: bool = False,
    **options: Any,
) -> list[str]:
    """Replaces MLP blocks of ``model`` with :class:`DMoE` layers, in place.

    Each new layer takes its width (D and H), device, dtype and train/eval state from the block
    it replaces. A block that stands in several places of the model is replaced by one layer.
    Either all matching blocks are replaced or, if one cannot be read, none.

    Args:
        model: any module that has MLP blocks D -> H -> D inside.
        pattern: a glob on the names that ``model.named_modules()`` gives (``*`` matches dots
            too), or a predicate ``(name, module) -> bool``. A match inside a match is left out.
        upcycle: starts every expert as the old MLP (see :meth:`DMoE.from_mlp`): in eval mode
            the model's output stays what it was.
        options: further arguments of :class:`DMoE`.

    Returns:
        The names of the replaced blocks.

    Raises:
        ValueError: if nothing matches (naming what could have), or if a matching block is no
            two-layer MLP (naming the part that could not be read).

    Example:
        >>> from torch import nn
        >>> from dmoe_layer import swap_mlps
        >>> mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        >>> model = nn.Sequential(nn.LayerNorm(16), mlp)
        >>> swap_mlps(model, "1", n_experts=8, k=2, attribute_sizes=3)
        ['1']
    """
    matches = _is_match(pattern)
    # Names of shared modules too: the block must be replaced wherever it stands.
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if n]
    blocks: dict[str, nn.Module] = {}
    for name, module in named:
        inside_a_match = any(name.startswith(f"{outer}.") for outer in blocks)
        if not inside_a_match and matches(name, module):
            blocks[name] = module
    if not blocks:
        raise ValueError(f"pattern: {pattern!r} matches no module.{_suggest(pattern, named)}")
    layers: dict[nn.Module, DMoE] = {}
    for name, block in blocks.items():
        if block not in layers:
            try:
                layers[block] = _replacement(block, upcycle, options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    for name, block in blocks.items():
        model.set_submodule(name, layers[block])
    return list(blocks)


def _replacement(block: nn.Module, upcycle: bool, options: dict[str, Any]) -> DMoE:
    if upcycle:
        return DMoE.from_mlp(block, **options)
    linears = read_linears(block)
    layer = DMoE(
        linears.dim,
        device=linears.w1_HD.device,
        dtype=linears.w1_HD.dtype,
        **{"hidden_dim": linears.hidden_dim, **options},
    )
    return layer.train(block.training)


def _is_match(pattern: Any) -> Callable[[str, nn.Module], bool]:
    if isinstance(pattern, str):
        return lambda name, module: fnmatch.fnmatchcase(name, pattern)
    if not callable(pattern):
        raise TypeError(
            f"pattern: got {pattern!r} ({type(pattern).__name__}), expected a glob on module "
            "names such as '*.mlp', or a predicate (name, module) -> bool."
        )
    parameters = inspect.signature(pattern).parameters
    if len(parameters) == 1:
        return lambda name, module: bool(pattern(module))
    return lambda name, module: bool(pattern(name, module))


def _suggest(pattern: Any, named: list[tuple[str, nn.Module]]) -> str:
    """Names that were perhaps meant: of two-layer MLPs first, then by their spelling."""
    candidates = [name for name, module in named if _is_readable(module)]
    if isinstance(pattern, str):
        names = [name for name, _ in named]
        candidates += difflib.get_close_matches(pattern.replace("*", ""), names, cutoff=0.4)
    candidates = list(dict.fromkeys(candidates))
    if not candidates:
        return " The model has no two-layer MLP blocks."
    more = f" and {len(candidates) - 5} more" if len(candidates) > 5 else ""
    return f" Close candidates: {', '.join(candidates[:5])}{more}."


def _is_readable(module: nn.Module) -> bool:
    try:
        read_linears(module)
    except ValueError:
        return False
    return True
