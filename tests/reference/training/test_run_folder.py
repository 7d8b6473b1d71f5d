"""A run's folder: it is one training's alone, and a full disk loses nothing."""

import dataclasses
import errno
import os
import signal
import sys

import pytest
import torch
from harness.trainings import (
    TINY,
    assert_same_tree,
    history_of,
    in_fork,
    killed_at,
    needs_fork,
    weights_of,
)
from helpers import HANG, needs_links

from reference_models.errors import RunError
from reference_models.training import checkpoints
from reference_models.training import loop as training
from reference_models.training.loop import train
from reference_models.training.runs import lock_run

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert "another process is training in this folder" in says.read_text(encoding="utf-8")
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
    with (
        lock_run(recipe.out),
        pytest.raises(RunError, match="another process is training in this folder"),
    ):
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


@pytest.mark.parametrize("where", ["taken", "taken/run"])
def test_an_out_folder_that_cannot_be_is_refused(tmp_path, where):
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError) as raised:
        train(dataclasses.replace(TINY, out=tmp_path / where))
    named = f"{tmp_path / where}: "
    said = (f"{named}this is a file, expected", f"{named}this folder cannot be written to")
    assert str(raised.value).startswith(said)
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
