"""Reads and checks the attributes that a user passes, once, where they enter."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch_private import assert_in_program, exporting
from .checks import check_count
from .operators import undispatched

# What a layer can do with a sample whose attribute is not known.
UNKNOWN_POLICIES = ("error", "average", "learned")


class MissingAttributesError(ValueError):
    """A layer or router with ``attribute_sizes`` was called without attributes.

    Open ``with routing(attributes):`` around the model's forward pass, or pass the attributes,
    ``layer(x, attributes=...)``. There is no default value. A sample that went through the router
    of another value would get a wrong result, and nothing would show it. This error is a
    ``ValueError``.

    Examples:
        >>> import torch
        >>> from dmoe_layer import DMoE, MissingAttributesError
        >>> try:
        ...     DMoE(16, attribute_sizes=3)(torch.randn(2, 10, 16))
        ... except MissingAttributesError:
        ...     print("which attributes?")
        which attributes?
    """


class Attributes(NamedTuple):
    """Attributes on their way from a scope, or from an explicit call, to the check.

    ``bounds_2N`` holds the smallest and largest value of each attribute in CPU memory, so that a
    layer can check values on a GPU without waiting for it. A scope has computed the bounds. If they
    are None, as in an explicit call or while a program is exported, the check looks at the values.
    """

    values: Tensor
    bounds_2N: Tensor | None = None
    from_scope: bool = False


def as_attributes(attributes: Any) -> Attributes:
    """Converts what a user passes (a tensor, array, list or int) to a tensor, without a check."""
    if isinstance(attributes, Attributes):
        return attributes
    if not isinstance(attributes, Tensor):
        try:
            values = torch.as_tensor(attributes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"attributes: expected an integer tensor, got {type(attributes).__name__} "
                f"({attributes!r:.80}), which torch cannot read as one: {error}"
            ) from error
        # An empty list has no dtype of its own, and torch reads it as floats.
        return Attributes(values if values.numel() else values.to(torch.int64))
    return Attributes(attributes)


def checked_copy(attributes: Any) -> Attributes:
    """Returns a checked copy of the attributes, with their bounds, for a scope.

    A scope looks at the values only here. They are copied, because a data loader that reuses its
    buffers may write to the tensor while the scope is open. The bounds would then be wrong.

    Raises:
        TypeError: The attributes are not integers.
        ValueError: They have more than two dimensions, no column, or no values, because they are
            on the meta device.
    """
    values = as_attributes(attributes).values.detach()
    check_form(values)
    _refuse_meta(values)
    values = values.to(torch.int64, copy=True)
    bounds_2N = None if exporting() else torch.stack(_bounds(values)).to("cpu")
    return Attributes(values, bounds_2N, from_scope=True)


def as_sizes(sizes: Any) -> tuple[int, ...] | None:
    """Converts a user's ``attribute_sizes`` to a tuple with one size for each attribute."""
    if sizes is None:
        return None
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    if not sizes:
        raise ValueError("attribute_sizes: got no size, expected None, an int or a tuple of ints.")
    for size in sizes:
        check_count("attribute_sizes", size)
    return sizes


def per_token(values_BN: Tensor, n_tokens: int, tokens_per_sample_B: Tensor | None) -> Tensor:
    """The attributes of each token: (T,) for one attribute, (T, n) for several."""
    if tokens_per_sample_B is None:
        batch = values_BN.shape[0]
        tokens = n_tokens // max(batch, 1)
        values_TN = values_BN[:, None].expand(-1, tokens, -1).flatten(0, 1)
    else:
        values_TN = values_BN.repeat_interleave(tokens_per_sample_B, dim=0, output_size=n_tokens)
    return values_TN.squeeze(1) if values_TN.shape[1] == 1 else values_TN


def _columns(values: Tensor) -> Tensor:
    return values if values.ndim == 2 else values.reshape(-1, 1)


