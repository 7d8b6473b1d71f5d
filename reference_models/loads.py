"""Which experts each attribute value's tokens went to, added up over batches.

Shapes: B samples, A attributes, V values of an attribute, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from dmoe_layer import routing

from .data.cases import UNKNOWN, Dataset

LoadTables: TypeAlias = dict[str, tuple[tuple[float, ...], ...]]


class Loads:
    """Adds up which experts each attribute value's tokens went to."""

    def __init__(self, dataset: Dataset) -> None:
        self._names = [attribute.name for attribute in dataset.attributes]
        self._sizes = [len(attribute.values) for attribute in dataset.attributes]
        self._sums: dict[str, np.ndarray] = {}

    def add(self, scope: routing, told_BA: np.ndarray) -> None:
        """A batch's load tables; every sample has the same number of tokens, and weighs alike."""
        if not scope.routings:
            return
        for place, (name, size) in enumerate(zip(self._names, self._sizes, strict=True)):
            told_B = told_BA[:, place]
            if not (told_B != UNKNOWN).any():
                continue
            counts_V = np.bincount(told_B[told_B != UNKNOWN], minlength=size)
            # A layer that is not told the attributes has a row up to the highest it has seen.
            table_VE = scope.load_table(attribute=place).double().cpu().numpy()
            sums_VE = self._sums.setdefault(name, np.zeros((size, table_VE.shape[1])))
            sums_VE[: len(table_VE)] += table_VE * counts_V[: len(table_VE), None]

    @classmethod
    def together(cls, dataset: Dataset, parts: Iterable[Loads]) -> Loads:
        """Of all ranks."""
        loads = cls(dataset)
        for part in parts:
            for name, sums_VE in part._sums.items():
                loads._sums[name] = loads._sums.get(name, 0) + sums_VE
        return loads

    def tables(self) -> LoadTables:
        """By attribute, a row a value that sums to 1, or of zeros where no case has it."""
        return {
            name: tuple(
                map(tuple, (sums_VE / np.maximum(sums_VE.sum(1, keepdims=True), 1)).tolist())
            )
            for name, sums_VE in self._sums.items()
        }
