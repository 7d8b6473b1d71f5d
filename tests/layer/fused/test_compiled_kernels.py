"""Every kernel compiles for real GPUs at the goals' widths, fits, and spills nothing.

No GPU is needed: Triton brings the assembler. It must not be in interpreter mode, hence a process
of its own for each compilation.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.kernel_reports import committed_rows

from benchmarks.kernels.gpus import GPUS
from benchmarks.kernels.report import KernelRow

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
# Compiled are a training step's launches; where experts are gated those that are others then.
PROGRAM = """
import dataclasses, json, sys
from benchmarks.kernels.launches import LayerStep
from benchmarks.kernels.report import DTYPES, GOALS, kernel_row
width, dtype, activation, n_experts, k, *capabilities = sys.argv[1:]
width, sizes = int(width), {"n_experts": int(n_experts), "k": int(k)}
shape = {shape.dim: shape for shape in GOALS.values()}.get(width)
step = LayerStep(width, DTYPES[dtype])
if shape is not None:
    step = LayerStep.of(shape, DTYPES[dtype])
step = dataclasses.replace(step, activation=activation, **sizes)
gated = activation.endswith(("glu", "glu_tanh"))
found = [
    kernel_row(launch, int(c), step)
    for c in capabilities
    for launch in dataclasses.replace(step, capability=int(c)).launches()
    if launch.options.get("GATED") or not gated
]
print(json.dumps([dataclasses.asdict(row) for row in found]))
"""
WIDE = {"hidden_kernel", "hidden_backward_kernel", "output_kernel", "weight_backward_kernel"}
# Two for each dtype: the five GPUs' kernels and the three dtypes' are all compiled.
CAPABILITIES = {"fp32": (80, 90), "fp16": (86, 100), "bf16": (89, 90)}


def compiled(dim, dtype, activation="relu", n_experts=8, k=2):
    arguments = map(str, (dim, dtype, activation, n_experts, k, *CAPABILITIES[dtype]))
    return json.loads(run_program(PROGRAM, *arguments).splitlines()[-1])


def run_program(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_fits(row):
    assert row["stack_bytes"] == 0, row
    assert row["shared_bytes"] <= GPUS[row["capability"]].block_shared, row


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        pytest.param(dim, dtype, marks=() if dtype == "bf16" else pytest.mark.slow)
        for dim in (24, 48, 768)
        for dtype in ("fp32", "fp16", "bf16")
    ],
)
def test_kernels_compile_fit_and_do_not_spill(dim, dtype):
    found = compiled(dim, dtype, {"fp32": "gelu", "fp16": "silu", "bf16": "relu"}[dtype])
    kernels = {(row["capability"], row["kernel"]) for row in found}
    narrow = {"mlp_kernel", "mlp_backward_kernel", "weight_gradients_kernel"}
    if dtype == "fp32":  # whose narrowest experts stay in registers in forward
        narrow = {"mlp_kernel"} | WIDE if dim == 24 else WIDE
    mlp = WIDE if dim == 768 else narrow
    for capability in CAPABILITIES[dtype]:
        for kernel in {"route_kernel", "sort_kernel", "route_backward_kernel"} | mlp:
            assert (capability, kernel) in kernels
    for row in found:
        assert_fits(row)
        if row["kernel"] in mlp:
            assert "MMA" in row["matrix_instructions"], row
    if dtype == "bf16":  # of the report, whose experts have ReLU
        committed = committed_rows()
        if committed[0].triton == triton.__version__:
            assert {KernelRow(**row) for row in found} == {
                dataclasses.replace(row, launches=1)
                for row in committed
                if (row.dtype, row.dim) == (dtype, dim) and row.capability in CAPABILITIES[dtype]
            }


@pytest.mark.slow
@pytest.mark.parametrize("dim", [48, 768])
def test_kernels_with_offsets_of_64_bits_do_not_spill(dim):
    always = "from dmoe_layer.fused import launch\nlaunch.LEAST_INT64 = 0\n"
    arguments = map(str, (dim, "bf16", "gelu", 8, 2, *GPUS))
    for row in json.loads(run_program(always + PROGRAM, *arguments).splitlines()[-1]):
        assert_fits(row)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [72, 257])
def test_experts_of_widths_that_fill_no_tile_compile_fit_and_do_not_spill(dim):
    found = [row for row in compiled(dim, "bf16") if row["kernel"] in WIDE]
    assert {row["kernel"] for row in found} == WIDE
    for row in found:
        assert_fits(row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "dtype", "activation", "kernels"),
    [
        (
            24,
            "bf16",
            "geglu",
            {"mlp_kernel", "mlp_backward_kernel", "weight_gradients_kernel"},
        ),
        (32, "fp32", "swiglu", {"mlp_kernel", "hidden_kernel", "hidden_backward_kernel"}),
        (96, "fp16", "geglu_tanh", {"mlp_kernel", "hidden_kernel", "hidden_backward_kernel"}),
        (768, "fp32", "geglu", {"hidden_kernel", "hidden_backward_kernel"}),
    ],
)
def test_kernels_of_gated_experts_compile_fit_and_do_not_spill(dim, dtype, activation, kernels):
    found = compiled(dim, dtype, activation)
    both = {(capability, kernel) for capability in CAPABILITIES[dtype] for kernel in kernels}
    assert {(row["capability"], row["kernel"]) for row in found} == both
    for row in found:
        assert_fits(row)
        assert "MMA" in row["matrix_instructions"], row


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "dtype"), [(24, "bf16"), (768, "bf16"), (768, "fp32")])
def test_kernels_for_the_most_experts_compile_and_fit(dim, dtype):
    for row in compiled(dim, dtype, n_experts=64, k=8):
        assert_fits(row)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [24, 768])
def test_sums_of_biases_keep_fp32s_accuracy_where_products_of_weights_need_not(dim):
    program = (
        "import sys, torch; torch.backends.cuda.matmul.allow_tf32 = True\n"
        "from benchmarks.kernels.binary import compile_for\n"
        "from benchmarks.kernels.launches import LayerStep\n"
        "for launch in LayerStep(int(sys.argv[1]), torch.float32).launches():\n"
        "    if launch.kernel.__name__ == 'weight_backward_kernel':\n"
        "        print(compile_for(launch, 90).asm['ttir'])\n"
    )
    code = run_program(program, str(dim))
    products = [line for line in code.splitlines() if "tt.dot" in line]
    of_biases = [line for line in products if "x16xf32" in line.split("->")[-1]]
    assert len(of_biases) == 2  # of w1's and of w2's
    assert len(products) > len(of_biases)
    for line in products:
        precision = "tf32x3" if line in of_biases else "tf32"
        assert f"inputPrecision = {precision} " in line, line
