"""Recipes to start from: each is a line in `PRESETS` and one in `DESCRIPTIONS`."""

from __future__ import annotations

import dataclasses

from ..data import DataSettings
from .framings import ImageFramingSettings, VolumeFramingSettings
from .networks import ResUNet3DSettings, TransUNetSettings, UNetSettings
from .recipe import Recipe

# The paper's card leaves open: the rate of the exponential decay (ours leaves 1 % in the last
# epoch), AdamW's weight decay and betas (PyTorch's here), warm-up (none), augmentation (the
# released code's), whether cross-entropy stands alone (taken at its word) and how the best epoch is
# chosen (on validation cases of ours, carved from the training split).
_PAPER = Recipe(data=DataSettings("fairseg"), leave_out_unknown=True, lambda_dice=0.0)

# Learning rate, epochs, batch, patch, early stopping and attribute are the card's, the network the
# released code's. Of spacing, patience, overlap, augmentation and normalisation nothing is said:
# they are ours, and so is what the comment above names for 2D.
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
    # 0.0175 is the 0.01 of the released code times 42/24. Its Dice pools the batch and squares the
    # predictions in the denominator, ours is MONAI's of each sample; its poly lags by one step.
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
        # One head in one pose: without shifts the slices are learned by heart.
        framing=ImageFramingSettings(size=80, crop="whole", augment="shift"),
        batch_size=8,
        epochs=7,
        learning_rate=4e-3,
        schedule="cosine",
        warmup=0.1,
        balance_weight=0.01,
    ),
    # What the demo trains, in four ways. No jump is left for the last epoch: tissues look alike in
    # all slices, two stages see little more than a tissue's edge, and the rate falls to zero.
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
    # One training of the study, by itself.
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
    # The same steps in half the bits; what they take is in the README.
    "paper3d-24gb": dataclasses.replace(_PAPER_3D, precision="bf16-mixed"),
    # For the folder that `example` writes: patches as thin as the blocks of that head, and as many
    # epochs as made its validation block better.
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

# What `train --help` says of each.
DESCRIPTIONS: dict[str, str] = {
    "paper": "as the paper's appendix has it",
    "released": "as the paper's released code has it",
    "small": "for a CPU, on the MNI152 brain",
    "demo": "one training of the demo, on the MNI152 brain",
    "study": "one training of the study, on the phantom",
    "paper3d": "volumes, as the paper's appendix has it",
    "paper3d-24gb": "the same in half the bits, for a card of 24 GB",
    "small3d": "volumes, for a CPU, on the folder that `example` writes",
}
