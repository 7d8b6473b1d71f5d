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
PROGRAM = r"""
import sys, torch
from benchmarks.kernels.binary import compile_for, dump
from benchmarks.kernels.launches import LayerStep
dim, activation, kernel, *capabilities = sys.argv[1:]
for capability in map(int, capabilities):
    step = LayerStep(int(dim), torch.bfloat16, activation, capability=capability)
    launch = next(launch for launch in step.launches() if launch.kernel.__name__ == kernel)
    print(dump("--dump-sass", compile_for(launch, capability)), end="\f")
"""


def row_loops(code):
    """The instructions' names of each loop that reads memory, without those that have another."""
    names, loops = find_loops(code)
    reading = [loop for loop in loops if any(names[i].startswith("LDG") for i in loop)]
    innermost = [loop for loop in reading if not any(other < loop for other in reading)]
    return [[names[i] for i in loop] for loop in innermost]


def disassemblies(*what):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, what)],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\f")[:-1]


@pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists(),
    reason="this Triton brings no disassembler",
)
@pytest.mark.parametrize(
    ("dim", "activation", "kernel", "count", "capabilities"),
    [
        (24, "relu", "weight_gradients_kernel", 1, (80, 90, 100)),
        (24, "swiglu", "weight_gradients_kernel", 1, (80, 90, 100)),
        (48, "gelu", "weight_gradients_kernel", 1, (80, 86, 90, 100)),
        # For each layer, with the bias and without.
        (768, "relu", "weight_backward_kernel", 4, (80, 90, 100)),
    ],
)
def test_rows_are_fetched_ahead_and_summed_without_passing_numbers_on(
    dim, activation, kernel, count, capabilities
):
    codes = disassemblies(dim, activation, kernel, *capabilities)
    for capability, code in zip(capabilities, codes, strict=True):
        found = row_loops(code)
        assert len(found) == count
        for names in found:
            assert any(name.startswith("LDGSTS") for name in names)
            # On 10.0 products may stand behind the program's end, where no loop is found.
            assert capability == 100 or any("MMA" in name for name in names)
            # There a narrow kernel's warps take their own number from their first thread, once.
            own = ["SHFL.IDX"] if capability == 100 and dim < 768 else []
            assert [name for name in names if name.startswith("SHFL")] in ([], own)
