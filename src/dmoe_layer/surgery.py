"""Surgery: gives a trained model's routers one attribute value more, or one less."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from .layer import DMoE
from .router import AttributeRouter


def add_attribute_value(
    model: nn.Module,
    attribute: int = 0,
    start: str | int = "mean",
    optimizer: Optimizer | None = None,
) -> int:
    """Gives an attribute one value more, such as a new hospital, in every router of a model.

    The new value comes last: of an attribute with values 0 .. 3 it is 4. It has a router of its
    own and shares the experts. The outputs for all values that were there stay as they are, to the
    bit, and so do their routers' gradients and optimizer state. One thing moves: with
    ``unknown="average"`` the value -1 is the average over one value more.

    The parameters stay the same objects with one row more, so that every optimizer still holds
    them. But an optimizer that has state, such as Adam after its first step, must be given here, or
    its next step raises an error about shapes. Its state for the new value starts as the value
    itself does, by ``start``: a running mean of squares that began at zero would make the first
    steps several times too long.

    A change of one model is not a change of others: give an averaged copy (EMA) to a call of its
    own. What the model around the layers knows of its attributes, such as a configuration or a
    table of names, is the caller's to change.

    Args:
        model: a :class:`DMoE`, an :class:`AttributeRouter`, or any module that holds some. Those
            without ``attribute_sizes`` are left alone. A layer that stands in several places is
            changed once.
        attribute: which of several attributes gets the value, counted from 0.
        start: the router that the new value starts with: "mean", the mean of the attribute's
            routers; or a value, whose router it starts as a copy of. -1 copies the router of the
            unknown, which there is with ``unknown="learned"``.
        optimizer: that trains the model; or None.

    Returns:
        The new value.

    Raises:
        ValueError: if no router looks at attributes, if they have different numbers of values, if
            there is no such attribute or start, if a layer does not know its width yet, if
            parameters are sharded (FSDP) or parametrized, if a ``DistributedDataParallel`` is
            around the routers (give ``ddp.module``, and wrap it anew), or if the optimizer holds
            none of their parameters or keeps state of a form that is not known. Nothing is changed
            then.
        TypeError: for an argument of another kind.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> from dmoe_layer.surgery import add_attribute_value
        >>> layer, x = DMoE(16, attribute_sizes=3).eval(), torch.randn(2, 10, 16)
        >>> before = layer(x, [0, 2])
        >>> add_attribute_value(layer, start=2)
        3
        >>> torch.equal(layer(x, [0, 2]), before), torch.equal(layer(x, [0, 3]), before)
        (True, True)
    """
    found = _find(model, attribute)
    _check_start(start, found)

    def with_new(table: Tensor, router: AttributeRouter) -> Tensor:
        rows = _rows(router, attribute)
        if start == "mean":
            new = table[rows.first : rows.end].mean(dim=0)
        else:
            new = table[rows.unknown if start == -1 else rows.first + int(start)]
        return torch.cat([table[: rows.end], new[None], table[rows.end :]])

    def without_gradient(table: Tensor, router: AttributeRouter) -> Tensor:
        end = _rows(router, attribute).end
        return torch.cat([table[:end], torch.zeros_like(table[:1]), table[end:]])

    _change(found, with_new, without_gradient, optimizer)
    _resize(found, attribute, found.size + 1)
    return found.size


def remove_attribute_value(
    model: nn.Module,
    value: int,
    attribute: int = 0,
    optimizer: Optimizer | None = None,
) -> dict[int, int]:
    """Takes a value of an attribute out of every router of a model.

    **The values above it move down by one**: after value 1 of four has gone, what was 2 is 1 and
    what was 3 is 2. The returned table says so for every value that stays. Data must be told by the
    new numbers from then on: an old 2 would be taken for what was 3, and nothing could notice.

    For every value that stays, the output under its new number is what it was under the old one, to
    the bit, and its routers' gradients and optimizer state go with it. With ``unknown="average"``
    the value -1 is the average over one value less. What else is to be known is said in
    :func:`add_attribute_value`.

    Args:
        model: as of :func:`add_attribute_value`.
        value: that goes, 0 .. size - 1. The last one of an attribute cannot.
        attribute: which of several attributes it is a value of, counted from 0.
        optimizer: that trains the model; or None.

    Returns:
        The new number of each value that stays, by its old one.

    Raises:
        ValueError, TypeError: as of :func:`add_attribute_value`. Nothing is changed then.

    Example:
        >>> import torch
        >>> from dmoe_layer import DMoE
        >>> from dmoe_layer.surgery import remove_attribute_value
        >>> layer, x = DMoE(16, attribute_sizes=4).eval(), torch.randn(2, 10, 16)
        >>> before = layer(x, [0, 3])
        >>> moved = remove_attribute_value(layer, 1)
        >>> moved
        {0: 0, 2: 1, 3: 2}
        >>> torch.equal(layer(x, [moved[0], moved[3]]), before)
        True
    """
    found = _find(model, attribute)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"value: got {value!r} ({type(value).__name__}), expected an int.")
    if not 0 <= value < found.size:
        raise ValueError(
            f"value: got {value}, expected 0 .. {found.size - 1}, a value of attribute {attribute}."
        )
    if found.size == 1:
        raise ValueError(
            f"value: got {value}, the only value of attribute {attribute}, and a router needs one. "
            "Make a layer without that attribute instead."
        )

    def without_value(table: Tensor, router: AttributeRouter) -> Tensor:
        at = _rows(router, attribute).first + value
        return torch.cat([table[:at], table[at + 1 :]])

    _change(found, without_value, without_value, optimizer)
    _resize(found, attribute, found.size - 1)
    stay = [old for old in range(found.size) if old != value]
    return {old: new for new, old in enumerate(stay)}


# By name: to import the second takes half a second, and other libraries have some of these names.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}

# What is done with a tensor that has a row for each of a router's rows.
_Edit = Callable[[Tensor, AttributeRouter], Tensor]


class _Found(NamedTuple):
    """The routers of a model that look at attributes.

    Attributes:
        routers: by name.
        layers: those that hold one of them.
        size: how many values the attribute has.
    """

    routers: dict[str, AttributeRouter]
    layers: list[DMoE]
    size: int


class _Rows(NamedTuple):
    """Where an attribute's rows stand in a router's table: its values', and its unknown's."""

    first: int
    end: int
    unknown: int


def _rows(router: AttributeRouter, attribute: int) -> _Rows:
    starts = (0, *itertools.accumulate(router.sizes or ()))
    return _Rows(starts[attribute], starts[attribute + 1], starts[-1] + attribute)


def _find(model: nn.Module, attribute: int) -> _Found:
    """The routers that get a value or lose one, once nothing is wrong with model and attribute."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    routers, layers = {}, []
    for name, module in model.named_modules():
        if wrapper := _WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            raise ValueError(
                f"model: {name or 'it'} is a {wrapper.pop()}, which has taken stock of the "
                "parameters. Change the model before it is wrapped; of a DistributedDataParallel, "
                "change what is inside, ddp.module, and wrap that anew."
            )
        if isinstance(module, DMoE) and module.attribute_sizes is not None:
            if not isinstance(module.router, AttributeRouter):
                raise ValueError(
                    f"{name or 'model'}: its router is a {type(module.router).__name__}, expected "
                    "an AttributeRouter. How the values of another stand in it is not known here."
                )
            layers.append(module)
        if isinstance(module, AttributeRouter) and module.sizes is not None:
            routers[name or "model"] = module
    if not routers:
        raise ValueError(
            f"model: {type(model).__name__} has no DMoE or AttributeRouter with attribute_sizes, "
            "and so no value to add or to remove."
        )
    if isinstance(attribute, bool) or not isinstance(attribute, int):
        raise TypeError(
            f"attribute: got {attribute!r} ({type(attribute).__name__}), expected an int."
        )
    for name, router in routers.items():
        attributes = len(router.sizes or ())
        if not 0 <= attribute < attributes:
            raise ValueError(
                f"attribute: got {attribute}, expected 0 .. {attributes - 1}: {name} has "
                f"attribute_sizes={router.attribute_sizes}."
            )
        _check_parameters(name, router)
    sizes = {name: (router.sizes or ())[attribute] for name, router in routers.items()}
    if len({*sizes.values()}) > 1:
        seen = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ValueError(
            f"model: its routers have different numbers of values of attribute {attribute} "
            f"({seen}), so that one number would not name one value. Change them one by one."
        )
    return _Found(routers, layers, next(iter(sizes.values())))


