"""Settings shared by all tests."""

import importlib.util
import os

import hypothesis
import pytest
import torch

# So that an assert in a harness tells what it compared, as one in a test does.
pytest.register_assert_rewrite("harness", "helpers")

# Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before
# anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Deadlines measure the machine, not the code, and so does the check that examples are made quickly.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    print_blob=True,
)
hypothesis.settings.load_profile("default")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Fixtures of a folder are found all the same; as modules with doctests, two of them would clash.
collect_ignore_glob = ["*/conftest.py"]
# What cuBLAS needs to be deterministic, read when a GPU is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _fresh_state():
    torch.manual_seed(0)
    yield
    torch.compiler.reset()


@pytest.fixture
def one_thread():
    """Two threads wait for each other where every core has a test already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_configure(config):
    # Modules that import what is not there are not looked through for doctests.
    needed = {
        "src/dmoe_layer/fused/*": "triton",
        "tests/harness/fake_gpu.py": "triton",
        "benchmarks/export/*": "monai",
        "tests/benchmarks/export/*": "monai",
        "benchmarks/volumes/*": "monai",
        "reference_models/nnunet/*": "nnunetv2",
    }
    missing = [
        str(config.rootpath / room)
        for room, package in needed.items()
        if not importlib.util.find_spec(package)
    ]
    config.option.ignore_glob = [*(config.option.ignore_glob or []), *missing]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
