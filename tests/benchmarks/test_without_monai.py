"""What runs on a GPU machine without MONAI can be collected without it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A finder that comes first says of MONAI that it is not there, to imports and to those who ask.
HIDDEN = """
import sys
class Hides:
    def find_spec(name, *_):
        if name.split(".")[0] == "monai":
            raise ModuleNotFoundError("No module named 'monai'", name="monai")
sys.meta_path.insert(0, Hides)
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == "monai" else found(name, *rest)
"""


def without_monai(program):
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + program], cwd=ROOT, capture_output=True, encoding="utf-8"
    )


def test_the_kernels_tests_and_the_benchmarks_are_collected_without_monai():
    words = ["--collect-only", "-p", "no:cacheprovider"]
    words += ["tests/layer/fused", "tests/benchmarks", "benchmarks"]
    done = without_monai(f"import pytest; sys.exit(pytest.main({words}))")
    assert done.returncode == 0, done.stdout[-3000:]
    for name in ("test_gpu.py", "test_kernels_layer.py", "test_kernels_exact.py"):
        assert f"tests/layer/fused/{name}::" in done.stdout
    assert "test_kernels_upcycled.py::" not in done.stdout  # that alone needs MONAI's models


def test_the_benchmark_of_volumes_says_that_it_needs_monai():
    program = "import runpy; runpy.run_module('benchmarks.volumes', run_name='__main__')"
    done = without_monai(program)
    assert done.returncode == 1
    assert "MONAI is not installed" in done.stderr
    assert "Traceback" not in done.stderr
