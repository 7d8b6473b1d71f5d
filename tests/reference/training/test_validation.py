"""Validation: the score is the groups' mean, whoever sees which cases in what batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness.volumes import CPU, FRAME, STAGED, Threshold

from reference_models.data import open_dataset
from reference_models.data.cases import Attribute
from reference_models.data.framing import ImageFraming
from reference_models.data.loading import Batch, Frames, eval_batches
from reference_models.data.splits import read_splits
from reference_models.report.pictures import GAP
from reference_models.training import checkpoints
from reference_models.training.validation import share_of, validate

pytestmark = pytest.mark.usefixtures("one_thread")


class AsTold(torch.nn.Module):
    """Predicts label 2 in as many of 4 pixels as the image's values say, 0 in the others."""

    def forward(self, image_BCHW):
        count_B = image_BCHW[:, 0, 0, 0]
        ranks = torch.arange(4.0).view(1, 2, 2)
        twos = (ranks < count_B[:, None, None]).float()
        return torch.stack([1 - twos, torch.zeros_like(twos), twos], 1)


def test_the_score_is_the_mean_over_groups_so_that_a_minority_counts_as_much():
    sites = Attribute("site", ("a", "b", "c"))
    dataset = SimpleNamespace(regions={"organ": (1, 2), "lesion": (2,)}, attributes=(sites,))
    image = torch.tensor([4.0, 4.0, 4.0, 2.0, 0.0]).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    mask = torch.tensor([[[1, 2], [2, 2]]] * 5)
    attributes = torch.tensor([[0], [0], [0], [2], [-1]])
    batch = Batch(image, mask, attributes, tuple("vwxyz"))
    result = validate(AsTold(), [batch], dataset, torch.device("cpu"))
    # Organ and lesion: 4 of 4 and 3 of 4 pixels found of 4 predicted; of 2 predicted, 2 and 1.
    means = [(1 + 6 / 7) / 2, (4 / 6 + 2 / 5) / 2, 0.0]
    assert result.dice == pytest.approx(
        dict(zip(("site=a", "site=c", "site=unknown"), means, strict=True))
    )
    assert result.score == pytest.approx(sum(means) / 3)
    assert result.load == {}
    assert {example.case_id for example in result.examples} == {"v", "y", "z"}


def test_scores_and_loads_do_not_depend_on_how_cases_fall_into_batches(finished):
    recipe, _, model = checkpoints.load_model(finished)
    splits = read_splits(finished / "splits.json", open_dataset(recipe.data))
    dataset = open_dataset(recipe.data)
    frames = Frames(dataset, splits.train, ImageFraming(32))
    model.train()  # which validation must leave, and come back to
    results = [
        validate(
            model,
            eval_batches(frames, batch_size=size),
            dataset,
            torch.device("cpu"),
        )
        for size in (1, 7)
    ]
    assert model.training
    assert results[0].dice == pytest.approx(results[1].dice)
    (load_AE, other_AE) = (np.array(result.load["site"]) for result in results)
    assert load_AE.shape == (3, 8)
    np.testing.assert_allclose(load_AE.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(load_AE, other_AE, atol=1e-5)
    assert np.abs(load_AE[0] - load_AE[1]).max() > 0.01  # sites have routers of their own


@pytest.mark.parametrize(("cases", "ranks"), [(5, 2), (1, 4), (3, 8), (8, 4)])
def test_every_rank_validates_as_many_cases_and_all_are_validated(cases, ranks):
    ids = tuple(str(n) for n in range(cases))
    shares = [share_of(ids, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert {case for share in shares for case in share} == {*ids}


@pytest.mark.usefixtures("one_thread")
def test_validation_scores_volumes_window_by_window():
    batches = []
    for number in range(3):
        mask = torch.zeros(1, 48, 40, 32, dtype=torch.int64)
        mask[0, 10:12, 10:12, 10:12] = 1
        image = mask.roll(int(number > 0), 1 + number)[
            :, None
        ].float()  # half of it missed, but for T1
        batches.append(Batch(image, mask, torch.tensor([[number]]), (f"case{number}",)))
    model = Threshold(3)
    affine = np.diag([1.0, 2.0, 1.0, 1.0])
    found = validate(model, batches, STAGED, CPU, windows=FRAME.windows(4), affine=affine)
    assert found.dice == pytest.approx({"stage=T1": 1, "stage=T2": 0.5, "stage=T3": 0.5})
    assert found.score == pytest.approx(2 / 3)
    assert np.sum(found.load["stage"], 1) == pytest.approx([1, 1, 1])
    # Spacing of the frame: axial is 48 x 80 pixels, coronal 48 x 32, sagittal 80 x 32.
    assert [picture.truth_HW.shape for picture in found.examples] == [
        (80, 48 + GAP + 48 + GAP + 80)
    ] * 3
    assert model.batches == [4] * 3
