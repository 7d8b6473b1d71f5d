"""The attributes of nnU-Net's cases by case id, for nnU-Net's trainer and predictor."""

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
    """The attributes that a csv gives to cases.

    Args:
        path: the csv.
        values: the values of each attribute, by its name.
        rows: the indices of each case's values, by case id.
    """

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
        """Reads the attributes of cases from a csv, which may have rows of other cases too.

        Args:
            path: the csv.
            case_ids: the cases.
            columns: the attributes to read; empty: those in `known`, else the first column.
            known: the values of each attribute that a trained model knows.

        Raises:
            DataError: the csv cannot be read; a case has no row, two rows, or a value that is not
                in `known`.
        """
        faults: list[DataError] = []
        of_model = [Attribute(name, tuple(values)) for name, values in (known or {}).items()]
        id_of = {nfc(case_id): case_id for case_id in case_ids}
        names = columns or tuple(attribute.name for attribute in of_model)
        # One csv may have the rows of the cases to train on and of those to predict.
        found, records = read_attributes(path, [*id_of], names, of_model, faults, [], others=True)
        report_faults(faults, None)
        rows = {id_of[name]: record.attributes for name, record in records.items()}
        return cls(path, {attribute.name: [*attribute.values] for attribute in found}, rows)

    def of(self, case_ids: Sequence[str]) -> Tensor:
        """Gives the indices of the cases' values, int64 (cases, attributes).

        Raises:
            DataError: a case has an unknown value.
        """
        rows = [self.rows.get(case_id, (UNKNOWN,)) for case_id in case_ids]
        if lost := [name for name, row in zip(case_ids, rows, strict=True) if UNKNOWN in row]:
            raise DataError(
                f"{self.path}: {len(lost)} of {len(rows)} cases have an unknown attribute "
                f"({shown(lost)}), and there is no router for unknown values. Fill in the "
                "values. Or leave these cases out: before you train, remove them from "
                "splits_final.json; before you predict, remove their images from the folder."
            )
        return torch.tensor(rows)

    def require_trained(self, train: Sequence[str]) -> None:
        """Raises unless every value of every attribute has a training case.

        Raises:
            DataError: a value has none.
        """
        for place, (name, values) in enumerate(self.values.items()):
            seen = {self.rows[case_id][place] for case_id in train}
            if absent := [value for index, value in enumerate(values) if index not in seen]:
                raise DataError(
                    f"{self.path}: no training case of this fold has {name} {shown(absent)}, so "
                    "that its router would learn nothing. Write a splits_final.json in which every "
                    "fold trains on each value, or join values into larger groups."
                )
