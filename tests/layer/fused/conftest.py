"""Settings of the kernels' tests."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """Fills torch.empty with NaN (integers with their largest), so that what is unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
