"""The attributes of nnU-Net's cases by their ids, as its trainer and predictor ask for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError, report_faults, shown
from .attributes_csv import read_attributes
from .cases import UNKNOWN, Attribute
from .table import nfc


@dataclass(frozen=True)
class CaseAttributes:
    """The csv at `path`: the attributes' values by name, and the indices of each case's values."""

    path: Path
    values: dict[str, list[str]]
    rows: dict[str, tuple[int, ...]]

    @classmethod
    def read(
        cls,
        path: Path,
        case_ids: Collection[str],
        columns: tuple[str, ...] = (),
        known: Mapping[str, Sequence[str]] | None = None,
    ) -> CaseAttributes:
        """Reads the columns (the first, unless some are named), or the `values` known to a model.

        Raises:
            DataError: the csv is not readable; a case has no row, or two, or a value not known.
        """
        faults: list[DataError] = []
        told = [Attribute(name, tuple(values)) for name, values in (known or {}).items()]
        id_of = {nfc(case_id): case_id for case_id in case_ids}
        names = columns or tuple(attribute.name for attribute in told)
        # Of other cases too: one csv tells of those to train on and those to predict.
        found, records = read_attributes(path, [*id_of], names, told, faults, [], others=True)
        report_faults(faults, None)
        rows = {id_of[name]: record.attributes for name, record in records.items()}
        return cls(path, {attribute.name: [*attribute.values] for attribute in found}, rows)

    def of(self, case_ids: Sequence[str]) -> Tensor:
        """The cases' values, int64 (cases, attributes); a DataError where one is unknown."""
        rows = [self.rows.get(case_id, (UNKNOWN,)) for case_id in case_ids]
        if lost := [name for name, row in zip(case_ids, rows, strict=True) if UNKNOWN in row]:
            raise DataError(
                f"{self.path}: an attribute is not known of {len(lost)} of {len(rows)} cases "
                f"({shown(lost)}), and there is no route for them. Fill it in, or leave them out: "
                "of splits_final.json in training, of the folder of images in prediction."
            )
        return torch.tensor(rows)

    def require_trained(self, train: Sequence[str]) -> None:
        """Raises a DataError unless each attribute's every value is that of a training case."""
        for place, (name, values) in enumerate(self.values.items()):
            seen = {self.rows[case_id][place] for case_id in train}
            if absent := [value for index, value in enumerate(values) if index not in seen]:
                raise DataError(
                    f"{self.path}: no training case of this fold has {name} {shown(absent)}, so "
                    "that its router would learn nothing. Write a splits_final.json in which every "
                    "fold trains on each value, or make larger groups of the values."
                )
