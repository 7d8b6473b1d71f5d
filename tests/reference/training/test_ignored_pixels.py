"""Pixels with nnU-Net's ignore label: the loss and validation are those of the other pixels."""

import numpy as np
import pytest
import torch
from harness.evaluations import Bars

from reference_models.data.cases import IGNORED
from reference_models.training.objectives import Objective
from reference_models.training.validation import case_dice

MODES = ("none", "reweight", "group-dro", "fair-dro", "febs")
B, K, SIDE, KEPT = 6, 3, 6, 20


def objective(fairness, **options):
    counts = torch.tensor((3, 2, 1, 1))
    settings = {"lambda_dice": 0.3, "lambda_ce": 0.7, "rate": 0.5} | options
    return Objective(fairness, group_counts=counts, **settings).double()


def batch():
    """Samples of 36 pixels, of which each keeps 20, and these pixels alone."""
    generator = torch.Generator().manual_seed(5)
    logits_BKS = torch.randn(B, K, SIDE, SIDE, generator=generator, dtype=torch.float64)
    mask_BS = torch.randint(0, K, (B, SIDE, SIDE), generator=generator)
    at_BN = torch.rand(B, SIDE * SIDE, generator=generator).argsort(1)[:, :KEPT]
    kept = mask_BS.flatten(1).gather(1, at_BN)
    mask_BS = torch.full_like(mask_BS.flatten(1), IGNORED).scatter(1, at_BN, kept)
    kept_logits = logits_BKS.flatten(2).gather(2, at_BN[:, None].expand(B, K, KEPT))
    group_B = torch.tensor([0, 1, 0, 2, 1, -1])
    return logits_BKS, mask_BS.view(B, SIDE, SIDE), group_B, at_BN, kept_logits, kept


def stepped(made, logits, mask, group):
    logits = logits.clone().requires_grad_()
    loss, loss_B = made(logits, mask, group)
    loss.backward()
    return loss.detach(), loss_B, logits.grad


@pytest.mark.parametrize("fairness", MODES)
def test_the_loss_and_its_gradient_are_those_of_the_other_pixels_alone(fairness):
    logits, mask, group, at_BN, kept_logits, kept = batch()
    made, alone = objective(fairness), objective(fairness)
    loss, loss_B, slope = stepped(made, logits, mask, group)
    loss_alone, loss_B_alone, slope_alone = stepped(
        alone, kept_logits[..., None], kept[..., None], group
    )
    torch.testing.assert_close(loss, loss_alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_B, loss_B_alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(made.weights_G, alone.weights_G, rtol=1e-12, atol=0)
    put_back = torch.zeros_like(logits).flatten(2)
    put_back.scatter_(2, at_BN[:, None].expand(B, K, KEPT), slope_alone[..., 0])
    torch.testing.assert_close(slope.flatten(2), put_back, rtol=1e-10, atol=1e-15)
    assert (slope[(mask == IGNORED)[:, None].expand_as(slope)] == 0).all()


@pytest.mark.parametrize("fairness", MODES)
def test_a_sample_without_any_other_pixel_is_as_if_it_were_not_there(fairness):
    logits, mask, group, *_ = batch()
    mask[[1, 3]] = IGNORED  # with which a group is gone
    rest = [0, 2, 4, 5]
    made, alone = objective(fairness), objective(fairness)
    loss, loss_B, slope = stepped(made, logits, mask, group)
    loss_alone, loss_B_alone, slope_alone = stepped(alone, logits[rest], mask[rest], group[rest])
    torch.testing.assert_close(loss, loss_alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss_B[rest], loss_B_alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(made.weights_G, alone.weights_G, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope[rest], slope_alone, rtol=1e-10, atol=1e-15)
    assert not loss_B[[1, 3]].any()
    assert not slope[[1, 3]].any()


@pytest.mark.parametrize("fairness", MODES)
def test_a_batch_without_any_other_pixel_changes_nothing(fairness):
    logits, mask, group, *_ = batch()
    loss, _, slope = stepped(objective(fairness), logits, torch.full_like(mask, IGNORED), group)
    assert loss == 0
    assert not slope.any()


def test_without_a_dice_loss_the_mean_is_over_the_other_pixels():
    logits = torch.zeros(1, 2, 1, 4)
    mask = torch.tensor([[[0, 1, IGNORED, IGNORED]]])
    made = Objective("none", lambda_dice=0, lambda_ce=1, group_counts=torch.tensor((1, 0)))
    assert made(logits, mask, torch.tensor([0]))[0].item() == pytest.approx(np.log(2))


def test_validation_counts_neither_what_is_predicted_nor_what_is_true_there():
    truth = torch.tensor([[1, 1, 0, IGNORED, IGNORED]])
    predicted = torch.tensor([[1, 0, 0, 1, 0]])
    assert case_dice(predicted, truth, Bars()) == [pytest.approx(2 / 3)]
