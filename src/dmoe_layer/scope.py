"""The scope: gives attributes to every DMoE of a model, and collects their routings."""

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
    """The open scope of each thread, since two threads may use one model at the same time."""

    # Set in every thread's own instance: torch.compile does not guard on a class's default.
    def __init__(self) -> None:
        self.scope: routing | None = None


_current = _Current()


class routing:
    """A scope around a model's forward pass, for a ``with`` statement.

    Every [`DMoE`][] that runs inside the scope reads its attributes from there, so that the model's
    own ``forward`` needs no new argument. The scope records the routing of each of these calls. It
    then gives the balance losses and the table of the experts' loads.

    - Scopes may be nested: an inner scope hides the attributes and the record of the outer one.
    - A scope belongs to the thread that opened it.
    - A record holds on to the autograd graph of its calls. Delete the scope after the training
      step, and use ``torch.no_grad()`` in evaluation.
    - ``torch.compile`` works with any scope. A program that ``torch.export``, ``torch.jit.trace``
      or ``make_fx`` captures must open its scope itself, and take the attributes as an input.
      Attributes of a scope around the capture would become constants of the program, so the layer
      refuses them.

    Args:
        attributes: The samples' attribute values: integers of shape (batch,), or (batch, n) for n
            attributes. A scalar or a batch of 1 applies to every sample. -1 means unknown. They
            are copied when the scope opens. If they are on a GPU, the program waits for it once,
            here. With None the scope only records.
        record: Whether the scope records. With False, a call's routing is freed when the call
            returns, which saves memory in prediction. Such a scope has no losses and no load table.

    Raises:
        TypeError: The attributes are not integers, or ``record`` is not a bool.
        ValueError: The attributes have more than 2 dimensions, or are on the meta device, where
            tensors have no values.
        RuntimeError: The scope is already open. Inside the scope, a layer raises this error if a
            program that is being captured would read its attributes.

    Examples:
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
        # The capture in which the scope was made, since its attributes were copied then.
        self._made_in_capture = program_capture()

    def __enter__(self) -> routing:
        if self._is_open:
            raise RuntimeError("routing: this scope is already open. Make a new one.")
        self._opened_in_pass = _pass_now()
        self._is_open = True
        self._outer, _current.scope = _current.scope, self
        return self

    def __exit__(self, *error: Any) -> None:
        _current.scope, self._outer = self._outer, None
        self._is_open = False

    @property
    def attributes(self) -> Tensor | None:
        """A copy of the attributes as int64, in the shape in which they were given, or None."""
        readable = _readable(self)
        return None if readable is None else readable.values.clone()

    @staticmethod
    def attribute_values(
        x: Tensor, attribute_sizes: int | tuple[int, ...], *, unknown: str = "error"
    ) -> Tensor:
        """Returns the attributes of the open scope, one row for each sample of ``x``.

        It is for modules of your own that need the attributes too, such as FiLM (feature-wise
        linear modulation, which scales and shifts features by the attribute). So a model receives
        its attributes in one place. The values are checked as [`DMoE`][] checks them.

        Args:
            x: A tensor (batch, ...) on the device on which the values are needed.
            attribute_sizes: The number of values of each attribute, as in [`DMoE`][].
            unknown: "error" raises an error for the value -1. With "average" or "learned" the
                value is returned as -1.

        Returns:
            The values, (batch, n) int64 for n attributes.

        Raises:
            MissingAttributesError: No scope with attributes is open.
            ValueError: An attribute value is out of range, the number of samples does not fit, or
                x has no batch axis.
            TypeError: x is no tensor, or ``attribute_sizes`` is None.

        Examples:
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
            raise ValueError(f"x: got {describe(x)}, expected (batch, ...), a row for each sample.")
        sizes = as_sizes(attribute_sizes)
        if sizes is None:
            raise TypeError(
                "attribute_sizes: got None, expected the number of values of each attribute, an "
                "int or a tuple of ints."
            )
        values, bounds, _ = current_attributes() or (None, None, True)
        return check_attributes(x, x.shape[0], values, bounds, list(sizes), unknown)

    @property
    def routings(self) -> list[Routing]:
        """The [`Routing`][] of every DMoE call inside the scope, in call order."""
        return [call.routed for call in calls_in_order(self._last_call)]

    def load_balancing_loss(self, *, per_attribute: bool = False) -> Tensor:
        """The mean of [`load_balancing_loss`][dmoe_layer.load_balancing_loss] over all calls.

        Args:
            per_attribute: Whether the loss of a call is the unweighted mean over the attribute
                values that are present.

        Returns:
            A scalar. It is 0 if there was no call.

        Raises:
            ValueError: ``per_attribute`` is set, but a call had no attributes.
            RuntimeError: The scope was opened with ``record=False``.
        """
        return self._mean(load_balancing_loss, per_attribute=per_attribute)

    def importance_loss(self) -> Tensor:
        """The mean of [`importance_loss`][dmoe_layer.importance_loss] over all calls.

        Returns:
            A scalar. It is 0 if there was no call.

        Raises:
            RuntimeError: The scope was opened with ``record=False``.
        """
        return self._mean(importance_loss)

    def router_z_loss(self) -> Tensor:
        """The mean of [`router_z_loss`][dmoe_layer.router_z_loss] over all calls.

        Returns:
            A scalar. It is 0 if there was no call.

        Raises:
            RuntimeError: The scope was opened with ``record=False``.
        """
        return self._mean(router_z_loss)

    def load_table(self, *, per_call: bool = False, attribute: int = 0) -> Tensor:
        """The experts' loads: how the tokens of each attribute value were shared among the experts.

        Each token counts k times, once for each of its experts. Row a of the table belongs to the
        value a and sums to 1. It is all 0 if no token has the value a. Unknown tokens (-1) count in
        no row. If no call had attributes, the table has one row for all tokens. If only some calls
        had attributes, the others count in no row.

        Args:
            per_call: Whether to return one table for each call, instead of one table for all.
            attribute: The attribute to look at, counted from 0, if there are several.

        Returns:
            The table for A values and E experts, (A, E) fp32, or (calls, A, E) with ``per_call``.

        Raises:
            ValueError: There was no call, the calls have different numbers of experts, or there
                is no such attribute.
            RuntimeError: The scope was opened with ``record=False``.
        """
        self._require_record("load_table")
        return load_table(calls_in_order(self._last_call), per_call, attribute)

    def _require_record(self, reader: str) -> None:
        if not self._records:
            raise RuntimeError(
                f"{reader}: this scope was opened with record=False, so that it recorded no "
                "routing. Open it with `routing(attributes)` instead."
            )

    def _mean(self, loss_of: Callable[..., Tensor], **options: Any) -> Tensor:
        self._require_record(loss_of.__name__)
        losses = [loss_of(routed, **options) for routed in self.routings]
        if not losses:
            return torch.zeros(())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def current_attributes() -> Attributes | None:
    """Returns the attributes of this thread's open scope, if it has any.

    Raises:
        RuntimeError: A program is being captured, and it did not open the scope itself.
    """
    return None if _current.scope is None else _readable(_current.scope)


