"""The benchmark of the 3D network compares the same maths, and says what it left out."""

import csv
import dataclasses

import pytest
import torch

from benchmarks.arguments import chosen_names
from benchmarks.machine import run_facts
from dmoe_layer import DMoE

pytest.importorskip("monai")  # of whose blocks the network is made
from benchmarks.volumes import command, runner, steps
from benchmarks.volumes.rows import VolumeRow, section, table
from benchmarks.volumes.runner import measure_patch
from benchmarks.volumes.steps import NETWORKS, LoopSlot, Patch, Step

CPU = torch.device("cpu")
PATCH = Patch(1, (64, 32, 32))
FACTS = run_facts(CPU, torch.float32)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Networks of two features."""
    whole = steps.ResUNet3D
    monkeypatch.setattr(steps, "ResUNet3D", lambda **options: whole(2, **options))


def rows_of(patch=PATCH, *, networks=tuple(NETWORKS), rounds=0, smaller=()):
    return measure_patch(
        patch,
        list(networks),
        device=CPU,
        dtype=torch.float32,
        rounds=rounds,
        facts=FACTS,
        smaller=list(smaller),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loop_of_masks_computes_the_layers_formula(dtype):
    layer = DMoE(6, channel_dim=1, residual=True).eval()
    x = torch.randn(2, 6, 4, 3, 5, requires_grad=True)
    results = []
    for module in (layer, LoopSlot(layer).eval()):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y = module(x, mask=None)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, dx))
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    )
    torch.testing.assert_close(results[1], results[0], **tolerance)


def test_the_networks_are_what_their_names_say():
    steps = {name: Step(name, PATCH, CPU, torch.float32) for name in NETWORKS}
    moes = {
        name: {type(stage.moe) for stage in step.network.encoder} for name, step in steps.items()
    }
    none = type(None)
    assert moes == {
        "dense": {none},
        "mask-loop": {LoopSlot},
        "ours": {DMoE},
        "ours-half-masked": {DMoE},
        "dense-checkpointed": {none},
        "ours-checkpointed": {DMoE},
    }
    assert {n for n, s in steps.items() if s.network.gradient_checkpointing} == {
        "dense-checkpointed", "ours-checkpointed"
    }  # fmt: skip
    assert steps["ours"].network.encoder[0].moe.attribute_sizes == 4
    masks = {name: step.inputs[1] for name, step in steps.items() if len(step.inputs) > 1}
    assert {name: mask.float().mean() for name, mask in masks.items()} == {"ours-half-masked": 0.5}
    assert all(step.network.training for step in steps.values())


def test_the_first_row_is_what_others_are_compared_with():
    dense, loop, ours, masked, _, checkpointed = rows = rows_of(rounds=2)
    assert {row.status for row in rows} == {"measured"}
    assert (dense.peak_ratio, dense.time_ratio) == (1, 1)
    assert all(row.rounds == 2 and row.low_ms <= row.median_ms <= row.high_ms for row in rows)
    assert all(row.peak_ratio == row.peak_bytes / dense.peak_bytes for row in rows)
    assert loop.held_bytes > ours.held_bytes > masked.held_bytes > dense.held_bytes
    assert checkpointed.held_bytes < dense.held_bytes


def test_memory_counts_what_the_network_keeps():
    kept = Step("dense", PATCH, CPU, torch.float32).memory()[1]
    # At the least the first stage's five maps, two channels of an eighth of the voxels.
    assert kept > 5 * 2 * 4 * PATCH.voxels / 8


def test_what_would_not_fit_is_left_out_and_said(monkeypatch):
    smaller = rows_of(networks=["dense", "ours"])
    monkeypatch.setattr(runner, "free_bytes", lambda: 2.0 * smaller[0].peak_bytes)
    larger = Patch(1, (192, 64, 32))
    (row,) = rows_of(larger, networks=["dense"], smaller=smaller)
    assert row.status.startswith("left out: would take")
    assert (row.peak_bytes, row.median_ms) == (None, None)
    assert "left out" in table([row])
    monkeypatch.setattr(runner, "free_bytes", lambda: 2.0**50)
    assert runner._too_large("dense", larger, smaller) == ""


def test_a_gpu_that_runs_out_of_memory_is_a_row(monkeypatch):
    def raise_it(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "memory", raise_it)
    (row,) = rows_of(networks=["ours"])
    assert row.status == "out of memory"


def test_large_patches_are_not_timed_on_a_cpu(monkeypatch):
    monkeypatch.setattr(runner, "_TIMED_ON_CPU", 0)
    (row,) = rows_of(networks=["dense"], rounds=1)
    assert row.peak_bytes
    assert row.median_ms is None


def test_the_command_writes_a_csv_of_all_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "QUICK", "1x32x32x64")
    words = ["--device", "cpu", "--rounds", "1", "--networks", "dense,ours", "--out", str(tmp_path)]
    assert command.main(["--quick", *words]) == 0
    with open(tmp_path / "volumes-cpu.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [field.name for field in dataclasses.fields(VolumeRow)]
    assert [(row["network"], row["patch"], row["dtype"]) for row in found] == [
        ("dense", "32x32x64", "float32"),
        ("ours", "32x32x64", "float32"),
    ]
    assert "1×32×32×64 | ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--patches", "64x64x64"], "patches: got '64x64x64', expected batch x three sides"),
        (["--patches", "1x64x0x64"], "patches: got"),
        (["--networks", "theirs"], "networks: got 'theirs', expected all or some of dense, mask-"),
        (["--rounds", "-1"], "rounds: got -1"),
    ],
)
def test_wrong_words_are_errors(words, said, capsys):
    assert command.main([*words, "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


def test_the_section_says_where_and_names_every_dtype():
    (row,) = rows_of(networks=["dense"])
    text = section([row, dataclasses.replace(row, dtype="bfloat16")])
    assert text.startswith("**CPU only")
    assert row.machine in text
    assert "float32:" in text
    assert "bfloat16:" in text


def test_patches_come_smallest_first_and_networks_by_name():
    patches = command.parse_patches("2x64x64x64,1x64x64x32")
    assert [patch.voxels for patch in patches] == [64**2 * 32, 2 * 64**3]
    assert chosen_names("networks", "all", NETWORKS) == list(NETWORKS)
    assert chosen_names("networks", "ours,dense", NETWORKS) == ["ours", "dense"]
