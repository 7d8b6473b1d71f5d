"""Training: two processes as one, killed and resumed to the bit, errors before anything changes."""

import dataclasses
import errno
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from harness.trainings import (
    assert_same_tree,
    history_of,
    in_fork,
    killed_at,
    needs_fork,
    state_of,
    train_in_ranks,
    weights_of,
)
from helpers import HANG, needs_links
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.torch_version import TorchVersion

from dmoe_layer import importance_loss, load_balancing_loss, routing
from reference_models.data import DataSettings, PhantomSettings, open_dataset
from reference_models.data.cases import Attribute
from reference_models.data.framing import ImageFraming
from reference_models.data.loading import Batch, Frames, eval_batches, train_batches
from reference_models.data.phantom import Phantom
from reference_models.data.splits import make_splits, read_splits, write_splits
from reference_models.errors import RunError
from reference_models.models import transunet, vit
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.networks import TransUNetSettings, UNetSettings
from reference_models.recipes.presets import PRESETS
from reference_models.recipes.recipe import Recipe, learning_rate, resolve
from reference_models.recipes.serial import from_json, to_json
from reference_models.study.candidates import CandidateSettings
from reference_models.training import checkpoints
from reference_models.training import loop as training
from reference_models.training.loop import NonFiniteLossError, train
from reference_models.training.runs import Task, build_model, lock_run
from reference_models.training.validation import share_of, validate

