"""Runs a file beside its model: every attribute value, other sizes, and what it must refuse."""

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
    """What :func:`export_onnx` found as it ran the file beside the model.

    Attributes:
        largest_difference: of all runs and outputs: the largest |file - model|, over the largest
            |model| of the same output and run.
        runs: how many inputs were compared.
    """

    largest_difference: float
    runs: int


def _trials(example: Example, axes: list[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What the file and the model are both run on."""
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
    quiet.log_severity_level = 4  # it writes of the runs that shall fail
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
                f"output, expected at most tolerance={tolerance}: on x {tuple(x.shape)} with "
                f"attributes {None if attributes is None else attributes.tolist()}. Where two "
                "experts score alike, rounding decides which a token goes to, and a few outputs "
                "may rightly differ."
            )
    for wrong in _wrong_values(example):
        try:
            run(example.x, wrong)
        except Exception:
            continue
        raise RuntimeError(
            f"export_onnx: the file took the attributes {wrong.tolist()}, of which the first "
            "sample has one that the model refuses."
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
    """The largest difference over the largest true value; without end where only one has a NaN."""
    if found.shape != true.shape:
        return float("inf")
    if (np.isnan(found) != np.isnan(true)).any():
        return float("inf")
    both = np.isnan(true)
    difference = np.abs(np.where(both, 0, found - true)).max(initial=0.0)
    scale = np.abs(np.where(both, 0, true)).max(initial=0.0)
    return float(difference / scale) if scale else float(difference)
