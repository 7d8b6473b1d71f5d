"""Whose a window is: the attributes of windows that were cut from a batch of images."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .attributes import as_attributes, check_form
from .checks import describe


def window_attributes(attributes: Any, places: Sequence[Sequence[slice]]) -> Tensor:
    """One row of attributes for each window of a batch, that of the sample it was cut from.

    Sliding windows of a batch are no samples: MONAI's ``sliding_window_inference`` hands a model
    the first windows of the first volume, then further ones, and the windows of one call may be
    of several volumes. A scope opened around it would give each window the attributes of the
    sample at the window's place in the call, and where there happen to be as many windows as
    samples nothing would say so. With ``with_coord=True`` MONAI tells where each window lies::

        def predictor(windows, places):
            with routing(window_attributes(site, places), record=False):
                return model(windows)

        logits = sliding_window_inference(
            volumes, (96, 96, 96), 4, predictor, overlap=0.5, with_coord=True
        )

    Args:
        attributes: integers, (batch,), or (batch, n) for n attributes, of the volumes that the
            windows are cut from; a batch of 1 or a scalar applies to every window.
        places: where each window lies, as MONAI's ``with_coord=True`` says: a sequence of slices
            for each window, of which the first, ``slice(b, b + 1)``, names the sample b. They are
            to be read while the predictor runs; afterwards MONAI may write to them.

    Returns:
        (windows,), or (windows, n) where the attributes have two dimensions; on their device.

    Raises:
        TypeError: for attributes that are no integers, or places that are no such slices.
        ValueError: for attributes of more than two dimensions, or a window of a sample that has
            none.

    Example:
        >>> import torch
        >>> from dmoe_layer import window_attributes
        >>> site = torch.tensor([2, 0])  # of a batch of two volumes
        >>> places = [  # of three windows, two of the first volume and one of the second
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
                f"attributes: got shape {tuple(values.shape)}, but window {window} is of sample "
                f"{sample}: expected a row for each volume of the batch that the windows are cut "
                "from, or a batch of 1 that applies to all of them."
            )
    return rows[samples]


def _sequence(places: Any) -> Sequence[Any]:
    if isinstance(places, (str, Tensor)) or not isinstance(places, Sequence):
        raise TypeError(
            f"places: got {describe(places)}, expected a sequence of slices for each window, as "
            "sliding_window_inference(..., with_coord=True) hands them to its predictor."
        )
    return places


def _sample_of(window: int, place: Any) -> int:
    """The sample that a window was cut from, by the first of its slices."""
    first: Any = place[0] if isinstance(place, Sequence) and place else None
    try:  # its ends may be NumPy's integers
        start, stop = operator.index(first.start), operator.index(first.stop)
    except (AttributeError, TypeError):
        start = stop = -1
    if start < 0 or stop != start + 1:
        raise TypeError(
            f"places[{window}]: got {place!r:.120}, expected slices that begin with the sample's, "
            "slice(b, b + 1), as sliding_window_inference(..., with_coord=True) hands them to its "
            "predictor."
        )
    return start
