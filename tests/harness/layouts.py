"""Tensors of equal shape and values in other places of memory, and what operators make of them."""

import torch
from torch import Tensor

from .exactness import assert_close


def _stored(t, *axes):
    """As ``t``, with the axes in this order in memory."""
    back = sorted(range(t.ndim), key=lambda i: axes[i])
    return t.permute(axes).clone(memory_format=torch.contiguous_format).permute(back)


def _strided(t):
    return torch.stack([t, t], dim=-1).flatten(-2)[..., ::2] if t.ndim else t


def _expanded(t):
    # A list of places has no second row like the first: the ends of the experts' rows, and the map
    # of tiles, four numbers each.
    is_map = t.dtype == torch.int32 and t.shape[1:] == (4,)
    return t[:1].expand(t.shape) if t.ndim > 1 and not is_map else t


# What ``model.to(memory_format=...)`` does to parameters of 4 axes, for any number of them: the
# second moves to the end.
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: _stored(t, 0, *range(2, t.ndim), 1) if t.ndim > 2 else t,
    "transposed": lambda t: _stored(t, *reversed(range(t.ndim))) if t.ndim else t,
    "expanded": _expanded,
    "strided": _strided,
}


def laid_out(args, layout):
    """The arguments of an operator with each tensor in that layout; leaves stay leaves."""

    def change(arg):
        if not isinstance(arg, Tensor):
            return arg
        return LAYOUTS[layout](arg.detach()).requires_grad_(arg.requires_grad)

    return tuple(map(change, args))


def check_operator(op, args, layout, checks=("test_faketensor",)):
    """Contiguous outputs of the right values, as the fake operator promises them."""
    given = laid_out(args, layout)
    plain = [a.detach().contiguous() if isinstance(a, Tensor) else a for a in given]
    with torch.no_grad():
        found, true = op(*given), op(*plain)
    torch.library.opcheck(op, given, test_utils=checks)
    if isinstance(found, Tensor):
        found, true = [found], [true]
    for i, (ours, other) in enumerate(zip(found, true, strict=True)):
        assert ours.is_contiguous()
        if ours.is_floating_point():
            assert_close(ours, other, ours.dtype, f"output {i}")
        else:
            assert torch.equal(ours, other)
