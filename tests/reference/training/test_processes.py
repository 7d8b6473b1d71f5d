"""Several processes: they train as one, and a machine that cannot do it says so."""

import dataclasses
import signal

import pytest
import torch
from harness.trainings import (
    TINY,
    history_of,
    needs_fork,
    state_of,
    train_in_ranks,
    weights_of,
)
from torch.torch_version import TorchVersion

from dmoe_layer import routing
from reference_models.data import open_dataset
from reference_models.data.framing import ImageFraming
from reference_models.data.loading import Batch, Frames, train_batches
from reference_models.data.splits import read_splits
from reference_models.errors import RunError
from reference_models.models import transunet
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.networks import TransUNetSettings, UNetSettings
from reference_models.training.loop import train
from reference_models.training.runs import Task, build_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_dropout(monkeypatch):
    still = dataclasses.replace(transunet.VARIANTS["small"], dropout=0.0)
    monkeypatch.setitem(transunet.VARIANTS, "small", still)


@pytest.fixture
def quiet_recipe(no_dropout):
    """Nothing random, and SGD: Adam would blow up what rounding does to gradients near zero."""
    return dataclasses.replace(
        TINY,
        model=TransUNetSettings(variant="small", noise="never"),
        optimizer="sgd",
        framing=ImageFramingSettings(32, "whole", "none"),
        learning_rate=0.05,
        balance_weight=0.0,
        fairness="group-dro",
        group_dro_rate=0.1,
    )


@pytest.fixture
def in_double(monkeypatch):
    """Everything but the loss in fp64, so that sums in another order turn no hidden unit over at
    its kink, and no route, by their rounding."""
    monkeypatch.setattr(
        Batch,
        "to",
        lambda batch, device: dataclasses.replace(batch, image_BCS=batch.image_BCS.double()),
    )
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@needs_fork
@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize(("strategy", "deaths"), [("ddp", []), ("fsdp", [5])])
def test_two_processes_have_the_losses_and_weights_of_one(tmp_path, quiet_recipe, strategy, deaths):
    one = train(dataclasses.replace(quiet_recipe, out=tmp_path / "one"))
    two = dataclasses.replace(quiet_recipe, out=tmp_path / "two", devices=2, strategy=strategy)
    for step in deaths:
        codes, _ = train_in_ranks(two, tmp_path / "prints", where=step)
        assert codes == [-signal.SIGKILL] * 2
    codes, (first_prints, second_prints) = train_in_ranks(two, tmp_path / "prints")
    assert codes == [0, 0], second_prints
    assert "epoch 2" in first_prints
    assert second_prints == ""
    for row, other in zip(history_of(one), history_of(two.out), strict=True):
        losses = [
            {k: v for k, v in r.items() if "dice" not in k and k != "score"} for r in (row, other)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert row == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(weights_of(two.out), weights_of(one), rtol=1e-5, atol=1e-6)
    momenta = [
        {
            name: kept["momentum_buffer"]
            for name, kept in state_of(run)["optimizer"]["state"].items()
        }
        for run in (two.out, one)
    ]
    torch.testing.assert_close(*momenta, rtol=1e-5, atol=1e-6)


@needs_fork
def test_the_balance_loss_and_its_gradient_are_means_over_ranks(tmp_path, quiet_recipe):
    recipe = dataclasses.replace(
        quiet_recipe, out=tmp_path / "run", balance_weight=3.0, z_weight=0.5, fairness="none",
        epochs=1, batch_size=18, devices=2, strategy="ddp", momentum=0.0, weight_decay=0.0,
        warmup=0.0, schedule="poly", lambda_dice=0.0,
    )  # fmt: skip
    codes, _ = train_in_ranks(recipe, tmp_path / "prints")
    assert codes == [0, 0]
    # The one step that this makes, worked out from each rank's own balance loss.
    dataset = open_dataset(recipe.data)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, Task.of(dataset))
    splits = read_splits(recipe.out / "splits.json", dataset)
    frames = Frames(
        dataset, splits.train, ImageFraming(32), augment=recipe.framing.augment, seed=recipe.seed
    )
    parts = [
        next(iter(train_batches(frames, batch_size=18, epoch=0, rank=rank, world_size=2)))
        for rank in range(2)
    ]
    balances, total = [], torch.zeros(())
    for part in parts:
        with routing(part.attributes_BN) as r:
            logits = model(part.image_BCS)
        balances.append(r.load_balancing_loss())
        cross_entropy = torch.nn.functional.cross_entropy(logits, part.mask_BS)
        total = total + (cross_entropy + 3.0 * balances[-1] + 0.5 * r.router_z_loss()) / 2
    total.backward()
    (row,) = history_of(recipe.out)
    assert row["balance"] == pytest.approx(sum(b.item() for b in balances) / 2, rel=1e-5)
    assert row["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert abs(balances[0].item() - balances[1].item()) > 1e-3  # else the mean says nothing
    stepped = {n: (p - 0.05 * p.grad).detach() for n, p in model.named_parameters()}
    torch.testing.assert_close(weights_of(recipe.out), stepped, rtol=1e-4, atol=1e-6)


@needs_fork
@pytest.mark.parametrize("block", ["film", "moe"])
def test_the_studys_network_is_told_the_attributes_by_two_processes_as_by_one(tmp_path, block):
    recipe = dataclasses.replace(
        TINY, out=tmp_path / "run", model=UNetSettings(widths=(4,), block=block, hidden=2), epochs=1
    )
    codes, prints = train_in_ranks(dataclasses.replace(recipe, devices=2), tmp_path / "prints")
    assert codes == [0, 0], prints
    assert len(history_of(recipe.out)) == 1


@needs_fork
def test_a_launcher_that_started_another_number_of_processes_is_told(tmp_path):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run")
    codes, prints = train_in_ranks(recipe, tmp_path / "prints")
    assert codes == [1, 1]
    assert prints[0].startswith("devices, nodes: ")
    assert not recipe.out.exists()


def test_fsdp_on_cpus_is_refused_where_pytorch_does_not_average_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match=r"got fsdp, but PyTorch 2\.8\.0 does not average"):
        train(dataclasses.replace(TINY, out=tmp_path / "run", strategy="fsdp"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(RunError, match="16-mixed, which needs a GPU"):
        train(dataclasses.replace(TINY, out=tmp_path / "run", precision="16-mixed"))
