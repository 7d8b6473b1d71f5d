"""What tests of volumes share: how they are framed and stored, and a network: a threshold."""

from types import SimpleNamespace

import numpy as np
import torch
from nibabel import orientations
from torch import nn

from dmoe_layer import DMoE
from reference_models.data.cases import Attribute
from reference_models.recipes.framings import VolumeFramingSettings

CPU = torch.device("cpu")


FRAME = VolumeFramingSettings(spacing=(1.0, 1.0, 1.0), patch=(32, 32, 32))


STAGED = SimpleNamespace(
    attributes=(Attribute("stage", ("T1", "T2", "T3")),), regions={"plate": (1,)}
)


class Threshold(nn.Module):
    """Class 1 where the image is above 0.5; experts route, to no effect."""

    def __init__(self, sizes):
        super().__init__()
        self.layer = DMoE(
            1, n_experts=2, k=1, channel_dim=1, attribute_sizes=sizes, unknown="average"
        ).eval()
        self.batches = []

    def forward(self, image_BCS):
        self.batches.append(len(image_BCS))
        return torch.cat([0.5 - image_BCS, image_BCS - 0.5], 1) + 0 * self.layer(image_BCS)


def stored_as(axes, spacing, array_S):
    """An RAS+ array as stored with other axes, and its affine."""
    there = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axes)
    )
    affine = np.diag([*spacing, 1.0]) @ orientations.inv_ornt_aff(there, array_S.shape)
    return np.ascontiguousarray(orientations.apply_orientation(array_S, there)), affine
