"""Segmentation losses with different weights for groups: plain, reweight, group-DRO, fair-DRO,
FEBS.

Every statistic of a group is over the batch of all ranks together, so that several processes train
as one process does.

Shapes: B samples, G groups, K classes, P pixels or voxels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from monai.networks import one_hot
from torch import Tensor, nn

from ..data.cases import IGNORED
from .parallel import global_max, global_sum

Fairness = Literal["none", "reweight", "group-dro", "fair-dro", "febs"]
_SMOOTH = 1e-5  # MONAI's


class Objective(nn.Module):
    """The loss of a batch, λ_dice · Dice + λ_ce · cross-entropy, with weights for groups.

    With ℓ_i the DiceCE of sample i (MONAI's, per sample) and L_g its mean over the samples of
    group g in the batch:

    - ``none``: the mean of ℓ_i.
    - ``reweight``: the mean of ℓ_i / (G π_g), with π_g the share of the sample's group in the
      training cases and G the number of groups that have one: on average over batches, every
      group counts alike.
    - ``group-dro`` (Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020, alg. 1):
      Σ_g q_g L_g, where before each step q_g ← q_g · exp(η L_g), renormalised. A group that is
      absent from the batch keeps its weight up to that normalisation. q starts even over the
      groups of the training cases, and is saved with the run.
    - ``fair-dro``: the mean over the groups present of R_g = τ log (1/n_g Σ_{i in g} exp(ℓ_i/τ)).
      R_g is the worst case over reweightings w of group g's samples, max_w Σ w_i ℓ_i −
      τ KL(w ‖ uniform), so that a group's hard samples are not hidden by its mean. That is the
      aim that the abstract of DuetFair (Tian et al., arXiv:2605.10521) states for its FairDRO;
      **its equations were not at hand, and these are not claimed to be them**. They are those of
      tilted losses (Li et al., Tilted Empirical Risk Minimization, ICLR 2021), with tilt 1/τ
      within groups; that the groups then count alike is our choice. It is not the FairDRO of
      Jung et al. (ICLR 2023), which weighs groups against each other within a class.
    - ``febs`` (fair error-bound scaling; Tian et al., FairSeg, ICLR 2024): the Dice loss over the
      whole batch with each sample's probabilities scaled by its group's w_g = (min_h D_h / D_g)^γ,
      D_g the Dice loss over the group's samples together; the minimum is over the groups
      **present**, an absent one has no weight and takes none from the others. Cross-entropy stays
      as it is. The scaled probabilities stand squared in the denominator, as in the authors'
      code; its further tanh of w_g is left out, since it scales even the best group down.

    Samples with an unknown attribute are a group of their own, the last one. Pixels with the label
    `IGNORED` do not count; a sample with no other pixels does not count either, and a batch without
    other samples has the loss 0.

    Args:
        fairness: the name of one of the five.
        lambda_dice, lambda_ce: the weights λ.
        group_counts: number of training cases of each group, the unknown group last. It is used by
            reweight and group-dro.
        rate: the step size η of group-dro.
        temperature: the temperature τ of fair-dro.
        gamma: the exponent γ of febs.
    """

    def __init__(
        self,
        fairness: Fairness,
        *,
        lambda_dice: float,
        lambda_ce: float,
        group_counts: Tensor,
        rate: float = 0.01,
        temperature: float = 1.0,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        self.fairness = fairness
        self.lambda_dice, self.lambda_ce = lambda_dice, lambda_ce
        self.rate, self.temperature, self.gamma = rate, temperature, gamma
        self.dice = DiceLoss(reduction="none")
        present_G = (group_counts > 0).float()
        self.weights_G: Tensor
        self.register_buffer("weights_G", present_G / present_G.sum())
        self.inverse_G: Tensor
        inverse_G = group_counts.sum() / (present_G.sum() * group_counts.clamp(min=1))
        self.register_buffer("inverse_G", inverse_G.float(), persistent=False)

    def forward(
        self, logits_BKP: Tensor, mask_BP: Tensor, group_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes the loss of the batch over all ranks, and the loss of each sample of this rank.

        Args:
            logits_BKP: logits, fp32, (B, K, ...).
            mask_BP: labels or `IGNORED`, int64, (B, ...).
            group_B: indices of the samples' groups, int64; -1 means unknown, the last group.

        Returns:
            The scalar to minimise, which is the same on every rank and whose gradients must be
            averaged over ranks; and the DiceCE losses of the samples, (B,), without gradient.
        """
        n_kept_B = (mask_BP != IGNORED).flatten(1).sum(1)
        ce_BP = F.cross_entropy(logits_BKP, mask_BP, ignore_index=IGNORED, reduction="none")
        ce_B = ce_BP.flatten(1).sum(1) / n_kept_B.clamp(min=1)
        loss_B = self.lambda_ce * ce_B
        if self.lambda_dice:
            dice_BK = self.dice(*_kept(logits_BKP, mask_BP)).flatten(1)
            loss_B = loss_B + self.lambda_dice * dice_BK.mean(1)
        counted_B = n_kept_B > 0
        member_BG = F.one_hot(group_B % len(self.weights_G), len(self.weights_G)).to(loss_B)
        member_BG = member_BG * counted_B[:, None]
        if self.fairness == "reweight":
            loss = _mean(loss_B * (member_BG @ self.inverse_G), counted_B)
        elif self.fairness == "group-dro":
            loss = self._group_dro(loss_B, member_BG)
        elif self.fairness == "fair-dro":
            loss = self._fair_dro(loss_B, member_BG)
        elif self.fairness == "febs":
            loss = self.lambda_ce * _mean(ce_B, counted_B) + self.lambda_dice * self._febs(
                logits_BKP, mask_BP, member_BG
            )
        else:
            loss = _mean(loss_B, counted_B)
        return loss, loss_B.detach()

    def _group_dro(self, loss_B: Tensor, member_BG: Tensor) -> Tensor:
        sums_2G = global_sum(torch.stack([loss_B @ member_BG, member_BG.sum(0)]))
        mean_G = sums_2G[0] / sums_2G[1].detach().clamp(min=1)
        # This is q · exp(η L), renormalised, in a form that cannot overflow.
        self.weights_G = (self.weights_G.log() + self.rate * mean_G.detach()).softmax(0)
        return (self.weights_G * mean_G).sum()

    def _fair_dro(self, loss_B: Tensor, member_BG: Tensor) -> Tensor:
        scaled_B1 = loss_B[:, None] / self.temperature
        # The largest value of each group is factored out of the exponentials, so that the result
        # stays exact and finite.
        top_G = global_max((scaled_B1.detach() * member_BG).amax(0))
        risen_BG = torch.exp((scaled_B1 - top_G) * member_BG) * member_BG
        sums_2G = global_sum(torch.stack([risen_BG.sum(0), member_BG.sum(0)]))
        present_G = sums_2G[1] > 0
        mean_G = sums_2G[0][present_G] / sums_2G[1][present_G].detach()
        risk_G = self.temperature * (mean_G.log() + top_G[present_G])
        return risk_G.sum() / max(len(risk_G), 1)

    def _febs(self, logits_BKP: Tensor, mask_BP: Tensor, member_BG: Tensor) -> Tensor:
        probability_BKP, truth_BKP = (part.flatten(2) for part in _kept(logits_BKP, mask_BP))
        of_samples = torch.stack([
            (probability_BKP * truth_BKP).sum(2),
            probability_BKP.square().sum(2),
            truth_BKP.sum(2),
        ])  # fmt: skip
        shared_GK, predicted_GK, true_GK = global_sum(member_BG.T @ of_samples)
        bound_G = _dice_loss(shared_GK, predicted_GK, true_GK).detach().clamp(min=_SMOOTH)
        present_G = true_GK.sum(1) > 0  # every sample that counts has pixels of some class
        best = bound_G.where(present_G, torch.inf).min()
        weight_G1 = torch.where(present_G, (best / bound_G) ** self.gamma, 0)[:, None]
        return _dice_loss(
            (weight_G1 * shared_GK).sum(0),
            (weight_G1.square() * predicted_GK).sum(0),
            true_GK.sum(0),
        )


def _kept(logits_BKP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Gives probabilities and truth, (B, K, ...); both are 0 where the label is `IGNORED`."""
    n_classes = logits_BKP.shape[1]
    probability_BKP = logits_BKP.softmax(1) * (mask_BP != IGNORED)[:, None]
    # Ignored pixels become an extra class, which is cut off again.
    label_B1P = mask_BP.clamp(max=n_classes)[:, None]
    truth_BKP = one_hot(label_B1P, n_classes + 1, dtype=logits_BKP.dtype)[:, :n_classes]
    return probability_BKP, truth_BKP


def _mean(loss_B: Tensor, counted_B: Tensor) -> Tensor:
    """Averages over the samples of all ranks that count; the losses of others must be 0."""
    total, n = global_sum(torch.stack([loss_B.sum(), counted_B.sum().to(loss_B)]))
    return total / n.detach().clamp(min=1)


def _dice_loss(shared_K: Tensor, predicted_K: Tensor, true_K: Tensor) -> Tensor:
    """Gives 1 − (2 Σ p·y + ε) / (Σ p² + Σ y + ε), averaged over the classes, the last axis."""
    return (1 - (2 * shared_K + _SMOOTH) / (predicted_K + true_K + _SMOOTH)).mean(-1)
