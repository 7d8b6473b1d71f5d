"""The scope: carries attributes into every DMoE of a model, and the routings out of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ._torch_private import backward_pass
from .attributes import Attributes, as_sizes, check_attributes, snapshot
from .losses import count_assignments, importance_loss, load_balancing_loss, router_z_loss
from .tensors import Routing


class _Recorded:
    """One recorded call and the one before it; the first of a chain is empty.

    A chain and not a list: torch.compile guards on a list's length and on every item in it, and
    would compile each of a model's blocks anew for its place in the list.
    """

    def __init__(self, routed: Any, sizes: tuple[int, ...] | None, before: Any) -> None:
        self.routed: Routing = routed
        self.sizes = sizes
        self.before: _Recorded = before


class _Current(threading.local):
    """The open scope of each thread: two threads may use one model at once."""

    # Set in every thread's own instance: torch.compile does not guard on a class's default.
    def __init__(self) -> None:
        self.scope: routing | None = None


_current = _Current()


class routing:
    """Scope around a forward pass: every DMoE inside reads the attributes and is recorded.

    Args:
        attributes: integers, (batch,), or (batch, n) for n attributes; a batch of 1 or a scalar
            applies to every sample; -1 is unknown. None: only records. They are copied when the
            scope opens; on a GPU that costs the one wait of the whole pass.

    An inner scope hides the outer one, its attributes and its record. The scope belongs to the
    thread that opened it. Routings keep their autograd graph, so let go of the scope after the
    step; in evaluation use ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: for attributes that are no integers, or of more than 2 dimensions.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE, routing
        >>> layer = DMoE(16, n_experts=8, k=2, attribute_sizes=3)
        >>> with routing(torch.tensor([0, 2])) as r:
        ...     y = layer(torch.randn(2, 10, 16))
        >>> loss = y.square().mean() + 0.01 * r.load_balancing_loss()
        >>> r.load_table().shape
        torch.Size([3, 8])
    """

    def __init__(self, attributes: Any = None) -> None:
        self._attributes = None if attributes is None else snapshot(attributes)
        self._last_call = _Recorded(None, None, None)
        self._is_open = False
        self._outer: routing | None = None
        self._backward_pass = -1

    def __enter__(self) -> routing:
        if self._is_open:
            raise RuntimeError("routing: this scope is already open; make a new one.")
        self._backward_pass = _backward_pass()
        self._is_open = True
        self._outer, _current.scope = _current.scope, self
        return self

    def __exit__(self, *error: Any) -> None:
        _current.scope, self._outer = self._outer, None
        self._is_open = False

    @property
    def attributes(self) -> Tensor | None:
        """A copy of the attributes, int64, in the shape that was given."""
        return None if self._attributes is None else self._attributes.values.clone()

    @staticmethod
    def attribute_values(
        x: Tensor, attribute_sizes: int | tuple[int, ...], *, unknown: str = "error"
    ) -> Tensor:
        """The open scope's attributes, one row for each sample of ``x``, checked as DMoE does.

        For modules of your own that need them beside the experts, such as FiLM: a model is then
        told its attributes in one place.

        Args:
            x: (batch, ...), on the device where the values are wanted.
            attribute_sizes: how many values each attribute has, as of :class:`DMoE`.
            unknown: "error" refuses -1; with any other word it comes out as -1.

        Returns:
            (batch, n) int64 for n attributes.

        Raises:
            MissingAttributesError: if no scope with attributes is open.
            ValueError, TypeError: for attributes that do not fit.

        Example:
            >>> import torch
            >>> from dmoe_layer import routing
            >>> with routing(torch.tensor([0, 2])):
            ...     routing.attribute_values(torch.randn(2, 10, 16), 3)
            tensor([[0],
                    [2]])
        """
        values, bounds = current_attributes() or (None, None)
        sizes = list(as_sizes(attribute_sizes) or ())
        return check_attributes(x, x.shape[0], values, bounds, sizes, unknown)

    @property
    def routings(self) -> list[Routing]:
        """What every DMoE call inside the scope routed, in call order."""
        return [call.routed for call in self._calls()]

    def load_balancing_loss(self, *, per_attribute: bool = False) -> Tensor:
        """Mean over the calls of :func:`load_balancing_loss`; 0 if there was no call.

        With ``per_attribute`` each call's is the mean over the attribute values present.
        """
        return self._mean(load_balancing_loss, per_attribute=per_attribute)

    def importance_loss(self) -> Tensor:
        """Mean over the calls of :func:`importance_loss`; 0 if there was no call."""
        return self._mean(importance_loss)

    def router_z_loss(self) -> Tensor:
        """Mean over the calls of :func:`router_z_loss`; 0 if there was no call."""
        return self._mean(router_z_loss)

    def load_table(self, *, per_call: bool = False, attribute: int = 0) -> Tensor:
        """Each attribute value's share of tokens by expert.

        Args:
            per_call: one table a call instead of one over all calls together.
            attribute: which one, where samples have several.

        Returns:
            (A, E) fp32, or (calls, A, E). Row a says how the (token, slot) pairs of value a were
            shared among the experts and sums to 1; it is all 0 where value a has no tokens.
            Unknown (-1) has no row, nor have calls without attributes beside calls with some;
            where no call has any, there is one row, for all tokens.

        Raises:
            ValueError: if there was no call, if the calls have different numbers of experts, or
                if there is no such attribute.
        """
        calls = self._calls()
        n_experts = sorted({call.routed.logits.shape[-1] for call in calls})
        if len(n_experts) != 1:
            raise ValueError(
                "load_table: no DMoE was called inside this scope."
                if not calls
                else f"load_table: the calls have different numbers of experts, {n_experts}; "
                "look at `routings` one by one."
            )
        # Without attributes at all, one row for everybody; beside calls that have some, none.
        some = any(call.routed.attributes is not None for call in calls)
        values = [_values_of(call.routed, attribute, default=-1 if some else 0) for call in calls]
        n_values = max(_n_values(call, v, attribute) for call, v in zip(calls, values, strict=True))
        counts = [_count(call.routed, v, n_values) for call, v in zip(calls, values, strict=True)]
        # A model may be spread over devices.
        counts_CAE = torch.stack([count.to(counts[0].device) for count in counts])
        counts_CAE = counts_CAE if per_call else counts_CAE.sum(dim=0)
        return counts_CAE.float() / counts_CAE.sum(dim=-1, keepdim=True).clamp(min=1)

    def _calls(self) -> list[_Recorded]:
        calls, call = [], self._last_call
        while call.before is not None:
            calls.append(call)
            call = call.before
        return calls[::-1]

    def _mean(self, loss_of: Callable[..., Tensor], **options: Any) -> Tensor:
        losses = [loss_of(routed, **options) for routed in self.routings]
        if not losses:
            return torch.zeros(())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def current_attributes() -> Attributes | None:
    """The attributes of this thread's open scope, if it has any."""
    scope = _current.scope
    return None if scope is None else scope._attributes


