"""What stands in the loops over rows of the weights' gradients, from the disassembly.

No GPU is needed; a process of its own, since Triton must not be in interpreter mode.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.loops import find_loops

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys, torch
from benchmarks.kernels.binary import compile_for, dump
from benchmarks.kernels.launches import LayerStep
capability = int(sys.argv[3])
launches = LayerStep(int(sys.argv[1]), torch.bfloat16, capability=capability).launches()
launch = next(launch for launch in launches if launch.kernel.__name__ == sys.argv[2])
print(dump("--dump-sass", compile_for(launch, capability)))
"""


def row_loops(code):
    """The instructions' names of each loop that reads memory, without those that have another."""
    names, loops = find_loops(code)
    reading = [loop for loop in loops if any(names[i].startswith("LDG") for i in loop)]
    innermost = [loop for loop in reading if not any(other < loop for other in reading)]
    return [[names[i] for i in loop] for loop in innermost]


@pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists(),
    reason="this Triton brings no disassembler",
)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dim", "kernel", "count"),
    [(24, "weight_gradients_kernel", 1), (768, "weight_backward_kernel", 4)],
)
def test_rows_are_fetched_ahead_and_summed_without_passing_numbers_on(
    dim, kernel, count, capability
):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(dim), kernel, str(capability)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found = row_loops(done.stdout)
    assert len(found) == count  # of the wide kernel, for each layer, with the bias and without
    for names in found:
        assert any(name.startswith("LDGSTS") for name in names)
        # A sum over threads passes numbers on by SHFL.BFLY. By SHFL.IDX, on 10.0, a warp takes the
        # number of its first thread, which is the number of all.
        assert not any(name.startswith("SHFL") and name != "SHFL.IDX" for name in names)