# 18 training cases: 4 steps an epoch; 2 validation cases.
TINY = dataclasses.replace(
    PRESETS["small"],
    data=DataSettings(
        "phantom", phantom=PhantomSettings(cases=20, test_cases_per_group=1, image_size=32)
    ),
    framing=ImageFramingSettings(32, "whole", "paper"),
    batch_size=4,
    epochs=2,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the tiny recipe, as it comes out."""
    torch.set_num_threads(1)
    return train(dataclasses.replace(TINY, out=tmp_path_factory.mktemp("finished") / "run"))


# Recipes


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_comes_back_from_json_as_it_was(name):
    recipe = resolve(PRESETS[name])
    recipe = dataclasses.replace(recipe, patience=3, out=Path("a/b"))
    assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


def test_the_papers_numbers_are_the_presets():
    paper, released = resolve(PRESETS["paper"]), resolve(PRESETS["released"])
    assert (paper.epochs, paper.framing.crop, paper.framing.size, paper.batch_size) == (
        300,
        512,
        224,
        42,
    )
    assert (paper.optimizer, paper.learning_rate, paper.schedule) == ("adamw", 0.01, "exponential")
    assert (paper.lambda_dice, paper.lambda_ce) == (0, 1)
    ham = resolve(dataclasses.replace(PRESETS["paper"], data=DataSettings("ham10000")))
    assert (ham.epochs, ham.framing.crop) == (100, 1024)
    assert (released.optimizer, released.learning_rate) == ("sgd", 0.0175)
    assert (released.momentum, released.weight_decay, released.schedule) == (0.9, 1e-4, "poly")
    assert (released.lambda_dice, released.lambda_ce) == (0.5, 0.5)


def test_a_recipe_becomes_flags():
    presets = {name: (name, recipe) for name, recipe in PRESETS.items()}
    flags = ["paper", "--root", "x", "--fairness", "febs", "--crop", "whole", "--epochs", "7"]
    recipe = tyro.extras.overridable_config_cli(presets, args=flags)
    assert isinstance(recipe, Recipe)
    assert (recipe.fairness, recipe.framing.crop, recipe.epochs) == ("febs", "whole", 7)
    assert recipe.data.root == Path("x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": "paper"}, "epochs: got 'paper', which says nothing about phantom"),
        ({"framing": ImageFramingSettings(32)}, "crop: got 'paper'.*whole"),
        ({"batch_size": 5, "devices": 2}, "batch_size: got 5, expected a multiple of 2"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0, expected more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate: got inf, expected .* finite"),
        ({"balance_weight": float("inf")}, "balance_weight: got inf, expected .* finite"),
        ({"decay": 5.0}, "decay: got 5.0, expected more than 0 and at most 1"),
        ({"seed": -1}, "seed: got -1, expected 0 or more"),
        ({"seed": 2**64}, "seed: got 18446744073709551616, expected .* less than"),
        ({"warmup": 1.0}, "warmup: got 1.0"),
        ({"patience": 0}, "patience: got 0"),
        ({"lambda_dice": 0.0, "lambda_ce": 0.0}, "nothing to train by"),
        ({"lambda_dice": 0.0, "fairness": "febs"}, "febs scales the Dice loss"),
        ({"strategy": "fsdp", "precision": "16-mixed"}, "fsdp does not go with 16-mixed"),
        ({"framing": ImageFramingSettings(40, "whole")}, "multiples of 16"),
        ({"batch_size": 30}, "batch_size: got 30, but there are 18 training cases"),
        ({"attribute_dropout": 1.0}, "attribute_dropout: got 1.0"),
        ({"attribute_dropout": 0.5}, "unknown attributes are an error; choose --unknown learned"),
        (
            {"attribute_dropout": 0.5, "model": UNetSettings(block="mlp", unknown="average")},
            "attribute_dropout: got 0.5, but this network is told no attributes",
        ),
        (
            {"model": UNetSettings(), "framing": ImageFramingSettings(36, "whole")},
            "size: got 36, expected a multiple of 8",
        ),
        ({"model": UNetSettings(block="film", aware=False)}, "block: film has"),
        ({"model": UNetSettings(gradient_checkpointing=True)}, "gradient_checkpointing"),
        ({"model": UNetSettings(k=5, hidden=2)}, "hidden: got 2"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(RunError, match=words):
        train(dataclasses.replace(TINY, out=tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_fsdp_on_cpus_is_refused_where_pytorch_does_not_average_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RunError, match=r"fsdp on CPUs needs PyTorch 2\.10, here is 2\.8\.0"):
        train(dataclasses.replace(TINY, out=tmp_path / "run", strategy="fsdp"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(RunError, match="16-mixed needs a GPU"):
        train(dataclasses.replace(TINY, out=tmp_path / "run", precision="16-mixed"))


def test_learning_rates_follow_their_schedules():
    recipe = dataclasses.replace(TINY, epochs=5, learning_rate=2.0, warmup=0.0)
    rates = {
        schedule: [
            learning_rate(dataclasses.replace(recipe, schedule=schedule), step, 10)
            for step in range(50)
        ]
        for schedule in ("exponential", "poly", "cosine")
    }
    by_epoch = [2.0 * 0.01 ** (epoch / 4) for epoch in range(5) for _ in range(10)]
    assert rates["exponential"] == pytest.approx(by_epoch)
    assert rates["poly"][25] == pytest.approx(2.0 * 0.5**0.9)
    assert rates["cosine"][25] == pytest.approx(1.0)
    warm = dataclasses.replace(recipe, schedule="poly", warmup=0.2)
    assert learning_rate(warm, 4, 10) == pytest.approx(rates["poly"][4] / 2)
    assert learning_rate(warm, 9, 10) == pytest.approx(rates["poly"][9])


# One process and two


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


def test_cases_without_an_attribute_need_a_router_that_takes_them(tmp_path, monkeypatch):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", epochs=1)
    dataset = open_dataset(recipe.data)
    unknown = make_splits(dataset, 0).train[3]
    dataset.cases = [
        dataclasses.replace(c, attributes=(-1,)) if c.case_id == unknown else c
        for c in dataset.cases
    ]
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    with pytest.raises(RunError, match=rf"1 cases lack an attribute \({unknown} is one\)"):
        train(recipe)
    assert not recipe.out.exists()
    learned = dataclasses.replace(recipe.model, unknown="learned")
    train(dataclasses.replace(recipe, model=learned, fairness="group-dro"))
    weights_G = state_of(recipe.out)["objective"]["weights_G"]
    assert weights_G.shape == (4,)
    assert weights_G[3] > 0


def test_cases_without_an_attribute_can_be_left_out_and_are_named(tmp_path, monkeypatch, capsys):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", epochs=1, leave_out_unknown=True)
    dataset = open_dataset(recipe.data)
    splits = make_splits(dataset, 0)
    left_out = (splits.train[3], splits.validation[0])
    dataset.cases = [
        dataclasses.replace(c, attributes=(-1,)) if c.case_id in left_out else c
        for c in dataset.cases
    ]
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    seen = []
    load = Phantom.load
    monkeypatch.setattr(Phantom, "load", lambda *a: seen.append(a[1].case_id) or load(*a))
    train(recipe)
    printed = capsys.readouterr().out
    assert f"left out, an attribute not known: {', '.join(sorted(left_out))}" in printed
    assert "without a training case" not in printed
    assert not set(left_out) & set(seen)
    assert set(splits.validation[1:]) <= set(seen)


def test_leaving_out_the_unknown_must_leave_a_validation_case(tmp_path, monkeypatch):
    dataset = open_dataset(TINY.data)
    splits = make_splits(dataset, 0)
    write_splits(tmp_path / "splits.json", splits)
    data = dataclasses.replace(TINY.data, splits=tmp_path / "splits.json")
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", data=data, leave_out_unknown=True)
    left_out = splits.validation
    dataset.cases = [
        dataclasses.replace(c, attributes=(-1,)) if c.case_id in left_out else c
        for c in dataset.cases
    ]
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    with pytest.raises(RunError, match=r"leave_out_unknown: leaves no validation case \(of 2\)"):
        train(recipe)
    assert not recipe.out.exists()


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


@needs_fork
def test_a_launcher_that_started_another_number_of_processes_is_told(tmp_path):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run")
    codes, prints = train_in_ranks(recipe, tmp_path / "prints")
    assert codes == [1, 1]
    assert prints[0].startswith("devices, nodes: ")
    assert not recipe.out.exists()


# Killed and resumed


@needs_fork
def test_killed_and_resumed_it_ends_as_if_it_had_never_stopped(tmp_path):
    recipe = dataclasses.replace(
        TINY, checkpoint_every=3, fairness="group-dro", group_dro_rate=0.1, out=tmp_path / "whole"
    )
    whole = train(recipe)
    killed = dataclasses.replace(recipe, out=tmp_path / "killed")
    deaths = [
        2,  # before any checkpoint
        (os, "rename", 2),  # after the first checkpoint, before the best one has its name
        3,  # just after one in mid-epoch
        (checkpoints, "save_last", 1),  # between best and last
        (torch, "save", 1),  # within a checkpoint
        (checkpoints, "tidy", 2),  # two of each are there; the first call is from resuming
        6,
        (checkpoints.shutil, "rmtree", 1),  # as an old one is removed
    ]
    for n, where in enumerate(deaths):
        process = in_fork(killed_at, killed, n > 0, where)
        process.join()
        assert process.exitcode == -signal.SIGKILL, where
    resumed = train(killed, resume=True)
    assert_same_tree(weights_of(resumed), weights_of(whole))
    assert_same_tree(weights_of(resumed, "best"), weights_of(whole, "best"))
    assert_same_tree(state_of(resumed), state_of(whole))
    assert (resumed / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    names = [sorted(p.name for p in run.iterdir()) for run in (resumed, whole)]
    assert names[0] == names[1]  # nothing half done is left
    losses = {}
    for run in (resumed, whole):
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        losses[run] = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses[resumed] == losses[whole]
    assert [step for step, _ in losses[whole]] == list(range(1, 9))


# Attributes that are dropped, so that a route for the unknown is learned


@pytest.fixture
def two_attributes(monkeypatch):
    """The phantom with a second attribute, which means nothing."""
    dataset = open_dataset(TINY.data)
    dataset.attributes = (*dataset.attributes, Attribute("side", ("left", "right")))
    dataset.cases = [
        dataclasses.replace(case, attributes=(*case.attributes, place % 2))
        for place, case in enumerate(dataset.cases)
    ]
    load = dataset.load

    def loaded(case):
        sample = load(dataclasses.replace(case, attributes=case.attributes[:1]))
        return dataclasses.replace(sample, attributes=case.attributes)

    dataset.load = loaded
    monkeypatch.setattr(training, "open_dataset", lambda settings: dataset)
    return {case.case_id: list(case.attributes) for case in dataset.cases}


def test_samples_are_told_to_be_unknown_as_often_as_asked_for_and_groups_stay(
    tmp_path, monkeypatch, two_attributes
):
    told, batches, grouped = [], [], []
    call, step = training.forward_with_attributes, training.Run.step
    forward = training.Objective.forward

    def listening(model, inputs, told_BA):
        told.append(told_BA)
        return call(model, inputs, told_BA)

    def grouping(self, logits, mask, group_B):
        grouped.append(group_B)
        return forward(self, logits, mask, group_B)

    def stepping(self, batch, rate):
        batches.append(batch)
        return step(self, batch, rate)

    monkeypatch.setattr(training, "forward_with_attributes", listening)
    monkeypatch.setattr(training.Objective, "forward", grouping)
    monkeypatch.setattr(training.Run, "step", stepping)
    recipe = dataclasses.replace(
        TINY,
        out=tmp_path / "run",
        model=UNetSettings(widths=(4,), block="film", hidden=1, unknown="learned"),
        attribute_dropout=0.25,
        epochs=20,
    )
    train(recipe)
    told_NA = torch.cat(told)
    truth_NA = torch.tensor([two_attributes[case] for batch in batches for case in batch.case_ids])
    unknown_N = (told_NA == -1).all(1)
    assert len(told_NA) == 20 * 4 * 4
    assert torch.equal(told_NA[~unknown_N], truth_NA[~unknown_N])  # both are dropped, or neither
    # 320 draws of 1/4: 80, with a standard deviation of 7.7.
    assert 80 - 3 * 7.7 < int(unknown_N.sum()) < 80 + 3 * 7.7
    assert len({tuple((part == -1)[:, 0].tolist()) for part in told}) > 5
    assert torch.equal(torch.cat(grouped), truth_NA[:, 0])


@needs_fork
@pytest.mark.parametrize(
    "model",
    [
        UNetSettings(widths=(4,), block="film", unknown="learned"),
        CandidateSettings(widths=(4,), router="shared", unknown="learned"),
    ],
    ids=["film", "shared"],
)
def test_with_dropped_attributes_too_it_ends_as_if_it_had_never_stopped(tmp_path, model):
    recipe = dataclasses.replace(
        TINY, out=tmp_path / "whole", model=model, attribute_dropout=0.5, checkpoint_every=3
    )
    whole = train(recipe)
    killed = dataclasses.replace(recipe, out=tmp_path / "killed")
    for n, step in enumerate((3, 6)):  # in mid-epoch, and in the second
        process = in_fork(killed_at, killed, n > 0, step)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    resumed = train(killed, resume=True)
    assert_same_tree(weights_of(resumed), weights_of(whole))
    assert_same_tree(state_of(resumed), state_of(whole))
    _, _, network = checkpoints.load_model(resumed)
    assert_same_tree(dict(network.state_dict()), weights_of(whole, "best"))
    still = train(dataclasses.replace(recipe, attribute_dropout=0.0, out=tmp_path / "still"))
    assert not torch.equal(weights_of(still)["head.weight"], weights_of(whole)["head.weight"])


def test_every_step_and_every_rank_draw_noise_of_their_own(tmp_path, monkeypatch):
    seeds = {training.step_seed(*key) for key in itertools.product(range(3), range(40), range(4))}
    assert len(seeds) == 3 * 40 * 4
    drawn, real = [], training.step_seed

    def recorded(*key):
        drawn.append(key)
        return real(*key)

    monkeypatch.setattr(training, "step_seed", recorded)
    train(dataclasses.replace(TINY, out=tmp_path / "run", seed=5))
    assert drawn == [(5, step, 0) for step in range(8)]


def test_every_epoch_has_an_order_of_its_own(tmp_path, monkeypatch):
    epochs, real = [], training.train_batches

    def recorded(*arguments, **options):
        epochs.append((options["epoch"], options["first_batch"]))
        return real(*arguments, **options)

    monkeypatch.setattr(training, "train_batches", recorded)
    train(dataclasses.replace(TINY, out=tmp_path / "run"))
    assert epochs == [(0, 0), (1, 0)]


def test_a_finished_run_stays_as_it_is_when_resumed(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*.safetensors")}
    assert train(dataclasses.replace(TINY, out=finished), resume=True) == finished
    assert {path: path.read_bytes() for path in finished.rglob("*.safetensors")} == before


def test_other_settings_are_no_resumption_and_the_differing_ones_are_named(finished):
    other = dataclasses.replace(
        TINY,
        out=finished,
        epochs=3,
        model=dataclasses.replace(TINY.model, moe="none"),
        workers=1,
        devices=2,
    )
    with pytest.raises(RunError, match="other settings") as caught:
        training.require_same_run(finished, other, Task.of(open_dataset(other.data)))
    assert "model.moe: the run has 'shared', now 'none'" in str(caught.value)
    assert "epochs: the run has 2, now 3" in str(caught.value)
    assert not any(name in str(caught.value) for name in ("workers", "devices:", "out:"))


def test_another_presets_network_is_no_resumption(finished):
    other = dataclasses.replace(TINY, out=finished, model=UNetSettings())
    with pytest.raises(RunError, match=r"model.moe: the run has 'shared', now 'no such setting'"):
        train(other, resume=True)


def test_other_data_are_no_resumption(finished):
    task = Task(3, ("background", "organ"), ())
    with pytest.raises(RunError, match="data: the run was made for"):
        training.require_same_run(finished, dataclasses.replace(TINY, out=finished), task)


def test_a_folder_with_a_run_is_left_alone(finished):
    for path in finished.rglob("*"):
        os.utime(path, (0, 0))  # so that what is written shows, however soon it comes
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(RunError, match=r"holds a run already.*--resume"):
        train(dataclasses.replace(TINY, out=finished, seed=1))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@needs_fork
@pytest.mark.parametrize("resume", [False, True])
def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch, resume):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run")
    codes, real = [], training.validate
    says = tmp_path / "says.txt"

    def other():
        codes.append("of the first one")  # a training that is let in starts no third
        os.dup2(os.open(says, os.O_WRONLY | os.O_CREAT), 1)
        try:
            if not resume:  # as if it had looked before the first one wrote
                training.require_new_run = lambda run: None
            train(recipe, resume=resume)
        except RunError as error:
            os.write(1, str(error).encode())
            sys.exit(1)

    def meanwhile(*arguments, **options):
        if not codes:
            process = in_fork(other)
            process.join(HANG)  # which it would reach if it waited for the folder
            process.kill()
            codes.append(process.exitcode)
        return real(*arguments, **options)

    monkeypatch.setattr(training, "validate", meanwhile)
    train(recipe)
    assert codes == [1]
    assert "another process is training in it" in says.read_text(encoding="utf-8")
    assert len(history_of(recipe.out)) == 2


@needs_fork
def test_a_training_that_was_killed_holds_no_folder_through_its_workers(tmp_path):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run", workers=1, checkpoint_every=1)
    process = in_fork(killed_at, recipe, False, 2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(recipe, resume=True)


def test_a_training_lets_go_of_its_folder_however_it_ends(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RunError("no room")

    recipe = dataclasses.replace(TINY, out=tmp_path / "run", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(training, "validate", fails)
        with pytest.raises(RunError, match="no room") as ended:  # holds the traceback's frames
            train(recipe)
    with lock_run(recipe.out), pytest.raises(RunError, match="another process is training in it"):
        train(recipe, resume=True)
    train(recipe, resume=True)
    with lock_run(recipe.out):
        assert ended


@needs_links
def test_a_lock_that_cannot_be_taken_is_an_error(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "elsewhere")  # filelock follows none
    with pytest.raises(RunError, match="cannot be written to"), lock_run(tmp_path / "run"):
        pass


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_stops_no_training(tmp_path, monkeypatch, reason):
    fcntl = pytest.importorskip("fcntl", reason="filelock locks by other means there")

    def refused(*arguments):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refused)
    with lock_run(tmp_path / "run"), lock_run(tmp_path / "run"):
        (tmp_path / "run" / "history.csv").touch()
    with lock_run(tmp_path / "run"):  # nothing was left that would keep it
        pass


def test_there_is_nothing_to_resume_without_a_run(tmp_path):
    with pytest.raises(RunError, match="no run here"):
        train(dataclasses.replace(TINY, out=tmp_path / "none"), resume=True)
    assert not (tmp_path / "none").exists()


# What stops a run


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
        NonFiniteLossError, match=rf"^step 3 \(epoch 1\).*cases: {bad}\. "
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


# Precision and memory


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


@pytest.mark.parametrize("where", ["taken", "taken/run"])
def test_an_out_folder_that_cannot_be_is_refused(tmp_path, where):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError) as raised:
        train(dataclasses.replace(TINY, out=tmp_path / where))
    named = f"{tmp_path / where}: "
    assert str(raised.value).startswith((f"{named}is a file", f"{named}cannot be written to"))
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("module", "name", "error"),
    [
        (checkpoints, "save_file", checkpoints.SafetensorError("No space left on device")),
        (torch, "save", RuntimeError("unexpected pos 3318720 vs 3318672")),
        (os, "fsync", OSError(28, "No space left on device")),
    ],
)
def test_a_disk_that_is_full_ends_a_run_that_goes_on_when_there_is_room(
    tmp_path, finished, monkeypatch, module, name, error
):
    recipe = dataclasses.replace(TINY, out=tmp_path / "run")
    real, allowed = getattr(module, name), {"save_file": 2, "save": 1, "fsync": 12}[name]

    def full(*arguments, **options):
        nonlocal allowed
        allowed -= 1
        if allowed < 0:
            raise error
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, full)
        with pytest.raises(RunError, match=r"checkpoint of step 8 cannot be written.*--resume"):
            train(recipe)
    assert [left.name for left in recipe.out.glob(".*")] == [".lock"]
    assert_same_tree(weights_of(train(recipe, resume=True)), weights_of(finished))


# What is left behind


def test_the_best_weights_come_back_in_eval_mode_with_recipe_and_splits(finished):
    recipe, _, model = checkpoints.load_model(finished)
    splits = read_splits(finished / "splits.json", open_dataset(recipe.data))
    assert recipe == dataclasses.replace(TINY, out=finished)
    assert not model.training
    assert_same_tree(dict(model.state_dict()), weights_of(finished, "best"))
    assert len(splits.train) == 18


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, which):
    run = copied(finished, tmp_path)
    (folder,) = run.glob(f"{which}-*")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match=rf"{folder.name}.model.safetensors: damaged"):
        checkpoints.load_model(run, which)


def copied(run, to):
    return Path(checkpoints.shutil.copytree(run, to / "copy"))


def test_foreign_files_are_refused(finished, tmp_path):
    run = copied(finished, tmp_path)
    (folder,) = run.glob("best-*")
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(RunError, match="weights of another network"):
        checkpoints.load_model(run)
    checkpoints.shutil.rmtree(folder)
    with pytest.raises(RunError, match="has no best checkpoint yet; there is a last one"):
        checkpoints.load_model(run)
    content = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    content["recipe"]["model"]["experts"] = 8
    (run / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RunError, match=r"recipe\.model: got \['experts'\] besides"):
        checkpoints.load_model(run)
    # As an earlier version wrote it, which knew fewer settings.
    del content["recipe"]["model"]["experts"], content["recipe"]["attribute_dropout"]
    (run / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        RunError, match=r"recipe: .*lacks \['attribute_dropout'\].*written by another version"
    ) as caught:
        checkpoints.load_model(run)
    assert str(run / "recipe.json") in str(caught.value)
    (run / "recipe.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError, match="not a run's recipe"):
        checkpoints.load_model(run)
    with pytest.raises(RunError, match="no run here"):
        checkpoints.load_model(tmp_path)


class Spell:
    """What a pickle can do when it is opened."""

    def __reduce__(self):
        return (os.mkdir, ("spelled",))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", "pickle"])
def test_a_state_that_is_no_state_is_refused_and_not_run(finished, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    run = copied(finished, tmp_path)
    (folder,) = run.glob("last-*")
    if content == "pickle":
        torch.save(Spell(), folder / "state.pt")
    else:
        (folder / "state.pt").write_bytes(content)
    with pytest.raises(RunError, match=r"state.pt: damaged or not a run's state"):
        train(dataclasses.replace(TINY, out=run), resume=True)
    assert not Path("spelled").exists()


@pytest.mark.parametrize("part", ["weights", "optimizer", "position", "parameter"])
def test_a_last_checkpoint_of_something_else_is_refused(finished, tmp_path, part):
    run = copied(finished, tmp_path)
    (folder,) = run.glob("last-*")
    state = state_of(run)
    if part == "weights":
        save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    elif part == "parameter":
        state["optimizer"]["state"].popitem()
    elif part == "position":
        state["position"]["name"] = 3
    else:
        del state["optimizer"]
    torch.save(state, folder / "state.pt")
    with pytest.raises(RunError, match=r"copy: its last checkpoint is not this run's"):
        train(dataclasses.replace(TINY, out=run), resume=True)


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


# Validation


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
