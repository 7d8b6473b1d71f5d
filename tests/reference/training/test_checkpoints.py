"""Checkpoints: the best weights come back, and damaged or foreign files are refused."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from harness.trainings import (
    TINY,
    assert_same_tree,
    copied,
    state_of,
    weights_of,
)
from safetensors.torch import save_file

from reference_models.data import open_dataset
from reference_models.data.splits import read_splits
from reference_models.errors import RunError
from reference_models.training import checkpoints
from reference_models.training.loop import train

pytestmark = pytest.mark.usefixtures("one_thread")


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
    with pytest.raises(RunError, match=rf"{folder.name}.model.safetensors: this file is damaged"):
        checkpoints.load_model(run, which)


def test_foreign_files_are_refused(finished, tmp_path):
    run = copied(finished, tmp_path)
    (folder,) = run.glob("best-*")
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(RunError, match="weights are of another network"):
        checkpoints.load_model(run)
    checkpoints.shutil.rmtree(folder)
    with pytest.raises(RunError, match="this run has no best checkpoint yet; use --which last"):
        checkpoints.load_model(run)
    content = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    content["recipe"]["model"]["experts"] = 8
    (run / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        RunError,
        match=r"recipe\.model: it has settings \(experts\) that this version does not know",
    ):
        checkpoints.load_model(run)
    # As an earlier version wrote it, which knew fewer settings.
    del content["recipe"]["model"]["experts"], content["recipe"]["attribute_dropout"]
    (run / "recipe.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        RunError,
        match=r"recipe: .*lacks settings \(attribute_dropout\).*another version of this project",
    ) as caught:
        checkpoints.load_model(run)
    assert str(run / "recipe.json") in str(caught.value)
    (run / "recipe.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RunError, match="is not the recipe of a run"):
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
    with pytest.raises(
        RunError, match=r"state.pt: this file is damaged or is not the state of a run"
    ):
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
    with pytest.raises(RunError, match=r"copy: the last checkpoint does not belong to this run"):
        train(dataclasses.replace(TINY, out=run), resume=True)
