"""Compares a file with its model: on every attribute value, other sizes, and wrong values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .example import Example


class OnnxCheck(NamedTuple):
    """The result of the check by [`export_onnx`][], which compares the file with the model.

    Attributes:
        largest_difference: The largest relative difference over all runs and outputs. For one
            output it is the largest |file - model|, divided by the largest |model|.
        runs: The number of inputs that were compared.
    """

    largest_difference: float
    runs: int


def _trials(example: Example, axes: list[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The inputs on which both the file and the model run."""
    yield example.x, example.attributes
    batch, rows = example.x.shape[0], example.rows()
    sizes, endless, done = cycle([1, batch + 1] if 0 in axes else [batch]), cycle(rows), 0
    # At least two, so that both sizes come.
    while done < max(len(rows), 2 if 0 in axes else 1):
        size = next(sizes)
        done += size
        yield example.batch(size, endless)
    for axis in axes:
        if axis != 0:
            yield torch.cat([example.x, example.x.flip(axis)], dim=axis), example.attributes


def check(
    written: Path, wrapped: nn.Module, example: Example, axes: list[int], tolerance: float
) -> OnnxCheck:
    import onnxruntime

    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 4  # It would log the runs that must fail.
    session = onnxruntime.InferenceSession(written, quiet, providers=["CPUExecutionProvider"])

    def run(x: Tensor, attributes: Tensor | None) -> list[np.ndarray]:
        inputs = {"image": x} if attributes is None else {"image": x, "attribute": attributes}
        return session.run(None, {name: t.cpu().numpy() for name, t in inputs.items()})

    largest, runs = 0.0, 0
    for x, attributes in _trials(example, axes):
        with torch.no_grad():
            true = wrapped(x, attributes)
        for found, expected in zip(run(x, attributes), true, strict=True):
            largest = max(largest, _difference(found, expected.cpu().numpy()))
        runs += 1
        if largest > tolerance:
            raise RuntimeError(
                f"export_onnx: the file differs from the model by {largest:.1e} of the largest "
                f"output, expected at most tolerance={tolerance}. It did so on x of shape "
                f"{tuple(x.shape)} with the attributes "
                f"{None if attributes is None else attributes.tolist()}. If two experts have "
                "nearly the same score, rounding decides to which one a token goes. Then a few "
                "outputs may differ although the file is right."
            )
    for wrong in _wrong_values(example):
        try:
            run(example.x, wrong)
        except Exception:
            continue
        raise RuntimeError(
            f"export_onnx: the file accepted the attributes {wrong.tolist()}, although the model "
            "refuses a value of the first sample."
        )
    return OnnxCheck(largest, runs)


def _wrong_values(example: Example) -> Iterator[Tensor]:
    attributes = example.attributes
    if attributes is None:
        return
    for column, size in enumerate(example.sizes):
        for wrong in (example.lowest - 1, size):
            values = attributes.clone().reshape(-1, len(example.sizes))
            values[0, column] = wrong
            yield values.reshape(attributes.shape)


def _difference(found: np.ndarray, true: np.ndarray) -> float:
    """The largest difference over the largest true value; infinite if only one has a NaN."""
    if found.shape != true.shape:
        return float("inf")
    if (np.isnan(found) != np.isnan(true)).any():
        return float("inf")
    both = np.isnan(true)
    difference = np.abs(np.where(both, 0, found - true)).max(initial=0.0)
    scale = np.abs(np.where(both, 0, true)).max(initial=0.0)
    return float(difference / scale) if scale else float(difference)