def _readable(scope: routing) -> Attributes | None:
    if scope._attributes is not None and program_capture() is not scope._made_in_capture:
        _refuse_to_freeze()
    return scope._attributes


@constant_for_dynamo  # since Dynamo hides the text of an error that it has traced
def _refuse_to_freeze() -> None:
    raise RuntimeError(
        "routing: a program is being captured (by torch.export, torch.jit.trace, make_fx or "
        "torch.onnx), and it reads the attributes of a scope that was opened outside of it. They "
        "would become constants of the program, which would then route every sample by them. Make "
        "the attributes an input of the program: pass `layer(x, attributes=...)`, or capture, "
        "outside of any scope, a module that opens the scope itself:\n"
        "    def forward(self, x, attributes):\n"
        "        with routing(attributes):\n"
        "            return self.model(x)"
    )


def records() -> bool:
    """Whether this thread's open scope records a call that is made now.

    It does not record a recompute, nor a call that is being captured inside the scope.
    """
    scope = _current.scope
    if scope is None or not scope._records:
        return False
    return _pass_now() == scope._opened_in_pass and program_capture() is scope._made_in_capture


def record(routed: Routing, sizes: tuple[int, ...] | None) -> None:
    """Adds a call to this thread's open scope, if the scope records it."""
    scope = _current.scope
    if scope is not None and records():
        scope._last_call = Recorded(routed, sizes, scope._last_call)


def _pass_now() -> int:
    """The number of the backward pass in which this thread is at work, -1 outside of one.

    A scope is opened during some pass, or outside of all. A call during another one is a recompute
    of activation checkpointing. A compiled graph contains its recomputes itself.
    """
    return -1 if torch.compiler.is_compiling() else backward_pass()


def _without_record(scope: routing | None) -> routing | None:
    """A scope with the same attributes, whose record nobody reads.

    It records if the other scope does. A compiled block depends on that, and the graph that
    computed a block must also recompute it.
    """
    if scope is None:
        return None
    twin = routing(record=scope._records)
    twin._attributes, twin._made_in_capture = scope._attributes, scope._made_in_capture
    return twin


class _Carried(AbstractContextManager[None]):
    """Opens a scope (or the lack of one) again; it may be entered many times."""

    def __init__(self, scope: routing | None) -> None:
        self.scope = scope
        self.hidden: list[routing | None] = []

    def __enter__(self) -> None:
        self.hidden.append(_current.scope)
        _current.scope = self.scope

    def __exit__(self, *error: Any) -> None:
        _current.scope = self.hidden.pop()


def carry_routing(fn: Callable[..., Any] | None = None) -> Any:
    """Makes a function safe for activation checkpointing: a recompute finds the right attributes.

    Activation checkpointing calls a block a second time, during backward. By then the
    [`routing`][] scope may have closed, another scope may be open, or another thread may be at
    work. The function that ``carry_routing`` returns uses the scope that is open now, whenever it
    runs. A recompute reads the attributes of the first call, and records nothing.

    Use it with ``use_reentrant=False``. The reentrant variant runs the first call without autograd,
    so that the balance losses of that call would have no gradient.

    Args:
        fn: The function or module that the checkpoint runs. Without it, ``carry_routing`` returns
            the pair of contexts that ``checkpoint(..., context_fn=carry_routing)`` needs.

    Returns:
        A function with the arguments and the result of ``fn``, or the pair of contexts.

    Examples:
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