def _check_parameters(name: str, router: AttributeRouter) -> None:
    """Raises unless the router's parameters are there, whole, and its own."""
    for each in ("w_A2ED", "bias"):
        parameter = router._parameters.get(each)
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name}: does not know its width yet, so there are no routers to keep. Run the "
                "model once on an example first, or make the layer with other attribute_sizes."
            )
        if parameter is None:
            raise ValueError(
                f"{name}.{each}: is no parameter of its own: parametrized or pruned (take that off "
                "first), or held by FSDP (change the model before it is wrapped)."
            )
        width = parameter.shape[-1] if parameter.ndim else 0
        expected = router._shapes(width)[each]
        if type(parameter) is not nn.Parameter or tuple(parameter.shape) != expected:
            raise ValueError(
                f"{name}.{each}: got a {type(parameter).__name__} of shape "
                f"{tuple(parameter.shape)}, expected a whole Parameter of shape {expected}. Of "
                "sharded parameters (FSDP, tensor parallelism) change the model before it is "
                "sharded."
            )


def _check_start(start: str | int, found: _Found) -> None:
    if start == "mean":
        return
    if isinstance(start, (bool, str)) or not isinstance(start, int):
        raise TypeError(f"start: got {start!r}, expected 'mean' or an int, a value to copy.")
    if start == -1:
        for name, router in found.routers.items():
            if router.unknown != "learned":
                raise ValueError(
                    f"start: got -1, but {name} has unknown={router.unknown!r}, expected "
                    "'learned', with which the unknown has a router to copy."
                )
    elif not 0 <= start < found.size:
        raise ValueError(
            f"start: got {start}, expected 'mean' or 0 .. {found.size - 1}, a value to copy."
        )


