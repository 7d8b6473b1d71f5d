"""Settings shared by all tests."""

import os

import hypothesis
import pytest
import torch

# Deadlines measure the machine, not the code.
hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()
