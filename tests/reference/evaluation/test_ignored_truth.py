"""Where the truth is ignored nothing is scored, whatever is predicted; no prediction ignores."""

import dataclasses

import numpy as np
import pytest
from harness.evaluations import FEW
from harness.image_folders import nnunet_images
from PIL import Image

from reference_models.errors import DataError
from reference_models.evaluation.evaluate import EvaluatePredictions, evaluate_predictions
from reference_models.metrics.region import IGNORING


@pytest.fixture
def predicted(tmp_path):
    """Masks that are right but for what is ignored, all of which they take for a nodule."""
    labels = {"background": 0, "nodule": 1, "ignore": 2}
    data = nnunet_images(tmp_path / "data", labels=labels)
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (data.root / "labelsTr").iterdir():
        with Image.open(path) as image:
            truth = np.asarray(image)
        assert (truth == 2).any()
        Image.fromarray(np.where(truth == 2, 1, truth).astype(np.uint8)).save(folder / path.name)
    return EvaluatePredictions(folder, data, "all", out=tmp_path / "out", scoring=FEW)


def test_a_mask_that_is_right_elsewhere_is_right(predicted):
    summary = evaluate_predictions(predicted)
    (region,) = summary.conditions[0].scores["site"]
    assert region.region == "nodule"
    for metric, value in {"dice": 1, "iou": 1, "surface_dice": 1, "hd95": 0}.items():
        assert region.overall[metric].value == value
    assert summary.policy.endswith(IGNORING)


def test_one_that_is_wrong_elsewhere_is_as_wrong_as_it_is_there(predicted):
    path = predicted.folder / "u3.png"
    with Image.open(path) as image:
        mask = np.array(image)
    mask[0, :9] = 1  # besides a nodule of 7 x 10 pixels
    Image.fromarray(mask).save(path)
    (region,) = evaluate_predictions(predicted).conditions[0].scores["site"]
    assert region.overall["dice"].value == pytest.approx((9 + 2 * 70 / (140 + 9)) / 10)


def test_a_prediction_with_the_ignore_label_is_refused(predicted):
    data = predicted.data.root
    (predicted.folder / "u3.png").write_bytes((data / "labelsTr/u3.png").read_bytes())
    with pytest.raises(DataError, match=r"u3\.png: got label 2, expected labels"):
        evaluate_predictions(dataclasses.replace(predicted, split="all"))
