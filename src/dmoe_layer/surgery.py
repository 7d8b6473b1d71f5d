"""Adds an attribute value to the routers of a trained model, or removes one."""

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

__all__ = ["add_attribute_value", "remove_attribute_value"]


def add_attribute_value(
    model: nn.Module,
    attribute: int = 0,
    start: str | int = "mean",
    optimizer: Optimizer | None = None,
) -> int:
    """Adds a value to an attribute, such as a new hospital, in every router of a model.

    The new value is the last one: if the attribute had the values 0 .. 3, the new value is 4. It
    gets a router of its own, and shares the experts with the other values. The outputs for all old
    values stay the same to the bit. So do the gradients and the optimizer state of their routers.
    There is one exception: with ``unknown="average"``, the value -1 now also averages over the new
    router.

    **The optimizer.** The parameters stay the same objects and get one more row, so that an
    optimizer still holds them. An optimizer that has state, such as Adam after its first step, must
    be passed here. Otherwise its next step raises an error about shapes. Its state for the new
    value starts as ``start`` says, like the router itself. If Adam's running mean of squares
    started at zero, the first steps would be several times too long.

    **Other models.** Call this function for each copy of the model too, such as an averaged copy
    (EMA). If the rest of your code lists the attribute values, such as a configuration or a table
    of names, change that yourself.

    Args:
        model: A [`DMoE`][], an [`AttributeRouter`][], or any module that contains some. Those
            without ``attribute_sizes`` do not change. A layer that occurs in several places is
            changed once.
        attribute: The attribute that gets the value, counted from 0, if there are several.
        start: The weights with which the new router starts. "mean" takes the mean of the routers
            of that attribute. A number copies the router of that value. -1 copies the router of the
            unknown value, which exists with ``unknown="learned"``.
        optimizer: The optimizer that trains the model, or None.

    Returns:
        The new value.

    Raises:
        ValueError: No router uses attributes, the routers have different numbers of values, or
            the attribute or the start does not exist. A layer does not know its width yet. The
            parameters are sharded (FSDP) or parametrized, or a ``DistributedDataParallel`` wraps
            the model (pass ``ddp.module``, and wrap it again). The optimizer holds none of the
            routers' parameters, or its state has an unknown form. The model is not changed then.
        TypeError: An argument has the wrong type.

    Examples:
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
    """Removes a value of an attribute from every router of a model.

    **The higher values move down by one.** If you remove the value 1 of four, the old value 2
    becomes 1, and the old value 3 becomes 2. The function returns the new number of every value
    that stays. From then on the data must use the new numbers. An old 2 would go through the router
    of the old 3, and no error would show it.

    The outputs for all values that stay are the same to the bit, under their new numbers. So are
    the gradients and the optimizer state of their routers. With ``unknown="average"``, the value -1
    now averages over one router less. What [`add_attribute_value`][] says about the optimizer and
    about other models holds here too.

    Args:
        model: A [`DMoE`][], an [`AttributeRouter`][], or any module that contains some.
        value: The value to remove, 0 .. size - 1. The only value of an attribute cannot be removed.
        attribute: The attribute to which the value belongs, counted from 0.
        optimizer: The optimizer that trains the model, or None.

    Returns:
        A table from the old number of each value that stays to its new number.

    Raises:
        ValueError: The value does not exist or is the only one, or one of the reasons of
            [`add_attribute_value`][]. The model is not changed then.
        TypeError: An argument has the wrong type.

    Examples:
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
            f"value: got {value}, which is the only value of attribute {attribute}, but a router "
            "needs at least one. Make a layer without that attribute instead."
        )

    def without_value(table: Tensor, router: AttributeRouter) -> Tensor:
        at = _rows(router, attribute).first + value
        return torch.cat([table[:at], table[at + 1 :]])

    _change(found, without_value, without_value, optimizer)
    _resize(found, attribute, found.size - 1)
    stay = [old for old in range(found.size) if old != value]
    return {old: new for new, old in enumerate(stay)}


# By name, since the import of the second takes half a second, and other libraries use these names.
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel"}

# Edits a tensor that has a row for each row of a router's parameters.
_Edit = Callable[[Tensor, AttributeRouter], Tensor]


class _Found(NamedTuple):
    """The routers of a model that use attributes.

    Attributes:
        routers: The routers by name.
        layers: The layers that hold one of them.
        size: The number of values of the attribute.
    """

    routers: dict[str, AttributeRouter]
    layers: list[DMoE]
    size: int


class _Rows(NamedTuple):
    """The rows of an attribute in a router's table: those of its values, and of the unknown."""

    first: int
    end: int
    unknown: int


def _rows(router: AttributeRouter, attribute: int) -> _Rows:
    starts = (0, *itertools.accumulate(router.sizes or ()))
    return _Rows(starts[attribute], starts[attribute + 1], starts[-1] + attribute)


