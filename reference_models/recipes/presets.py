"""Presets: complete recipes to start from. Each has an entry in `PRESETS` and `DESCRIPTIONS`."""

from __future__ import annotations

import dataclasses

from ..data import DataSettings
from .framings import ImageFramingSettings, VolumeFramingSettings
from .networks import ResUNet3DSettings, TransUNetSettings, UNetSettings
from .recipe import Recipe

# The paper's table of settings leaves open: the rate of the exponential decay (here 1 % is left in
# the last epoch), AdamW's weight decay and betas (here PyTorch's), warm-up (here none),
# augmentation (here the released code's), whether cross-entropy is the only loss (here it is) and
# how the best epoch is chosen (here on validation cases taken from the training split).
_PAPER = Recipe(data=DataSettings("fairseg"), leave_out_unknown=True, lambda_dice=0.0)

# Learning rate, epochs, batch, patch, early stopping and attribute are those of the paper's table;
# the network is the released code's. Neither names spacing, patience, overlap, augmentation and
# normalisation: these are ours, and so is what the comment above names for 2D.
_PAPER_3D = Recipe(
    data=DataSettings("folder"),
    model=ResUNet3DSettings(),
    framing=VolumeFramingSettings(),
    batch_size=4,
    epochs=100,
    leave_out_unknown=True,
    patience=20,
    learning_rate=5e-5,
    lambda_dice=0.0,
)

PRESETS: dict[str, Recipe] = {
    "paper": _PAPER,
    # The released code's learning rate is 0.01 times 42/24, which is 0.0175. Two differences
    # remain: its Dice loss pools the batch and squares the predictions in the denominator, where
    # MONAI's here is computed for each sample; and its poly schedule is one step behind.
    "released": dataclasses.replace(
        _PAPER,
        optimizer="sgd",
        learning_rate=0.0175,
        weight_decay=1e-4,
        schedule="poly",
        lambda_dice=0.5,
        lambda_ce=0.5,
    ),
    "small": Recipe(
        data=DataSettings("mni152"),
        model=TransUNetSettings(variant="small"),
        # All slices show one head in one pose: without shifts the network memorises them.
        framing=ImageFramingSettings(size=80, crop="whole", augment="shift"),
        batch_size=8,
        epochs=7,
        learning_rate=4e-3,
        schedule="cosine",
        warmup=0.1,
        balance_weight=0.01,
    ),
    # The demo trains this recipe with four networks. Its scores do not jump in the last epoch,
    # since a tissue looks the same in all slices, two stages see little more than a tissue's edge,
    # and the learning rate falls to zero.
    "demo": Recipe(
        data=DataSettings("mni152", mni152_normalised="head"),
        model=UNetSettings(widths=(12, 24)),
        framing=ImageFramingSettings(size=64, crop="whole", augment="shift"),
        batch_size=8,
        epochs=4,
        learning_rate=1e-2,
        schedule="cosine",
        warmup=0.1,
    ),
    # One training as the study makes many.
    "study": Recipe(
        data=DataSettings("phantom"),
        model=UNetSettings(),
        framing=ImageFramingSettings(size=64, crop="whole", augment="none"),
        batch_size=8,
        epochs=5,
        learning_rate=6e-3,
        schedule="cosine",
        warmup=0.1,
    ),
    "paper3d": _PAPER_3D,
    # The same steps in bfloat16, which take less memory.
    "paper3d-24gb": dataclasses.replace(_PAPER_3D, precision="bf16-mixed"),
    # For the folder that `example` writes. The patches are as thin as its blocks of a head, and
    # more epochs did not improve the score on its validation block.
    "small3d": dataclasses.replace(
        _PAPER_3D,
        model=ResUNet3DSettings(features=8),
        framing=VolumeFramingSettings(spacing=(2.0, 2.0, 2.0), patch=(64, 32, 64), patches=8),
        epochs=10,
        learning_rate=4e-3,
        schedule="cosine",
        warmup=0.1,
        lambda_dice=1.0,
        patience=None,
    ),
}

# What `train --help` says about each preset.
DESCRIPTIONS: dict[str, str] = {
    "paper": "2D images with the settings of the paper's appendix, on Harvard-FairSeg unless "
    "--data names other data. Meant for a GPU.",
    "released": "2D images with the settings of the paper's released code, on Harvard-FairSeg "
    "unless --data names other data. Meant for a GPU.",
    "small": "A small network for 2D images that a CPU can train, on slices of the MNI152 brain "
    "unless --data names other data.",
    "demo": "A single training of the demo, on slices of the MNI152 brain.",
    "study": "A single training of the study, with its small U-Net, on the made-up phantom images.",
    "paper3d": "Volumes with the settings of the paper's appendix, from the folder --root. Meant "
    "for a GPU with 40 GB of memory or more.",
    "paper3d-24gb": "The same as paper3d in bfloat16, meant for a GPU with 24 GB of memory.",
    "small3d": "A small network for volumes that a CPU can train, made for the folder that the "
    "command `example` writes.",
}