def _bounds(values: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each attribute, (n,) int64 each; 0 without samples."""
    values_BN = _columns(values).to(torch.int64)
    if values_BN.shape[0] == 0:
        values_BN = values_BN.new_zeros(1, values_BN.shape[1])
    low_N, high_N = torch.aminmax(values_BN, dim=0)
    return low_N, high_N


def _refuse_meta(values: Tensor) -> None:
    if values.device.type == "meta":
        raise ValueError(
            f"attributes: got shape {tuple(values.shape)} on the meta device, where tensors have "
            "no values, so that there is nothing to route by. Pass attributes that are on the CPU. "
            "x may be on any device."
        )


def check_form(values: Tensor) -> None:
    """Raises unless attributes are integers of shape (), (batch,), or (batch, n) with n >= 1."""
    shape = tuple(values.shape)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(
            f"attributes: expected integers, got {values.dtype} of shape {shape}. "
            "Attributes are class indices 0 .. size-1; convert them with .long()."
        )
    if values.ndim > 2 or (values.ndim == 2 and values.shape[1] == 0):
        raise ValueError(
            f"attributes: expected shape (batch,), or (batch, n) for n attributes, got {shape}."
        )


def check_attributes(
    x: Tensor,
    batch: int,
    attributes: Tensor | None,
    bounds_2N: Tensor | None,
    sizes: list[int] | None,
    unknown: str,
) -> Tensor:
    """Returns one row of attribute values for every sample, or raises.

    A program that is exported checks the values as it runs. In PyTorch a wrong value raises an
    error. In other runtimes it becomes ``NOWHERE``, an index out of range of every table.

    Args:
        x: Any tensor on the device on which the values are needed.
        batch: The number of samples.
        attributes: Integers of shape (), (batch,), (1,), (batch, n) or (1, n).
        bounds_2N: Their smallest and largest values, on the CPU. With None they are computed here,
            which waits for a GPU on which the attributes are.
        sizes: The number of values of each attribute. None accepts any value, because a plain
            mixture of experts only records the attributes of a scope. An empty list refuses all
            attributes, because a plain mixture of experts takes none in a call.
        unknown: What -1 means. "error" refuses it.

    Returns:
        (batch, n) int64 on the device of ``x``.
    """
    if exporting():
        return _check_in_program(x, batch, attributes, sizes, unknown)
    checked: Tensor = _check(x, batch, attributes, bounds_2N, sizes, unknown)
    return checked


# An operator and not plain Python, because a compiled graph must check too: there, an `if` on a
# tensor's value breaks the graph, and torch._assert_async is dropped by some backends. Its output
# feeds the router, so no compiler can drop it.
@torch.library.custom_op("dmoe_layer::check_attributes", mutates_args=())
def _check_attributes(
    x: Tensor,
    batch: int,
    attributes: Tensor | None,
    bounds_2N: Tensor | None,
    sizes: list[int] | None,
    unknown: str,
) -> Tensor:
    values_BN = _columns_of(x, batch, attributes, sizes)
    if bounds_2N is None:
        lows, highs = (bound_N.tolist() for bound_N in _bounds(values_BN))
    else:
        lows, highs = bounds_2N.tolist()
    _check_values(values_BN, lows, highs, sizes, unknown)
    # Copied, as a caller may write to its tensor before backward reads these.
    values_BN = values_BN.to(x.device, torch.int64, non_blocking=True, copy=True)
    if values_BN.shape[0] != batch:
        values_BN = values_BN.expand(batch, -1)
    return values_BN.contiguous()


@_check_attributes.register_fake
def _(x, batch, attributes, bounds_2N, sizes, unknown):  # type: ignore[no-untyped-def]
    # Returns the right shape even for wrong input: the real operator raises the error, at run time,
    # where it reaches the user unchanged. But PyTorch also runs this function instead of the real
    # one if any tensor is on meta. The values of x would then be routed by numbers that nobody set.
    if attributes is not None and x.device.type != "meta":
        _refuse_meta(attributes)
    n = len(sizes) if sizes else _columns(attributes).shape[1]
    return x.new_empty((batch, n), dtype=torch.int64)


_check = undispatched(_check_attributes)

# Takes the place of a wrong value. The rows of the attributes before it are added to it, and the
# sum still fits into 32 bits, in which some runtimes store indices.
NOWHERE = 2**30


def _check_in_program(
    x: Tensor, batch: int, attributes: Tensor | None, sizes: list[int] | None, unknown: str
) -> Tensor:
    values_BN = _columns_of(x, batch, attributes, sizes).to(x.device, torch.int64)
    values_BN = values_BN.expand(batch, values_BN.shape[1])
    if sizes is None:
        return values_BN
    lowest = 0 if unknown == "error" else -1
    columns = []
    for i, (values_B, size) in enumerate(zip(values_BN.unbind(dim=1), sizes, strict=True)):
        right_B = (values_B >= lowest) & (values_B < size)
        assert_in_program(
            right_B.all(),
            f"{_name(i, len(sizes))}: got a value out of range, expected {lowest} .. {size - 1} "
            f"(attribute_sizes={_show(sizes)}, unknown={unknown!r}).",
        )
        columns.append(torch.where(right_B, values_B, NOWHERE))
    return torch.stack(columns, dim=1)


def _columns_of(
    x: Tensor, batch: int, attributes: Tensor | None, sizes: list[int] | None
) -> Tensor:
    """Returns the attributes as (batch, n) or (1, n), whatever their values, or raises."""
    if attributes is None:
        raise MissingAttributesError(
            f"attributes: got none, but a layer with attribute_sizes={_show(sizes)} routes by "
            "attribute. Pass them, `layer(x, attributes=...)`, or open `with "
            "routing(attributes):` around the forward pass of the model."
        )
    if sizes == []:
        raise ValueError(
            f"attributes: got shape {tuple(attributes.shape)}, but a layer with "
            "attribute_sizes=None is a plain mixture of experts, which does not use attributes. "
            "Set attribute_sizes, or pass no attributes."
        )
    check_form(attributes)
    values_BN = _columns(attributes)
    (rows, columns), n = values_BN.shape, None if sizes is None else len(sizes)
    # Texts are made inside the branches, since torch.export fixes an open size that is printed.
    if n is not None and columns != n:
        raise ValueError(
            f"attributes: got shape {tuple(attributes.shape)}, which is {columns} per sample, but "
            f"attribute_sizes={_show(sizes)} needs {n} per sample. Expected the shape "
            f"{_show_shape(batch, n)}."
        )
    if rows != 1 and rows != batch:
        raise ValueError(
            f"attributes: got shape {tuple(attributes.shape)} for a batch of {batch} samples. "
            f"Expected {_show_shape(batch, columns)}, or a batch of 1 that applies to every sample."
            f"{_likely_cause(x, batch, values_BN)}"
        )
    return values_BN


def _likely_cause(x: Tensor, batch: int, values_BN: Tensor) -> str:
    """What may have caused a different number of rows and attributes, and what helps."""
    rows, cause = values_BN.shape[0], ""
    if rows > 1 and batch > rows and batch % rows == 0:
        each = batch // rows
        cause += (
            f" {batch} is {each} x {rows}: the model may have flattened its tokens, or put windows "
            f"of its images, into the batch axis before this layer, {each} rows per sample. Then "
            "pass the value of its sample for each row: routing(attributes.repeat_interleave("
            f"{each}, dim=0)), if the rows of a sample follow each other. For sliding windows, "
            "dmoe_layer.window_attributes finds the sample of each window."
        )
    if rows > 1 and x.ndim == 3 and x.shape[1] == rows:
        cause += (
            f" There are {rows} tokens, as many as attributes. If the model is sequence-first, "
            "(tokens, batch, dim), make the layer with DMoE(batch_dim=1)."
        )
    return cause


def _check_values(
    values_BN: Tensor,
    lows: list[int],
    highs: list[int],
    sizes: list[int] | None,
    unknown: str,
) -> None:
    lowest = 0 if unknown == "error" and sizes is not None else -1
    for column, (low, high) in enumerate(zip(lows, highs, strict=True)):
        highest = high if sizes is None else sizes[column] - 1
        if low >= lowest and high <= highest:
            continue
        wrong = high if high > highest else low
        sample = int((values_BN[:, column] == wrong).nonzero()[0])
        name = _name(column, len(lows))
        expected = "-1 or more" if sizes is None else f"{lowest} .. {highest}"
        meaning = (
            f" {wrong} stands for an unknown value, which unknown='error' refuses. Choose "
            "unknown='average' or unknown='learned' to allow it."
            if wrong == -1
            else ""
        )
        raise ValueError(
            f"{name}: got {wrong} (sample {sample}), expected {expected} "
            f"(attribute_sizes={_show(sizes)}, unknown={unknown!r}).{meaning}"
        )


def _show_shape(batch: int, n: int) -> str:
    return f"({batch},)" if n == 1 else f"({batch}, {n})"


def _name(column: int, n: int) -> str:
    return "attributes" if n == 1 else f"attributes[:, {column}]"


def _show(sizes: list[int] | None) -> str:
    if sizes is None:
        return "None"
    return str(sizes[0] if len(sizes) == 1 else tuple(sizes))
