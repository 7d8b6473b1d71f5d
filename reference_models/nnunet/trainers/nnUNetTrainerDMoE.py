"""Lets nnU-Net find the trainers: it imports the files of this folder by themselves."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3]))  # the folder of reference_models

from reference_models.nnunet import trainer

nnUNetTrainerDMoE = trainer.nnUNetTrainerDMoE
nnUNetTrainerPlainMoE = trainer.nnUNetTrainerPlainMoE
nnUNetTrainerDense = trainer.nnUNetTrainerDense
