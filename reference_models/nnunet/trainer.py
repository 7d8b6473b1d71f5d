"""nnU-Net's trainer with experts after the encoder's stages: dMoE, and two networks to compare."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from dmoe_layer import insert_after, routing

from ..data.case_attributes import CaseAttributes
from ..errors import DataError

PLANS_KEY = "dmoe"  # the key of the attributes in the plans, which are stored with the weights


class nnUNetTrainerPlainMoE(nnUNetTrainer):
    """A plain mixture of experts after each stage of the encoder; routers receive no attributes.

    To change a setting, write a subclass: nnU-Net names the folder of results after the class.
    """

    n_experts = 8
    k = 2  # number of experts for each voxel
    hidden = 4  # hidden units of an expert for each channel
    balance = 0.01  # weight of the load balancing loss, which is part of the logged training loss
    attributes: CaseAttributes | None = None
    step: routing | None = None  # the scope of the current training step

    @classmethod
    def build_network_architecture(cls, plans_manager: Any, *rest: Any, **more: Any) -> nn.Module:
        network: Any = super().build_network_architecture(plans_manager, *rest, **more)
        values = plans_manager.plans.get(PLANS_KEY)
        sizes = values and tuple(len(names) for names in values.values())
        for stage, width in enumerate(network.encoder.output_channels):
            options = {"n_experts": cls.n_experts, "k": cls.k, "hidden_dim": cls.hidden * width}
            insert_after(network, f"encoder.stages.{stage}", attribute_sizes=sizes, **options)
        return network

    def scope(self, case_ids: Sequence[str], *, record: bool = False) -> routing:
        return routing(self.attributes and self.attributes.of(case_ids), record=record)

    def _build_loss(self) -> Callable[[Any, Any], Tensor]:
        loss = super()._build_loss()

        def balanced(output: Any, target: Any) -> Tensor:
            total: Tensor = loss(output, target)
            balance = self.balance * self.step.load_balancing_loss() if self.step else 0
            return total + balance

        return balanced

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        try:
            with self.scope(batch["keys"], record=True) as self.step:
                return super().train_step(batch)
        finally:
            self.step = None  # releases the step's graph

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        with self.scope(batch["keys"]):
            return super().validation_step(batch)


class nnUNetTrainerDense(nnUNetTrainerPlainMoE):
    """A dense network to compare with: one MLP after each stage, as wide as a voxel's experts."""

    n_experts = k = 1
    hidden = nnUNetTrainerPlainMoE.k * nnUNetTrainerPlainMoE.hidden


class nnUNetTrainerDMoE(nnUNetTrainerPlainMoE):
    """dMoE: the routers receive each case's attributes from the attributes.csv beside dataset.json.

    The csv is searched in the preprocessed folder first, then in the raw folder. The names and
    values of the attributes are stored in the plans, where the predictor finds them.
    """

    columns: tuple[str, ...] = ()  # columns of the csv that are attributes; empty: the first
    attributes: CaseAttributes

    def initialize(self) -> None:
        csv = Path(self.preprocessed_dataset_folder_base, "attributes.csv")
        if not csv.exists() and nnUNet_raw.is_set():
            csv = Path(nnUNet_raw, self.plans_manager.dataset_name, "attributes.csv")
        folder = self.preprocessed_dataset_folder
        case_ids = infer_dataset_class(folder).get_identifiers(folder)
        self.attributes = CaseAttributes.read(csv, case_ids, self.columns)
        values = self.attributes.values
        # The first fold writes the plans, and the predictor reads them for all folds.
        plans = Path(self.output_folder_base, "plans.json")
        begun = json.loads(plans.read_bytes())[PLANS_KEY] if plans.exists() else values
        if [*begun.items()] != [*values.items()]:
            raise DataError(
                f"{csv}: the attributes are {values}, but {plans.parent} was begun with {begun}. "
                "Restore the csv, or move that folder away to start over."
            )
        self.plans_manager.plans[PLANS_KEY] = values
        super().initialize()

    def do_split(self) -> tuple[list[str], list[str]]:
        train, validation = super().do_split()
        self.attributes.of([*train, *validation])
        self.attributes.require_trained(train)
        return train, validation

    def perform_actual_validation(self, *options: Any, **more: Any) -> None:
        load_case = self.dataset_class.load_case
        with contextlib.ExitStack() as scope:

            def load_and_tell(dataset: Any, case_id: str) -> Any:
                scope.close()  # the scope of the previous case
                scope.enter_context(self.scope([case_id]))
                return load_case(dataset, case_id)

            with mock.patch.object(self.dataset_class, "load_case", load_and_tell):
                super().perform_actual_validation(*options, **more)
