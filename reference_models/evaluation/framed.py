"""Reads cases as the network sees them, batch by batch, and hands on what is wrong with one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ..data.cases import Case, Dataset, Sample
from ..data.framing import Frame, Framing
from ..errors import DataError


class FramedCases(TorchDataset[Any]):
    """Each case at native resolution and as the network sees it, for a loader's workers."""

    def __init__(self, dataset: Dataset, cases: Sequence[Case], framing: Framing) -> None:
        self._dataset, self._cases, self._framing = dataset, cases, framing

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: int) -> tuple[Sample, Frame] | DataError:
        # An error is returned, since a worker would dress it in its traceback.
        try:
            sample = self._dataset.load(self._cases[index])
            # Its mask is scored at native resolution, and need not be framed.
            return sample, self._framing.apply(dataclasses.replace(sample, mask_S=None))
        except DataError as error:
            return error


def stacked(arrays: list[np.ndarray]) -> Tensor:
    """What the network sees of a batch, from what it sees of each sample."""
    # A volume stands alone, and is not copied.
    return torch.from_numpy(np.stack(arrays) if len(arrays) > 1 else arrays[0][None])


def unbroken(items: list[Any]) -> list[Any] | DataError:
    """A batch as it is, or the first error that stands in it."""
    for item in items:
        if isinstance(item, DataError):
            return item
    return items
