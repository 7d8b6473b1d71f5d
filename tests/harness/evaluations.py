"""What the tests of evaluation share: bars of known width, a network that draws as told, scores."""

import json

import numpy as np
import torch
from torch import nn

from dmoe_layer import DMoE
from reference_models.data.cases import Attribute, Case, Dataset, Sample
from reference_models.evaluation.evaluate import (
    Scoring,
)

SIZE = 16


FEW = Scoring(resamples=100, tolerance=1.0)


class Bars(Dataset):
    """Bars of `width` columns, where width - 1 is the attribute; the image shows the row alone.

    The first test case's attribute may be unknown. Rows of 2 mm, columns of 0.5 mm.
    """

    name, classes, channels, unit = "bars", ("background", "bar"), 1, "mm"
    regions = {"bar": (1,)}  # noqa: RUF012
    attributes = (Attribute("width", ("one", "two", "four")),)
    columns = (1, 2, 4)

    def __init__(self, n=12, unknown=()):
        self.loaded = []
        self.cases = tuple(
            Case(f"bar{i}", f"bar{i}", (-1 if i in unknown else i % 3,), "test") for i in range(n)
        )

    def load(self, case):
        self.loaded.append(case.case_id)
        number = int(case.case_id[3:])
        row, width = 2 + number % 10, self.columns[number % 3]
        image = np.zeros((1, SIZE, SIZE), np.float32)
        image[0, row] = 1
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[row, 4 : 4 + width] = 1
        return Sample(case.case_id, image, mask, case.attributes, (2.0, 0.5))


class Ruler(nn.Module):
    """Draws bars exactly as wide as it is told; unknown: 8 columns; blind: 2.

    As `open_run` loads it, it averages where it was trained with unknown="error".
    """

    def __init__(self, aware=True, unknown="error"):
        super().__init__()
        policy = "average" if unknown == "error" else unknown
        sizes = 3 if aware else None
        self.layer = DMoE(1, n_experts=4, k=1, attribute_sizes=sizes, unknown=policy)
        self.aware, self.unknown = aware, unknown
        self.eval()

    def forward(self, image_B1HW):
        tokens_BTD = image_B1HW.flatten(1)[..., None]
        _, routed = self.layer(tokens_BTD, return_routing=True)
        # `routed.attributes` is what the network was told, token by token.
        told_B = routed.attributes.reshape(len(image_B1HW), -1)[:, 0]
        widths_B = torch.tensor([*Bars.columns, 8])[told_B] if self.aware else 2 + 0 * told_B
        column_W = torch.arange(SIZE)
        inside_BW = (column_W >= 4) & (column_W < 4 + widths_B[:, None])
        bar_B1HW = image_B1HW * inside_BW[:, None, None]
        return torch.cat([0.5 - bar_B1HW, bar_B1HW - 0.5], dim=1)


def dice_of(summary, condition):
    (found,) = [c for c in summary.conditions if c.name == condition]
    (region,) = found.scores["width"]
    return [group.metrics["dice"].value for group in region.groups]


def read_json(folder):
    def refuse(name):
        raise AssertionError(name)

    return json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
