"""What a step launches, what the sweep changes of it, and that what is prewarmed is found.

Triton must not be in interpreter mode, hence one process of its own for all of it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kernels.sweep import CANDIDATES

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, os, sys
from itertools import product
sys.path[:0] = ["tests"]
import harness.fake_gpu
import torch
from benchmarks.kernels import prewarm
from benchmarks.kernels.__main__ import NETWORK_STAGES, timed_steps
from benchmarks.kernels.launches import LayerStep, intercepted
from benchmarks.kernels.report import GOALS
from benchmarks.kernels.sweep import CANDIDATES
from benchmarks.layer import runner
from benchmarks.layer.check import relative_error
from benchmarks.layer.ours import Ours
from benchmarks.layer.problem import Problem
from benchmarks.measure import Stopwatch
from benchmarks.profiled import Meter
from dmoe_layer import DMoE, routing

def step(name, **options):
    return LayerStep.of(GOALS[name], torch.bfloat16, balanced=False, **options)

found = {"launches": {name: len(step(name).launches()) for name in GOALS}, "changed": {}}
for name, candidates in CANDIDATES.items():
    own = step(name).launches()
    for blocks in candidates:
        others = step(name, blocks=blocks).launches()
        changed = [
            a.kernel.__name__ for a, b in zip(own, others, strict=True) if a.key != b.key
        ]
        found["changed"][f"{name} {blocks}"] = changed

cpu = torch.device("cpu")
found["memory"] = {}
for name in ("stage-0", "stage-0-wide"):
    shape = GOALS[name]
    layer = DMoE(shape.dim, attribute_sizes=shape.values, dtype=torch.bfloat16, backend="triton")
    x, dy = (torch.empty(1, shape.tokens, shape.dim, dtype=torch.bfloat16) for _ in range(2))
    for tensor in (x, *layer.parameters()):
        tensor.grad = torch.empty_like(tensor)
    with intercepted(lambda launch: None), Meter(cpu) as meter:
        y = layer(x.requires_grad_(), torch.zeros(1, dtype=torch.long))
        meter.mark()
        y.backward(dy)
    (held, _), (_, peak) = meter.marks
    found["memory"][name] = [held / x.nbytes - 1, peak / x.nbytes - 1]
    del layer, x, y, dy, tensor

warm = {one.launch.key for one in prewarm.compilations(timed_steps(90, own=True))}
found["cold"], watch = [], Stopwatch(cpu)
for shape in GOALS.values():
    problem = Problem.random(shape, "cpu", torch.bfloat16)
    layer, launches = Ours(problem, "eager"), []
    layer.layer.backend = "triton"
    with intercepted(launches.append):
        relative_error(layer, problem)  # of numbers that nobody computed
        runner.step_laps(watch, layer.train(), problem)
        runner.eval_laps(watch, layer, problem)
        runner._route(layer, problem)
    found["cold"] += [l.kernel.__name__ for l in launches if l.key not in warm]

for (dim, tokens), dtype in product(NETWORK_STAGES, (torch.bfloat16, torch.float32)):
    layer = DMoE(dim, attribute_sizes=4, residual=True, channel_dim=1, backend="triton")
    x, launches = torch.empty(1, dim, tokens, 1, 1, dtype=dtype, requires_grad=True), []
    with intercepted(launches.append), torch.autocast("cpu", torch.bfloat16):
        with routing(torch.tensor([3])):
            layer(x).sum().backward()
    found["cold"] += [l.kernel.__name__ for l in launches if l.key not in warm]

def files():
    return sorted(f for _, _, names in os.walk(os.environ["TRITON_CACHE_DIR"]) for f in names)

cheap = ("sum_pairs_kernel", "sort_kernel")  # to compile
launches = [l for l in step("stage-0").launches() if l.kernel.__name__ in cheap]
todo = prewarm.compilations([step("stage-0"), step("stage-0", gradients=False)])
todo = [one for one in todo if one.launch.kernel.__name__ in cheap]
found["todo"], found["errors"] = len(todo), [prewarm.compile_one(one) for one in todo]
found["files"] = [len(files())]
for launch in launches:
    launch.kernel.device_caches.clear()
    launch.kernel[launch.grid](*launch.arguments, **launch.options)
found["files"].append(len(files()))
print(json.dumps(found))
"""
# Of a training step: no more, and where they are fewer the number here goes down.
LAUNCHES = {"2d": 13, "stage-0": 11, "stage-0-wide": 11}
# In units of x: what is kept for backward beside x and y, and the peak beside them where gradients
# are there already. ``test_gpu`` asks for 1.5 and 4 at most.
MEMORY = {"stage-0": (0.89, 3.05), "stage-0-wide": (0.53, 2.61)}
# What the candidates' first words name.
KERNELS = {
    "weights": {"weight_gradients_kernel"},
    "rows": {"mlp_backward_kernel"},
    "forward": {"mlp_kernel"},
    "gemm": {"hidden_kernel", "output_kernel", "hidden_backward_kernel", "weight_backward_kernel"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        },
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_all_that_the_benchmark_and_the_3d_network_run_is_prewarmed(found):
    assert found["cold"] == []


def test_a_training_step_launches_as_many_kernels_as_it_did(found):
    assert found["launches"] == LAUNCHES


@pytest.mark.parametrize("shape", MEMORY)
def test_a_training_step_takes_no_more_memory_than_it_did(found, shape):
    for measured, most in zip(found["memory"][shape], MEMORY[shape], strict=True):
        assert most - 0.02 <= measured <= most


@pytest.mark.parametrize(
    ("shape", "blocks"), [(s, b) for s, found in CANDIDATES.items() for b in found]
)
def test_a_candidate_of_the_sweep_changes_the_launches_that_it_names(found, shape, blocks):
    changed = found["changed"][f"{shape} {blocks}"]
    assert changed
    assert set(changed) <= KERNELS[blocks.split(":")[0]]


def test_a_launch_finds_what_was_prewarmed(found):
    assert found["errors"] == [""] * found["todo"]
    before, after = found["files"]
    assert after == before > 0
