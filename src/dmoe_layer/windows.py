"""The attributes of windows that were cut from a batch of images."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .attributes import as_attributes, check_form
from .checks import describe


def window_attributes(attributes: Any, places: Sequence[Sequence[slice]]) -> Tensor:
    """Returns the attributes of each sliding window: those of the sample it was cut from.

    MONAI's ``sliding_window_inference`` calls a model with batches of windows. The windows of one
    call may come from several volumes, so the first window need not belong to the first volume. A
    [`routing`][] scope around the whole inference would give window i the attributes of sample i.
    No error would tell, if a call happens to have as many windows as there are samples. With
    ``with_coord=True`` MONAI also passes where each window lies, and this function finds the
    sample:

    ```python
    def predictor(windows, places):
        with routing(window_attributes(site, places), record=False):
            return model(windows)

    logits = sliding_window_inference(
        volumes, (96, 96, 96), 4, predictor, overlap=0.5, with_coord=True
    )
    ```

    Args:
        attributes: The attribute values of the volumes: integers of shape (batch,), or (batch, n)
            for n attributes. A scalar or a batch of 1 applies to every window.
        places: Where each window lies, as MONAI passes it to the predictor: a sequence of slices
            for each window. The first slice, ``slice(b, b + 1)``, says that the window belongs to
            the sample b. Call this function while the predictor runs, since MONAI may overwrite
            the slices afterwards.

    Returns:
        The attributes of the windows, (windows,), or (windows, n) if the attributes have two
            dimensions. They are on the device of the attributes.

    Raises:
        TypeError: The attributes are not integers, or the places are not such slices.
        ValueError: The attributes have more than two dimensions, or there is no row for the
            sample of a window.

    Examples:
        >>> import torch
        >>> from dmoe_layer import window_attributes
        >>> site = torch.tensor([2, 0])  # a batch of two volumes
        >>> places = [  # two windows of the first volume, one of the second
        ...     (slice(0, 1), slice(None), slice(0, 96), slice(0, 96), slice(0, 96)),
        ...     (slice(0, 1), slice(None), slice(48, 144), slice(0, 96), slice(0, 96)),
        ...     (slice(1, 2), slice(None), slice(0, 96), slice(0, 96), slice(0, 96)),
        ... ]
        >>> window_attributes(site, places)
        tensor([2, 2, 0])
    """
    values = as_attributes(attributes).values
    check_form(values)
    samples = [_sample_of(window, place) for window, place in enumerate(_sequence(places))]
    rows = values.reshape(1) if values.ndim == 0 else values
    if rows.shape[0] == 1:
        return rows[[0] * len(samples)]
    for window, sample in enumerate(samples):
        if sample >= rows.shape[0]:
            raise ValueError(
                f"attributes: got shape {tuple(values.shape)}, but window {window} was cut from "
                f"sample {sample}. Expected a row for each volume of the batch, or a batch of 1 "
                "that applies to all of them."
            )
    return rows[samples]


def _sequence(places: Any) -> Sequence[Any]:
    if isinstance(places, (str, Tensor)) or not isinstance(places, Sequence):
        raise TypeError(
            f"places: got {describe(places)}, expected a sequence of slices for each window, as "
            "sliding_window_inference(..., with_coord=True) passes them to its predictor."
        )
    return places


def _sample_of(window: int, place: Any) -> int:
    """The sample from which a window was cut, by the first of its slices."""
    first: Any = place[0] if isinstance(place, Sequence) and place else None
    try:  # its ends may be NumPy's integers
        start, stop = operator.index(first.start), operator.index(first.stop)
    except (AttributeError, TypeError):
        start = stop = -1
    if start < 0 or stop != start + 1:
        raise TypeError(
            f"places[{window}]: got {place!r:.120}, expected slices of which the first is that of "
            "the sample, slice(b, b + 1), as sliding_window_inference(..., with_coord=True) passes "
            "them to its predictor."
        )
    return start
