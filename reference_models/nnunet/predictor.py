"""nnU-Net's predictor, which gives the routers the attributes of each case."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import get_identifiers_from_splitted_dataset_folder

from dmoe_layer import routing

from ..data.case_attributes import CaseAttributes
from ..errors import DataError
from .trainer import PLANS_KEY


class DMoEPredictor(nnUNetPredictor):
    """Predicts a folder of images with their attributes.

    Args:
        csv: the csv with the attributes; None: the attributes.csv beside the folder.
        options, more: arguments of nnU-Net's predictor.
    """

    def __init__(self, *options: Any, csv: Path | None = None, **more: Any) -> None:
        super().__init__(*options, **more)
        self.csv = csv

    @functools.wraps(nnUNetPredictor.predict_from_files)  # nnU-Net reads the signature
    def predict_from_files(self, images: str, *options: Any, **more: Any) -> Any:
        known = self.plans_manager.plans.get(PLANS_KEY)
        if known is None:
            raise DataError("This model receives no attributes; predict by nnUNetv2_predict.")
        ending = self.dataset_json["file_ending"]
        case_ids = [*get_identifiers_from_splitted_dataset_folder(images, ending)]
        csv = self.csv or Path(images).resolve().parent / "attributes.csv"
        self.attributes = CaseAttributes.read(csv, case_ids, known=known)
        self.attributes.of(case_ids)
        return super().predict_from_files(images, *options, **more)

    def predict_from_files_sequential(self, *_: Any, **__: Any) -> Any:
        raise DataError("This command needs processes to read and write files; add -npp 1 -nps 1.")

    def predict_from_data_iterator(self, data_iterator: Any, *options: Any, **more: Any) -> Any:
        with contextlib.ExitStack() as scope:

            def with_attributes() -> Iterator[dict[str, Any]]:
                for item in data_iterator:
                    scope.close()  # the scope of the previous case
                    values = self.attributes.of([Path(item["ofile"]).name])
                    scope.enter_context(routing(values, record=False))
                    yield item

            return super().predict_from_data_iterator(with_attributes(), *options, **more)
