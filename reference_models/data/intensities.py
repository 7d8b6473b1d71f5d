"""Scales a channel's intensities for the network, by the channel's name.

The names are nnU-Net's, in upper or lower case. "CT" is clipped to a window and scaled to 0..1.
"noNorm" is not changed. "rescale_to_0_1" is scaled by its own range. "rgb_to_0_1" is divided by
255. All others, such as MR, are brought to mean 0 and variance 1 over the pixels that are not 0.

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
        channel: the channel's name.
        path: the file of the intensities, for errors.
        values_S: the intensities, which are changed.
        ct_window: the lowest and the highest Hounsfield unit.

    Raises:
        DataError: the channel is named rgb_to_0_1, and intensities are not 0 to 255.
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
                f"{path}: expected intensities of 0 to 255 in channel {channel}, got "
                f"{values_S.min():g} to {values_S.max():g}; correct the file, or the channel's "
                "name in dataset.json"
            )
        high = 255.0
    elif kind != "nonorm":
        inside = values_S[values_S != 0]
        if inside.size:
            low = float(inside.mean(dtype=np.float64))
            high = low + float(inside.std(dtype=np.float64))
    values_S -= low
    values_S /= high - low or 1.0  # 1 if the image has a single intensity
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
        "nonorm": "not changed",
        "rescale_to_0_1": "scaled to 0 .. 1 by its own range",
        "rgb_to_0_1": "divided by 255",
    }.get(channel.lower(), "brought to mean 0 and variance 1 over the pixels that are not 0")