def record(routed: Routing, sizes: tuple[int, ...] | None) -> None:
    """Adds a call to this thread's open scope, unless it is a recompute."""
    scope = _current.scope
    if scope is not None and _backward_pass() == scope._backward_pass:
        scope._last_call = _Recorded(routed, sizes, scope._last_call)


def _backward_pass() -> int:
    """Which backward pass this thread is at work in, -1 if none.

    A call during another pass than that in which its scope was opened is a recompute of
    activation checkpointing. A compiled graph holds its recomputes itself.
    """
    return -1 if torch.compiler.is_compiling() else backward_pass()


def _unheard(scope: routing | None) -> routing | None:
    """A scope of the same attributes whose record nobody reads.

    Not a flag: a compiled block that is recomputed reads the current scope and nothing else.
    """
    if scope is None:
        return None
    twin = routing()
    twin._attributes = scope._attributes
    return twin


class _Carried(AbstractContextManager[None]):
    """Puts a scope (or the lack of one) in place again; may be entered many times."""

    def __init__(self, scope: routing | None) -> None:
        self.scope = scope
        self.hidden: list[routing | None] = []

    def __enter__(self) -> None:
        self.hidden.append(_current.scope)
        _current.scope = self.scope

    def __exit__(self, *error: Any) -> None:
        _current.scope = self.hidden.pop()


def carry_routing(fn: Callable[..., Any] | None = None) -> Any:
    """Makes a function safe to recompute: it will find the scope that is open now.

    Activation checkpointing calls a block a second time, during backward: by then the scope may
    have closed, another may be open, or another thread may be at work. The recompute finds the
    attributes of the first call and records nothing.

    Args:
        fn: what the checkpoint is to run; without it, the pair of contexts that
            ``checkpoint(..., context_fn=carry_routing)`` asks for.

    Returns:
        A function of ``fn``'s arguments and result; or that pair of contexts.

    Use it with ``use_reentrant=False``; the reentrant variant runs the first call without
    autograd, so that what it records carries no gradient.

    Example:
        >>> import torch
        >>> from torch.utils.checkpoint import checkpoint
        >>> from dmoe_layer import DMoE, carry_routing, routing
        >>> layer, x = DMoE(16, attribute_sizes=3), torch.randn(2, 10, 16, requires_grad=True)
        >>> with routing(torch.tensor([0, 2])):
        ...     y = checkpoint(carry_routing(layer), x, use_reentrant=False)
        >>> y.sum().backward()
    """
    scope = _current.scope
    if fn is None:
        return _Carried(scope), _Carried(_unheard(scope))

    @functools.wraps(fn)
    def carried(*args: Any, **kwargs: Any) -> Any:
        first = scope is None or _backward_pass() == scope._backward_pass
        with _Carried(scope if first else _unheard(scope)):
            return fn(*args, **kwargs)

    return carried


def _values_of(routed: Routing, attribute: int, default: int) -> Tensor:
    """Each token's value of one attribute, or the default where there are none: (T,)."""
    values = routed.attributes
    if values is None:
        values = routed.expert_indices.new_full((len(routed.logits),), default)
    n = 1 if values.ndim == 1 else values.shape[1]
    if not 0 <= attribute < n and not (routed.attributes is None and default == -1):
        raise ValueError(f"attribute: got {attribute}, expected 0 .. {n - 1}.")
    return values if values.ndim == 1 else values[:, attribute]


def _n_values(call: _Recorded, values_T: Tensor, attribute: int) -> int:
    if call.sizes is not None:
        return call.sizes[attribute]
    return max(int(values_T.max()) + 1, 1) if len(values_T) else 1


def _count(routed: Routing, values_T: Tensor, n_values: int) -> Tensor:
    # Row 0 takes the unknown, and is dropped.
    shape = (n_values + 1, routed.logits.shape[-1])
    return count_assignments(routed.expert_indices, values_T + 1, shape)[1:]
