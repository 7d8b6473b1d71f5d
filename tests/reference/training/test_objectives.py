"""The losses that weigh groups, held against cases worked out by hand and against other code."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from harness.trainings import needs_fork
from helpers import leave_group
from monai.losses import DiceCELoss

from reference_models.training.objectives import Objective

MODES = ("none", "reweight", "group-dro", "fair-dro", "febs")


def objective(fairness, *, lambda_dice=1.0, lambda_ce=1.0, counts=(3, 2, 1, 0), **options):
    return Objective(
        fairness,
        lambda_dice=lambda_dice,
        lambda_ce=lambda_ce,
        group_counts=torch.tensor(counts),
        **options,
    )


def logits_with_losses(*losses):
    """One pixel, two classes, truth 0: cross-entropy log(1 + e^z) is each of the numbers."""
    z = torch.tensor([math.log(math.expm1(loss)) for loss in losses])
    logits_BK11 = torch.stack([torch.zeros_like(z), z], 1)[..., None, None]
    return logits_BK11, torch.zeros(len(losses), 1, 1, dtype=torch.int64)


def of_losses(fairness, losses, groups, **options):
    """The loss of samples whose cross-entropies are these."""
    logits, mask = logits_with_losses(*losses)
    made = objective(fairness, lambda_dice=0.0, **options)
    return made(logits, mask, torch.tensor(groups))[0].item(), made


def random_batch(n=6):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, 3, 8, 8, generator=generator)
    mask = torch.randint(0, 3, (n, 8, 8), generator=generator)
    return logits, mask, torch.tensor([0, 1, 0, 2, 1, -1])[:n]


def test_without_fairness_the_loss_is_monais_dice_ce():
    logits, mask, group = random_batch()
    loss, loss_B = objective("none", lambda_dice=0.3, lambda_ce=0.7)(logits, mask, group)
    monai = DiceCELoss(to_onehot_y=True, softmax=True, lambda_dice=0.3, lambda_ce=0.7)
    torch.testing.assert_close(loss, monai(logits, mask[:, None]))
    alone = torch.stack([monai(logits[b : b + 1], mask[b : b + 1, None]) for b in range(6)])
    torch.testing.assert_close(loss_B, alone)


def test_reweighting_weighs_each_sample_by_how_rare_its_group_is_in_training():
    # Shares 1/2, 1/3 and 1/6 of three groups: weights 2/3, 1 and 2, and the mean over samples.
    loss, made = of_losses("reweight", [1.0, 3.0, 0.5], [0, 1, 2])
    assert loss == pytest.approx((2 / 3 * 1 + 1 * 3 + 2 * 0.5) / 3, rel=1e-6)
    assert of_losses("reweight", [1.0, 3.0], [0, 2])[0] == pytest.approx((2 / 3 + 6) / 2)
    assert "inverse_G" not in made.state_dict()  # it is made of the cases, and no run's state


def test_reweighted_over_all_training_cases_every_group_counts_alike():
    counts, losses = (4, 2, 0, 1), [1.0, 2.0, 3.0, 4.0, 0.5, 1.5, 7.0]
    groups = [0, 0, 0, 0, 1, 1, -1]  # the unknown, which are a group of their own, are last
    loss, _ = of_losses("reweight", losses, groups, counts=counts)
    assert loss == pytest.approx((2.5 + 1.0 + 7.0) / 3, rel=1e-6)


def test_group_dro_raises_the_weight_of_the_group_with_the_larger_loss():
    # Means 2 and 1; weights 1/3 each grow by e^{.5·2} and e^{.5·1}, the absent third not at all.
    loss, made = of_losses("group-dro", [1.0, 3.0, 1.0], [0, 0, 1], rate=0.5)
    total = math.e + math.exp(0.5) + 1
    expected = [math.e / total, math.exp(0.5) / total, 1 / total, 0]
    assert made.weights_G.tolist() == pytest.approx(expected)
    assert loss == pytest.approx(expected[0] * 2 + expected[1] * 1, rel=1e-6)


def test_group_dro_is_finite_at_any_rate():
    loss, made = of_losses("group-dro", [1.0, 3.0, 2.0], [0, 1, 2], rate=1e4)
    assert made.weights_G.tolist() == [0, 1, 0, 0]
    assert loss == pytest.approx(3.0)


def test_group_dro_carries_its_weights_from_step_to_step_and_in_its_state():
    made = objective("group-dro", lambda_dice=0.0, rate=0.5)
    logits, mask = logits_with_losses(2.0, 1.0)
    for _ in range(2):
        made(logits, mask, torch.tensor([0, 1]))
    weights = [math.e**2, math.e, 1.0]
    assert made.weights_G[:3].tolist() == pytest.approx([w / sum(weights) for w in weights])
    other = objective("group-dro")
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.weights_G, made.weights_G)


def test_group_dro_does_not_weigh_by_how_many_samples_a_group_has():
    few, _ = of_losses("group-dro", [1.0, 3.0], [0, 1])
    many, _ = of_losses("group-dro", [1.0, 1.0, 1.0, 3.0], [0, 0, 0, 1])
    assert few == pytest.approx(many)


def test_fair_dro_is_a_tilted_mean_within_groups_and_a_plain_mean_over_those_present():
    loss, _ = of_losses("fair-dro", [1.0, 3.0, 2.0], [0, 0, 2], temperature=0.5)
    first = 0.5 * math.log((math.exp(2) + math.exp(6)) / 2)
    assert loss == pytest.approx((first + 2.0) / 2, rel=1e-6)


def test_fair_dro_lies_between_the_mean_and_the_largest_loss_of_a_group():
    assert of_losses("fair-dro", [1.0, 3.0], [0, 0], temperature=1e4)[0] == pytest.approx(2, 1e-3)
    assert of_losses("fair-dro", [1.0, 3.0], [0, 0], temperature=1e-3)[0] == pytest.approx(3, 1e-3)


def test_fair_dro_is_finite_however_far_the_groups_losses_lie_apart():
    # One group's largest loss in the exponentials of another would leave log 0.
    loss, _ = of_losses("fair-dro", [9.0, 8.0, 0.5, 0.25], [0, 0, 1, -1], temperature=0.01)
    first = 9.0 + 0.01 * math.log((1 + math.exp(-100)) / 2)
    assert loss == pytest.approx((first + 0.5 + 0.25) / 3, rel=1e-6)
    logits, mask = logits_with_losses(9.0, 0.5)
    logits.requires_grad_()
    made = objective("fair-dro", lambda_dice=0.0, temperature=0.01)
    made(logits, mask, torch.tensor([0, 1]))[0].backward()
    slopes = torch.softmax(logits.detach(), 1)[:, 1, 0, 0]
    torch.testing.assert_close(logits.grad[:, 1, 0, 0], slopes / 2)


def test_fair_dro_weighs_samples_by_the_softmax_of_their_losses():
    logits, mask = logits_with_losses(1.0, 3.0)
    logits.requires_grad_()
    made = objective("fair-dro", lambda_dice=0.0, temperature=2.0)
    made(logits, mask, torch.zeros(2, dtype=torch.int64))[0].backward()
    slopes = torch.softmax(logits.detach(), 1)[:, 1, 0, 0]  # of each cross-entropy in z
    weights = torch.softmax(torch.tensor([0.5, 1.5]), 0)
    torch.testing.assert_close(logits.grad[:, 1, 0, 0], weights * slopes)


def febs_batch(*certain):
    """Samples of one pixel, truth 1, given probability `certain` for it."""
    p = torch.tensor(certain)
    logits = torch.stack([torch.zeros_like(p), (p / (1 - p)).log()], 1)[..., None, None]
    return logits, torch.ones(len(certain), 1, 1, dtype=torch.int64)


def test_febs_scales_each_groups_probabilities_by_its_error_bound():
    # Class 0 is nowhere true: its Dice loss is 1 up to smoothing. Class 1 of a pixel of
    # probability p: 1 - 2p / (p² + 1).
    loss = objective("febs", lambda_ce=0.0, gamma=1.0)(*febs_batch(0.8, 0.5), torch.tensor([0, 2]))[
        0
    ]
    bound = [(1 + 1 - 2 * p / (p * p + 1)) / 2 for p in (0.8, 0.5)]
    w = bound[0] / bound[1]
    shared, predicted = 0.8 + w * 0.5, 0.8**2 + (w * 0.5) ** 2
    assert loss.item() == pytest.approx((1 + 1 - 2 * shared / (predicted + 2)) / 2, abs=1e-4)


def test_febs_has_its_weights_from_the_groups_that_are_present():
    batch, group = febs_batch(0.8, 0.5), torch.tensor([0, 2])
    of_three = objective("febs", counts=(1, 1, 1, 0))(*batch, group)[0]
    of_nine = objective("febs", counts=(1,) * 9)(*batch, group)[0]
    assert torch.equal(of_three, of_nine)
    alone = objective("febs", lambda_ce=0.0, gamma=5.0)(*febs_batch(0.5), torch.tensor([1]))[0]
    assert alone.item() == pytest.approx((1 + 1 - 2 * 0.5 / 1.25) / 2, abs=1e-4)  # weight 1


def test_febs_with_gamma_0_weighs_all_groups_alike():
    logits, mask, group = random_batch()
    even = objective("febs", gamma=0.0)
    torch.testing.assert_close(even(logits, mask, group)[0], even(logits, mask, group * 0)[0])


@pytest.mark.parametrize("fairness", MODES[1:])
def test_samples_of_unknown_attribute_are_a_group_of_their_own(fairness):
    logits, mask, _ = random_batch()
    unknown, last, other = ([0, 1, 0, 1, 1, value] for value in (-1, 3, 0))
    counts = (3, 2, 0, 1)
    losses = [
        objective(fairness, counts=counts)(logits, mask, torch.tensor(group))[0]
        for group in (unknown, last, other)
    ]
    assert torch.equal(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2], rtol=1e-4)


@pytest.mark.parametrize("fairness", MODES)
def test_the_loss_falls_when_it_is_followed(fairness):
    logits, mask, group = random_batch()
    made = objective(fairness, counts=(1, 1, 1, 1), rate=0.0)
    logits.requires_grad_()
    before = made(logits, mask, group)[0]
    before.backward()
    with torch.no_grad():
        assert made(logits - logits.grad, mask, group)[0] < before


def work(rank, folder):
    torch.set_num_threads(1)  # a fork has none of the threads that its parent may have started
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    logits, mask, group = random_batch()
    part = slice(0, 2) if rank == 0 else slice(2, 6)
    found = {}
    for fairness in MODES:
        made = objective(fairness, counts=(2, 2, 1, 1), rate=0.5)
        mine = logits[part].clone().requires_grad_()
        loss, _ = made(mine, mask[part], group[part])
        loss.backward()
        found[fairness] = loss.item(), mine.grad, made.weights_G
    torch.save(found, folder / f"{rank}.pt")
    leave_group()


@needs_fork
def test_two_processes_have_the_loss_the_gradients_and_the_weights_of_one(tmp_path):
    # Parts of 2 and 4 samples, and groups that one process has none of.
    context = mp.get_context("fork")
    ranks = [context.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    # From files: a tensor in a queue is fetched from the process that put it, which may be gone.
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    logits, mask, group = random_batch()
    for fairness in MODES:
        made = objective(fairness, counts=(2, 2, 1, 1), rate=0.5)
        whole = logits.clone().requires_grad_()
        loss, _ = made(whole, mask, group)
        loss.backward()
        both = [found[rank][fairness] for rank in range(2)]
        assert [b[0] for b in both] == pytest.approx([loss.item()] * 2, rel=1e-6)
        averaged = torch.cat([b[1] for b in both]) / 2  # as DDP averages
        torch.testing.assert_close(averaged, whole.grad)
        torch.testing.assert_close(both[0][2], made.weights_G)
