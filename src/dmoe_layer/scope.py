"""The scope: carries attributes into every DMoE of a model, and the routings out of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ._torch_private import backward_pass, constant_for_dynamo, program_capture
from .attributes import UNKNOWN_POLICIES, Attributes, as_sizes, check_attributes, checked_copy
from .checks import check_choice, check_flag, describe
from .losses import importance_loss, load_balancing_loss, router_z_loss
from .recorded import Recorded, calls_in_order, load_table
from .tensors import Routing


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
        record: False keeps no routing, for prediction: what a call has routed is let go of when
            it returns. There are no losses and no load table of such a scope.

    An inner scope hides the outer one, its attributes and its record. The scope belongs to the
    thread that opened it. Routings keep their autograd graph, so let go of the scope after the
    step; in evaluation use ``torch.no_grad()``.

    A program that ``torch.export``, ``torch.jit.trace`` or ``make_fx`` captures must open its
    scope itself, from attributes that are an input of it: those of a scope around the capture
    would be frozen into it, and are refused. ``torch.compile`` follows any scope.

    Raises:
        TypeError, ValueError: for attributes that are no integers, have no values, or are of more
            than 2 dimensions.
        RuntimeError: inside, where a program that is being captured reads the attributes.

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

    def __init__(self, attributes: Any = None, *, record: bool = True) -> None:
        check_flag("record", record)
        self._attributes = None if attributes is None else checked_copy(attributes)
        self._last_call = Recorded(None, None, None)
        self._is_open = False
        self._outer: routing | None = None
        self._opened_in_pass = -1
        self._records = record
        # That of its making and not of its opening: there its attributes were copied.
        self._made_in_capture = program_capture()

    def __enter__(self) -> routing:
        if self._is_open:
            raise RuntimeError("routing: this scope is already open; make a new one.")
        self._opened_in_pass = _pass_now()
        self._is_open = True
        self._outer, _current.scope = _current.scope, self
        return self

    def __exit__(self, *error: Any) -> None:
        _current.scope, self._outer = self._outer, None
        self._is_open = False

    @property
    def attributes(self) -> Tensor | None:
        """A copy of the attributes, int64, in the shape that was given."""
        readable = _readable(self)
        return None if readable is None else readable.values.clone()

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
            unknown: as of :class:`DMoE`: "error" refuses -1, with the others it comes out as -1.

        Returns:
            (batch, n) int64 for n attributes.

        Raises:
            MissingAttributesError: if no scope with attributes is open.
            ValueError, TypeError: for attributes or arguments that do not fit.

        Example:
            >>> import torch
            >>> from dmoe_layer import routing
            >>> with routing(torch.tensor([0, 2])):
            ...     routing.attribute_values(torch.randn(2, 10, 16), 3)
            tensor([[0],
                    [2]])
        """
        check_choice("unknown", unknown, UNKNOWN_POLICIES)
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {describe(x)}, expected a tensor (batch, ...).")
        if x.ndim == 0:
            raise ValueError(f"x: got {describe(x)}, expected (batch, ...): a row for each sample.")
        sizes = as_sizes(attribute_sizes)
        if sizes is None:
            raise TypeError(
                "attribute_sizes: got None, expected how many values each attribute has, an int or "
                "a tuple of ints."
            )
        values, bounds, _ = current_attributes() or (None, None, True)
        return check_attributes(x, x.shape[0], values, bounds, list(sizes), unknown)

    @property
    def routings(self) -> list[Routing]:
        """What every DMoE call inside the scope routed, in call order; none with record=False."""
        return [call.routed for call in calls_in_order(self._last_call)]

    def load_balancing_loss(self, *, per_attribute: bool = False) -> Tensor:
        """Mean over the calls of :func:`load_balancing_loss`; 0 if there was no call.

        With ``per_attribute`` each call's is the mean over the attribute values present.

        Raises:
            RuntimeError: the scope keeps no record.
        """
        return self._mean(load_balancing_loss, per_attribute=per_attribute)

    def importance_loss(self) -> Tensor:
        """Mean over the calls of :func:`importance_loss`; 0 if there was no call.

        Raises:
            RuntimeError: the scope keeps no record.
        """
        return self._mean(importance_loss)

    def router_z_loss(self) -> Tensor:
        """Mean over the calls of :func:`router_z_loss`; 0 if there was no call.

        Raises:
            RuntimeError: the scope keeps no record.
        """
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
            RuntimeError: the scope keeps no record.
        """
        self._require_record("load_table")
        return load_table(calls_in_order(self._last_call), per_call, attribute)

    def _require_record(self, reader: str) -> None:
        if not self._records:
            raise RuntimeError(
                f"{reader}: this scope was opened with record=False and has kept no routing; open "
                "it with `routing(attributes)` to have a record."
            )

    def _mean(self, loss_of: Callable[..., Tensor], **options: Any) -> Tensor:
        self._require_record(loss_of.__name__)
        losses = [loss_of(routed, **options) for routed in self.routings]
        if not losses:
            return torch.zeros(())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def current_attributes() -> Attributes | None:
    """The attributes of this thread's open scope, if it has any.

    Raises:
        RuntimeError: a program is being captured, and the scope is none of its own.
    """
    return None if _current.scope is None else _readable(_current.scope)


def _readable(scope: routing) -> Attributes | None:
    if scope._attributes is not None and program_capture() is not scope._made_in_capture:
        _refuse_to_freeze()
    return scope._attributes


@constant_for_dynamo  # which buries the text of an error that it has traced
def _refuse_to_freeze() -> None:
    raise RuntimeError(
        "routing: a program is being captured (by torch.export, torch.jit.trace, make_fx or "
        "torch.onnx), and reads the attributes of a scope that was opened outside of it. They "
        "would be frozen into the program, which would route everybody's samples by them. Make "
        "them an input of it: pass `layer(x, attributes=...)`, or capture, outside of any scope, a "
        "module that opens the scope itself:\n"
        "    def forward(self, x, attributes):\n"
        "        with routing(attributes):\n"
        "            return self.model(x)"
    )


def records() -> bool:
    """Whether this thread's open scope keeps a record of a call that is made now.

    Neither a recompute nor a call that is being captured is one of the scope around it.
    """
    scope = _current.scope
    if scope is None or not scope._records:
        return False
    return _pass_now() == scope._opened_in_pass and program_capture() is scope._made_in_capture


def record(routed: Routing, sizes: tuple[int, ...] | None) -> None:
    """Adds a call to this thread's open scope, if it keeps a record."""
    scope = _current.scope
    if scope is not None and records():
        scope._last_call = Recorded(routed, sizes, scope._last_call)


def _pass_now() -> int:
    """Which backward pass this thread is at work in, -1 if none.

    A call during another pass than that in which its scope was opened is a recompute of
    activation checkpointing. A compiled graph holds its recomputes itself.
    """
    return -1 if torch.compiler.is_compiling() else backward_pass()


def _without_record(scope: routing | None) -> routing | None:
    """A scope of the same attributes whose record nobody reads.

    It records if the other does: a compiled block reads that, and shall be recomputed by the
    graph that has computed it.
    """
    if scope is None:
        return None
    twin = routing(record=scope._records)
    twin._attributes, twin._made_in_capture = scope._attributes, scope._made_in_capture
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
        return _Carried(scope), _Carried(_without_record(scope))

    @functools.wraps(fn)
    def carried(*args: Any, **kwargs: Any) -> Any:
        first = scope is None or _pass_now() == scope._opened_in_pass
        with _Carried(scope if first else _without_record(scope)):
            return fn(*args, **kwargs)

    return carried
