"""The demo: its data and scores are what they say, and it runs to the end."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reference_models import fairness
from reference_models.data.mni152 import (
    GAP_SLICES,
    PROTOCOLS,
    TRAIN_SHARES,
    Contours,
    batches,
    load_mni152,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mni152():
    return load_mni152()


def test_the_hold_out_is_a_block_of_slices_with_a_gap_on_either_side(mni152):
    train, test = (set(samples.slice_B.tolist()) for samples in mni152)
    assert sorted(test) == list(range(min(test), max(test) + 1))
    assert min(abs(a - b) for a in train for b in test) > GAP_SLICES
    assert any(s < min(test) for s in train)
    assert any(s > max(test) for s in train)


def test_training_is_imbalanced_as_stated_and_the_test_set_is_balanced(mni152):
    train, test = mni152
    shares = train.protocol_B.bincount() / len(train)
    torch.testing.assert_close(shares, torch.tensor(TRAIN_SHARES))
    assert TRAIN_SHARES == (0.7, 0.2, 0.1)
    assert test.protocol_B.bincount().unique().numel() == 1


def test_the_image_does_not_show_the_protocol_and_the_masks_follow_it(mni152):
    for samples in mni152:
        for slice_index in samples.slice_B.unique()[::20]:
            here = samples.slice_B == slice_index
            images, protocols = samples.image_B1HW[here], samples.protocol_B[here]
            assert (images == images[0]).all()
            brain, grey, white = (samples.mask_B1HW[here][protocols == a][0] for a in range(3))
            assert torch.equal(brain, grey + white)
            assert grey.any()
            assert white.any()


def test_batches_are_seeded_and_move_image_and_mask_together(mni152):
    train, _ = mni152
    first, again, other = (
        [b.image_B1HW for b in batches(train, batch_size=4, steps=3, seed=seed)]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for batch in batches(train, batch_size=8, steps=5, seed=0):
        # Inside the brain the normalised image is not the background's constant.
        background = batch.image_B1HW[:, :, :1, :1]
        outside = (batch.image_B1HW == background) & batch.mask_B1HW.bool()
        assert outside.float().mean() < 1e-3


def test_an_empty_mask_is_no_sample(mni152):
    train, _ = mni152
    with pytest.raises(ValueError, match="1 of 2 masks are empty"):
        Contours(
            train.image_B1HW[:2],
            train.mask_B1HW[:2] * torch.tensor([1.0, 0.0])[:, None, None, None],
            train.protocol_B[:2],
            train.slice_B[:2],
        )


def test_es_dice_is_what_its_formula_says():
    means, shares = {0: 0.9, 1: 0.6, 2: 0.3}, {0: 0.5, 1: 0.25, 2: 0.25}
    assert fairness.overall(means, shares) == pytest.approx(0.675)
    assert fairness.es_dice(means, shares) == pytest.approx(0.675 / (1 + 0.225 + 0.075 + 0.375))
    with pytest.raises(ValueError, match="groups"):
        fairness.overall({0: 0.9}, shares)


def test_the_demo_runs_to_its_table_figure_and_csv(tmp_path):
    command = [sys.executable, "-m", "reference_models.demo", "--steps", "2", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("ES-Dice", "worst", "shuffled", "does not show", "expert"):
        assert words in done.stdout
    with (tmp_path / "dice.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["protocol"] for row in rows] == list(PROTOCOLS) * 4
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)
    assert (tmp_path / "slices.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dice.csv", "slices.png"]
