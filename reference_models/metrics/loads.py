"""Adds up over batches which experts each attribute value's tokens went to.

Shapes: T tokens, A attributes, V values of an attribute, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch

from dmoe_layer import routing

from ..data.cases import Dataset

LoadTables: TypeAlias = dict[str, tuple[tuple[float, ...], ...]]


class ExpertLoads:
    """Adds up which experts each attribute value's tokens went to."""

    def __init__(self, dataset: Dataset) -> None:
        self._names = [attribute.name for attribute in dataset.attributes]
        self._sizes = [len(attribute.values) for attribute in dataset.attributes]
        self._sums: dict[str, np.ndarray] = {}

    def add(self, scope: routing) -> None:
        """Adds the routings of a closed scope that was opened with attributes.

        Every token weighs alike: of volumes, a window with little of the body has few of them.
        """
        if not scope.routings:
            return
        values_T = torch.cat(
            [routed.attributes for routed in scope.routings if routed.attributes is not None]
        )
        values_TA = values_T[:, None] if values_T.ndim == 1 else values_T
        for place, (name, size) in enumerate(zip(self._names, self._sizes, strict=True)):
            # Place 0 takes the unknown, and is dropped.
            tokens_V = torch.bincount(values_TA[:, place] + 1, minlength=size + 1)[1:].cpu().numpy()
            if not tokens_V.any():
                continue
            # A layer that does not use attributes has rows up to the highest value it has seen.
            table_VE = scope.load_table(attribute=place).double().cpu().numpy()
            sums_VE = self._sums.setdefault(name, np.zeros((size, table_VE.shape[1])))
            sums_VE[: len(table_VE)] += table_VE * tokens_V[: len(table_VE), None]

    @classmethod
    def together(cls, dataset: Dataset, parts: Iterable[ExpertLoads]) -> ExpertLoads:
        """Adds up the loads of all ranks."""
        loads = cls(dataset)
        for part in parts:
            for name, sums_VE in part._sums.items():
                loads._sums[name] = loads._sums.get(name, 0) + sums_VE
        return loads

    def tables(self) -> LoadTables:
        """Gives each attribute's table: a row a value, which sums to 1, or to 0 without cases."""
        return {
            name: tuple(
                map(tuple, (sums_VE / np.maximum(sums_VE.sum(1, keepdims=True), 1)).tolist())
            )
            for name, sums_VE in self._sums.items()
        }