def _find(model: nn.Module, attribute: int) -> _Found:
    """Checks model and attribute, and returns the routers that get a value or lose one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module.")
    routers, layers = {}, []
    for name, module in model.named_modules():
        if wrapper := _WRAPPERS & {kind.__name__ for kind in type(module).__mro__}:
            raise ValueError(
                f"model: {name or 'it'} is a {wrapper.pop()}, which has stored the shapes of the "
                "parameters. Change the model before you wrap it. If it is a "
                "DistributedDataParallel, change the model inside, ddp.module, and wrap that again."
            )
        if isinstance(module, DMoE) and module.attribute_sizes is not None:
            if not isinstance(module.router, AttributeRouter):
                raise ValueError(
                    f"{name or 'model'}: the router is a {type(module.router).__name__}, expected "
                    "an AttributeRouter. Where another router stores its values is not known here."
                )
            layers.append(module)
        if isinstance(module, AttributeRouter) and module.sizes is not None:
            routers[name or "model"] = module
    if not routers:
        raise ValueError(
            f"model: {type(model).__name__} has no DMoE or AttributeRouter with attribute_sizes, "
            "so there is no attribute whose values could change."
        )
    if isinstance(attribute, bool) or not isinstance(attribute, int):
        raise TypeError(
            f"attribute: got {attribute!r} ({type(attribute).__name__}), expected an int."
        )
    for name, router in routers.items():
        attributes = len(router.sizes or ())
        if not 0 <= attribute < attributes:
            raise ValueError(
                f"attribute: got {attribute}, expected 0 .. {attributes - 1}, since {name} has "
                f"attribute_sizes={router.attribute_sizes}."
            )
        _check_parameters(name, router)
    sizes = {name: (router.sizes or ())[attribute] for name, router in routers.items()}
    if len({*sizes.values()}) > 1:
        seen = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ValueError(
            f"model: its routers have different numbers of values for attribute {attribute} "
            f"({seen}), so that one number would mean different values. Change them one by one."
        )
    return _Found(routers, layers, next(iter(sizes.values())))


def _check_parameters(name: str, router: AttributeRouter) -> None:
    """Raises unless the router's parameters are there, whole, and its own."""
    for each in ("w_A2ED", "bias"):
        parameter = router._parameters.get(each)
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name}: the layer does not know its width yet, so it has no routers to change. "
                "Run the model once on an example first, or make the layer with other "
                "attribute_sizes."
            )
        if parameter is None:
            raise ValueError(
                f"{name}.{each}: this is no parameter of the router itself. If it is parametrized "
                "or pruned, undo that first. If FSDP holds it, change the model before you wrap it."
            )
        width = parameter.shape[-1] if parameter.ndim else 0
        expected = router._shapes(width)[each]
        if type(parameter) is not nn.Parameter or tuple(parameter.shape) != expected:
            raise ValueError(
                f"{name}.{each}: got a {type(parameter).__name__} of shape "
                f"{tuple(parameter.shape)}, expected a whole Parameter of shape {expected}. If it "
                "is sharded (FSDP, tensor parallelism), change the model before you shard it."
            )


def _check_start(start: str | int, found: _Found) -> None:
    if start == "mean":
        return
    if isinstance(start, (bool, str)) or not isinstance(start, int):
        raise TypeError(
            f"start: got {start!r}, expected 'mean', or an int, the value whose router is copied."
        )
    if start == -1:
        for name, router in found.routers.items():
            if router.unknown != "learned":
                raise ValueError(
                    f"start: got -1, but {name} has unknown={router.unknown!r}. Only with "
                    "unknown='learned' does the unknown value have a router that can be copied."
                )
    elif not 0 <= start < found.size:
        raise ValueError(
            f"start: got {start}, expected 'mean' or 0 .. {found.size - 1}, the value whose router "
            "is copied."
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
    # All new tensors are made before the first one replaces an old one, since memory may run out.
    with torch.inference_mode(False), torch.no_grad():
        for parameter, router in owners.items():
            grad = None if parameter.grad is None else edit_gradient(parameter.grad, router)
            state = {key: edit(held, router) for key, held in states.get(parameter, {}).items()}
            edited.append((parameter, edit(parameter, router), grad, state))
    for parameter, table, grad, state in edited:
        parameter.grad = None
        # The dtype changes in between, which drops the autograd node of the parameter. That node
        # would expect gradients of the old shape, and the graph of an earlier loss keeps it alive.
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
            "optimizer: it holds no parameter of the model's routers. Pass the one that trains "
            "them, or None."
        )


def _states(parameter: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """The state that an optimizer has for each row of a parameter, by its name."""
    by_row = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue  # A number for the whole parameter, such as a count of steps.
        # Adafactor has sums over one of the last two axes, which then has the length 1.
        if value.ndim != parameter.ndim or value.shape[0] != parameter.shape[0]:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} has a state {key!r} of shape "
                f"{tuple(value.shape)} for a router's parameter of shape {tuple(parameter.shape)}, "
                "so which part belongs to which value is not known. Make a new optimizer instead."
            )
        by_row[key] = value
    return by_row


def _resize(found: _Found, attribute: int, size: int) -> None:
    """Updates the number of values in the routers and layers."""

    def resized(sizes: Any) -> Any:
        if isinstance(sizes, int):
            return size
        return (*sizes[:attribute], size, *sizes[attribute + 1 :])

    for layer in found.layers:
        layer.attribute_sizes = resized(layer.attribute_sizes)
    for router in found.routers.values():
        router.attribute_sizes = resized(router.attribute_sizes)
        router.sizes = resized(router.sizes)