def _change(found: _Found, edit: _Edit, edit_gradient: _Edit, optimizer: Optimizer | None) -> None:
    """Edits all parameters, gradients and optimizer state, or none of them."""
    # Routers may share a parameter without being one module.
    owners = {p: router for router in found.routers.values() for p in (router.w_A2ED, router.bias)}
    states: dict[Tensor, dict[str, Tensor]] = {}
    if optimizer is not None:
        _check_optimizer(optimizer, owners)
        states = {parameter: _states(parameter, optimizer) for parameter in owners}
    edited = []
    # All are made before the first is put in place: memory may run out.
    with torch.inference_mode(False), torch.no_grad():
        for parameter, router in owners.items():
            grad = None if parameter.grad is None else edit_gradient(parameter.grad, router)
            state = {key: edit(held, router) for key, held in states.get(parameter, {}).items()}
            edited.append((parameter, edit(parameter, router), grad, state))
    for parameter, table, grad, state in edited:
        parameter.grad = None
        # Of another dtype in between: with it goes the autograd node that still expects gradients
        # of the old shape, and lives on in the graph of any earlier loss.
        other = torch.float32 if table.dtype == torch.float64 else torch.float64
        parameter.data = table.new_empty(0, dtype=other)
        parameter.data = table
        parameter.grad = grad
        if optimizer is not None and state:
            optimizer.state[parameter].update(state)


def _check_optimizer(optimizer: Optimizer, parameters: Collection[Tensor]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer."
        )
    if not any(p in parameters for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer: holds no parameter of the model's routers; give the one that trains them, "
            "or none."
        )


def _states(parameter: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps for each row of a parameter, by its name for it."""
    by_row = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue  # such as a count of steps
        # Adafactor's sums over rows or columns of the last two axes stand there with length 1.
        if value.ndim != parameter.ndim or value.shape[0] != parameter.shape[0]:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps {key!r} of shape "
                f"{tuple(value.shape)} for a router's parameter of shape {tuple(parameter.shape)}: "
                "which part is which value's cannot be told. Make a new optimizer instead."
            )
        by_row[key] = value
    return by_row


def _resize(found: _Found, attribute: int, size: int) -> None:
    """Tells routers and layers how many values the attribute has now."""

    def resized(sizes: Any) -> Any:
        if isinstance(sizes, int):
            return size
        return (*sizes[:attribute], size, *sizes[attribute + 1 :])

    for layer in found.layers:
        layer.attribute_sizes = resized(layer.attribute_sizes)
    for router in found.routers.values():
        router.attribute_sizes = resized(router.attribute_sizes)
        router.sizes = resized(router.sizes)
