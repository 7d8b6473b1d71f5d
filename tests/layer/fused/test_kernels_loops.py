"""What stands in the loops over rows of the weights' gradients, from the disassembly.

No GPU is needed; a process of its own, since Triton must not be in interpreter mode.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys, torch
from benchmarks.kernels.binary import compile_for, dump
from benchmarks.kernels.launches import LayerStep
launches = LayerStep(int(sys.argv[1]), torch.bfloat16).launches()
launch = next(launch for launch in launches if launch.kernel.__name__ == sys.argv[2])
print(dump("--dump-sass", compile_for(launch, 90)))
"""


def loops(code):
    """The instructions of each loop that multiplies matrices, from its end's jump back to it."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", code)
    instructions = [(int(address, 16), text) for address, text in found]
    jumps = [
        (int(target.group(1), 16), address)
        for address, text in instructions
        if (target := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))
    ]
    bodies = (
        [text for address, text in instructions if first <= address <= last]
        for first, last in jumps
        if first < last
    )
    return [body for body in bodies if any("MMA" in text for text in body)]


@pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists(),
    reason="this Triton brings no disassembler",
)
@pytest.mark.parametrize(
    ("dim", "kernel", "count"),
    [(24, "weight_gradients_kernel", 1), (768, "weight_backward_kernel", 4)],
)
def test_rows_are_fetched_ahead_and_summed_without_passing_numbers_on(dim, kernel, count):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(dim), kernel],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    found = loops(done.stdout)
    assert len(found) == count  # of the wide kernel, for each layer, with the bias and without
    for body in found:
        assert any(text.split()[0].startswith("LDGSTS") or " LDGSTS" in text for text in body)
        assert not any("SHFL" in text for text in body)
