"""What the tests of training share: a small recipe, a run's files, processes started and killed."""

import csv
import dataclasses
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from reference_models.data import DataSettings, PhantomSettings
from reference_models.errors import RunError
from reference_models.recipes.framings import ImageFramingSettings
from reference_models.recipes.presets import PRESETS
from reference_models.training import loop as training
from reference_models.training.loop import train

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


def copied(run, to):
    return Path(shutil.copytree(run, to / "copy"))


def weights_of(run, which="last"):
    (folder,) = run.glob(f"{which}-*")
    return load_file(folder / "model.safetensors")


def state_of(run):
    (folder,) = run.glob("last-*")
    return torch.load(folder / "state.pt", weights_only=True)


def history_of(run):
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def assert_same_tree(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tree(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_tree(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# A fork takes along what a test has patched.
needs_fork = pytest.mark.skipif(
    mp.get_all_start_methods()[:1] == ["spawn"], reason="this system has no fork that is safe"
)


def in_fork(target, *arguments):
    process = mp.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def as_rank(recipe, rank, world, port, prints, where):
    """Trains as one of torchrun's processes, its output into a file; may die as `killed_at`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with (prints / f"{rank}.txt").open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file  # pytest has put its own there
        try:
            if where is None:
                train(recipe, resume=recipe.out.exists())
            else:
                killed_at(recipe, False, where)
        except RunError as error:
            print(error)
            sys.exit(1)


def train_in_ranks(recipe, prints, where=None, world=2):
    """Exit codes and prints of that many processes, which go on with a run that is there."""
    prints.mkdir(exist_ok=True)
    # They meet at a port that this process holds, as torchrun's do: one that was free a moment ago
    # may be another's by the time that rank 0 takes it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        in_fork(as_rank, recipe, rank, world, store.port, prints, where) for rank in range(world)
    ]
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    return codes, [(prints / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(world)]


def killed_at(recipe, resume, where):
    """Trains until it kills itself: at a step, or as the function named is called the n-th time."""
    if isinstance(where, int):
        step = training.Run.step

        def lethal(self, *arguments):
            if self.state.position.step == where:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *arguments)

        training.Run.step = lethal
    else:
        module, name, left = where
        act = getattr(module, name)

        def lethal(*arguments, **options):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **options)

        setattr(module, name, lethal)
    train(recipe, resume=resume)
