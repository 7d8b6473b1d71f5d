"""A finished training, for the tests that look at what it left or go on from it."""

import dataclasses

import pytest
import torch
from harness.trainings import TINY

from reference_models.training.loop import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of the tiny recipe, as it comes out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = train(dataclasses.replace(TINY, out=tmp_path_factory.mktemp("finished") / "run"))
    torch.set_num_threads(before)
    return run
