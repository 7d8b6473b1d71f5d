"""Settings of the kernels' tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Sums in larger blocks, where Triton's interpreter runs each program one by one in Python."""
    if not torch.cuda.is_available():
        pytest.importorskip("triton")
        monkeypatch.setattr("dmoe_layer.fused.launch.sum_block", lambda _: 512)


@pytest.fixture
def poisoned():
    """Fills torch.empty with NaN (integers with their largest), so that what is unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
