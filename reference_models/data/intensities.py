"""Scales a channel's intensities as the network is to see them, by the channel's name.

The names are nnU-Net's, in upper or lower case: "CT" is clipped to a window and scaled to 0..1,
"noNorm" stays as it is, "rescale_to_0_1" is scaled by its own range, "rgb_to_0_1" divided by 255,
and all others, such as MR, are brought to mean 0 and variance 1 of what is not 0.

Shapes: S spatial axes.
"""

from __future__ import annotations

import numpy as np

from ..errors import DataError

CT_WINDOW = (-175.0, 250.0)  # Hounsfield units: soft tissue


def scale(
    channel: str, path: str, values_S: np.ndarray, ct_window: tuple[float, float]
) -> np.ndarray:
    """Scales float32 intensities in place, and returns them.

    Args:
        channel: its name.
        path: of the file that they are from.
        values_S: changed.
        ct_window: a lower and a higher number of Hounsfield units.

    Raises:
        DataError: they are no colour, as the channel's name says.
    """
    kind = channel.lower()
    low, high = 0.0, 1.0
    if kind == "ct":
        low, high = ct_window
        np.clip(values_S, low, high, out=values_S)
    elif kind == "rescale_to_0_1":
        low, high = float(values_S.min()), float(values_S.max())
    elif kind == "rgb_to_0_1":
        if not 0 <= values_S.min() <= values_S.max() <= 255:
            raise DataError(
                f"{path}: channel {channel} must be 0 to 255, got {values_S.min():g} to "
                f"{values_S.max():g}; correct the file, or the channel's name in dataset.json"
            )
        high = 255.0
    elif kind != "nonorm":
        inside = values_S[values_S != 0]
        if inside.size:
            low = float(inside.mean(dtype=np.float64))
            high = low + float(inside.std(dtype=np.float64))
    values_S -= low
    values_S /= high - low or 1.0  # of an image of one intensity
    return values_S


def describe_scale(channel: str, ct_window: tuple[float, float]) -> str:
    """Says what `scale` does to a channel.

    Example:
        >>> describe_scale("rgb_to_0_1", CT_WINDOW)
        'divided by 255'
    """
    low, high = ct_window
    return {
        "ct": f"clipped to {low:g} .. {high:g} HU, then scaled to 0 .. 1",
        "nonorm": "left as it is",
        "rescale_to_0_1": "scaled to 0 .. 1 by its own range",
        "rgb_to_0_1": "divided by 255",
    }.get(channel.lower(), "brought to mean 0 and variance 1 of what is not 0")
