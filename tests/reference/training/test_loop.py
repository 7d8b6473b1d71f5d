"""The training loop: its losses, what ends it, precision and memory, and what it tells."""

import dataclasses

import numpy as np
import pytest
import torch
from harness.trainings import (
    TINY,
    history_of,
    weights_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmoe_layer import importance_loss, load_balancing_loss, routing
from reference_models.data import open_dataset
from reference_models.data.framing import ImageFraming
from reference_models.data.loading import Frames, train_batches
from reference_models.data.phantom import Phantom
from reference_models.data.splits import make_splits, read_splits
from reference_models.models import vit
from reference_models.recipes.networks import UNetSettings
from reference_models.training import loop as training
from reference_models.training.loop import NonFiniteLossError, train
from reference_models.training.runs import Task, build_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("aware", [True, False])
def test_the_balance_loss_is_the_one_that_was_chosen(tmp_path, aware):
    # One step, and what the newly made network routes in it.
    recipe = dataclasses.replace(
        TINY, model=UNetSettings(widths=(4,), aware=aware), batch_size=18, epochs=1,
        balance_weight=3.0, learning_rate=1e-9,
    )  # fmt: skip
    found = {}
    for balance in ("load", "within", "importance"):
        run = train(dataclasses.replace(recipe, balance=balance, out=tmp_path / balance))
        (row,) = history_of(run)
        found[balance] = row["balance"]
        assert row["loss"] == pytest.approx(row["segmentation"] + 3.0 * row["balance"], rel=1e-6)
    dataset = open_dataset(recipe.data)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, Task.of(dataset))
    splits = read_splits(tmp_path / "load" / "splits.json", dataset)
    frames = Frames(dataset, splits.train, ImageFraming(32), augment="paper", seed=recipe.seed)
    (batch,) = train_batches(frames, batch_size=18, epoch=0)
    torch.manual_seed(training.step_seed(recipe.seed, 0, 0))
    with routing(batch.attributes_BN) as r:
        model(batch.image_BCS)
    (routed,) = r.routings
    assert found == pytest.approx(
        {
            "load": load_balancing_loss(routed).item(),
            "within": load_balancing_loss(routed, per_attribute=True).item(),
            "importance": importance_loss(routed).item(),
        },
        rel=1e-5,
    )
    assert min(abs(found["load"] - found[b]) for b in ("within", "importance")) > 1e-4


def test_a_loss_that_is_not_finite_stops_it_and_names_step_and_case(tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", checkpoint_every=1, epochs=1)
    dataset = open_dataset(recipe.data)
    splits = make_splits(dataset, 0)
    frames = Frames(dataset, splits.train, ImageFraming(32), seed=0)
    *_, third, _ = train_batches(frames, batch_size=4, epoch=0)
    bad, load = third.case_ids[2], Phantom.load

    def damaged(self, case):
        sample = load(self, case)
        if case.case_id == bad:
            sample.image_CS[0, 5, 5] = np.nan
        return sample

    monkeypatch.setattr(Phantom, "load", damaged)
    with pytest.raises(
        NonFiniteLossError, match=rf"^step 3 \(epoch 1\).*These cases have such a loss: {bad}\. "
    ) as caught:
        train(recipe)
    (kept,) = recipe.out.glob("last-*")
    assert kept.name == "last-00000002"
    assert str(kept) in str(caught.value)
    assert all(w.isfinite().all() for w in weights_of(recipe.out).values())


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    real = training.validate

    def scripted(*arguments, **options):
        return dataclasses.replace(real(*arguments, **options), score=next(scores))

    monkeypatch.setattr(training, "validate", scripted)
    run = train(dataclasses.replace(TINY, out=tmp_path / "run", epochs=5, patience=2))
    assert [row["score"] for row in history_of(run)] == [0.5, 0.7, 0.6, 0.7]
    assert [path.name for path in run.glob("best-*")] == ["best-00000008"]


def test_bf16_trains_and_keeps_weights_in_fp32(tmp_path, finished):
    run = train(dataclasses.replace(TINY, out=tmp_path / "run", precision="bf16-mixed"))
    losses = [[row["loss"] for row in history_of(r)] for r in (run, finished)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)  # or it was not bf16
    assert {w.dtype for w in weights_of(run).values()} == {torch.float32}


def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path, finished, monkeypatch):
    calls, real = [], vit.checkpoint

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(vit, "checkpoint", counted)
    model = dataclasses.replace(TINY.model, gradient_checkpointing=True)
    run = train(dataclasses.replace(TINY, out=tmp_path / "run", model=model))
    assert len(calls) == 8 * 4  # steps, blocks
    torch.testing.assert_close(weights_of(run), weights_of(finished), rtol=1e-3, atol=1e-4)


def test_it_prints_a_line_an_epoch_where_there_is_no_terminal(tmp_path, capsys):
    train(dataclasses.replace(TINY, out=tmp_path / "run"))
    settings, first, second, best = capsys.readouterr().out.rsplit("\n", 4)[:4]
    assert {"schedule=cosine", "data.data=phantom"} <= {*settings.split()}
    assert [line.split("  ")[0] for line in (first, second)] == ["epoch 1", "epoch 2"]
    for part in ("step 4/8", "loss ", "lr ", "samples/s", "left", "site=site 1"):
        assert part in first
    assert best.startswith("best: ")


def test_tensorboard_has_losses_rates_group_scores_loads_and_overlays(finished):
    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/balance", "train/learning_rate", "validation/score"} <= {
        *tags["scalars"]
    }
    row = history_of(finished)[-1]
    groups = [name.removeprefix("dice ") for name in row if name.startswith("dice ")]
    assert groups
    for group in groups:
        last = events.Scalars(f"validation/dice/{group}")[-1]
        assert last.value == pytest.approx(row[f"dice {group}"], rel=1e-6)
    assert "load/site" in tags["images"]
    assert any(tag.startswith("overlay/") for tag in tags["images"])
