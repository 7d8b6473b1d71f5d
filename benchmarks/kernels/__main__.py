"""Compiles every Triton kernel for GPUs that this machine need not have.

Without a command it compiles the launches of the layer at the shapes of the benchmark's goals, for
each compute capability. Registers, stack and shared memory come from the binary's resource table,
and instructions from its disassembly. The command "matrix" does so for all widths, dtypes and
activations. The command "predict" estimates times from the counts. On a GPU, "prewarm" compiles all
that the goals and the sweep launch, and "sweep" times the launches of a goal with other block
sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import astuple, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from reference_models.markdown import replace_section

from ..arguments import ArgumentError, chosen_names, run_command
from ..output import README, RESULTS, ResultsFolder, write_csv
from .gpus import GPUS
from .launches import LayerStep
from .matrix import PRECISIONS, WIDTHS, matrix_rows, merged, read_matrix
from .predict import predict, section
from .prewarm import compilations, prewarm
from .report import DTYPES, GOALS, REPORTED, kernel_rows
from .sweep import CANDIDATES, measure_sweep, sweep_table

# The features and the tokens of the 3D network's stages at a patch of 1x192x192x96.
NETWORK_STAGES = ((24, 442368), (24, 55296), (48, 6912), (96, 864), (192, 108))


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(_parser(), lambda options: options.run(options), words)


def _report(_: argparse.Namespace) -> None:
    """Prints each row when it is there, and writes all of them to ``results/kernels.csv``."""
    rows = []
    for capability, dtypes in REPORTED.items():
        steps = [LayerStep.of(shape, DTYPES[dtype]) for shape in GOALS.values() for dtype in dtypes]
        for row in kernel_rows(steps, capability):
            rows.append(row)
            print(*astuple(row), sep="  ", flush=True)
    write_csv(rows, RESULTS / "kernels.csv")


def _matrix(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: a word is not what was expected.
    """
    capabilities = chosen_names("capabilities", options.capabilities, [*map(str, GPUS)])
    widths = chosen_names("widths", options.widths, [*map(str, WIDTHS)])
    dtypes = chosen_names("dtypes", options.dtypes, PRECISIONS)
    path, new = RESULTS / "kernels-matrix.csv", []
    old = read_matrix(path)
    for row in matrix_rows([*map(int, capabilities)], dtypes, [*map(int, widths)], old):
        new.append(row)
        print(*astuple(row), sep="  ", flush=True)
        write_csv(merged(old, new), path)  # what is there is not compiled again


def _predict(_: argparse.Namespace) -> None:
    """Prints each shape's launches, and renews the page's section."""
    predictions = []
    for shape in GOALS.values():
        predictions.append(predict(shape))
        print(f"### {shape.name}: {shape}\n\n{predictions[-1].table()}\n", flush=True)
    print(section(predictions))
    replace_section(README, "predicted", section(predictions))


def _prewarm(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: there is no GPU, or nothing could be compiled.
    """
    _require_gpu("prewarm")
    began = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    todo = compilations(timed_steps(10 * major + minor, options.own))
    failed = 0
    for what, error in prewarm(todo, options.processes):
        failed += 1
        print(f"{what}: {error}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(todo) - failed} of {len(todo)} kernels compiled in {seconds:.0f} s", flush=True)
    if failed == len(todo):
        raise ArgumentError("prewarm: no kernel could be compiled.")


def timed_steps(capability: int, own: bool) -> list[LayerStep]:
    """The steps of the benchmark at the goals' shapes, and those that gpu.sh times beside it.

    Those are the 3D network's if ``own``, else the sweep's. The benchmark times training and eval
    mode and the router alone, and checks the gradients of eval mode.
    """
    steps = []
    for shape in GOALS.values():
        step = LayerStep.of(shape, torch.bfloat16, balanced=False, capability=capability)
        ways = product((True, False), repeat=2)
        steps += [replace(step, training=train, gradients=grad) for train, grad in ways]
        if not own:
            steps += [replace(step, blocks=blocks) for blocks in CANDIDATES[shape.name]]
    if own:
        steps += network_steps(capability)
    return steps


def network_steps(capability: int) -> list[LayerStep]:
    """Those of the 3D network's experts under autocast, of either dtype that their x may have."""
    step = partial(
        LayerStep, dtype=torch.float32, batch=1, values=4, balanced=False, capability=capability,
        autocast=True,
    )  # fmt: skip
    return [
        step(dim, tokens=tokens, x_dtype=x_dtype)
        for dim, tokens in NETWORK_STAGES
        for x_dtype in (torch.bfloat16, torch.float32)
    ]


def _sweep(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: there is no GPU.
        DataError: the folder cannot be written to.
    """
    _require_gpu("sweep")
    out, rows = ResultsFolder.chosen(options.out, whole=False), []
    for row in measure_sweep(GOALS[options.shape], torch.device("cuda"), options.rounds):
        rows.append(row)
        out.write(rows, f"sweep-{options.shape}.csv")
    print(sweep_table(rows))


def _require_gpu(command: str) -> None:
    if not torch.cuda.is_available():
        raise ArgumentError(f"{command}: needs a GPU, and PyTorch finds none.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__)
    parser.set_defaults(run=_report)
    commands = parser.add_subparsers(metavar="command")
    matrix = commands.add_parser("matrix", help="Compiles all widths, dtypes and activations.")
    for name, known in (("capabilities", GPUS), ("dtypes", PRECISIONS), ("widths", WIDTHS)):
        some = ",".join(map(str, known))
        words = f"The {name} to compile, separated by commas: all, or some of {some}."
        matrix.add_argument(f"--{name}", default="all", help=f"{words} The default is all.")
    matrix.set_defaults(run=_matrix)
    predict = commands.add_parser("predict", help="Estimates the goals' times by a model.")
    predict.set_defaults(run=_predict)
    warm = commands.add_parser("prewarm", help="Compiles all that is timed. It needs a GPU.")
    warm.add_argument(
        "--own",
        action="store_true",
        help="Compile the 3D network's layers in place of the other block sizes of the sweep.",
    )
    warm.add_argument(
        "--processes",
        type=int,
        help="Number of processes that compile. The default is one for each core.",
    )
    warm.set_defaults(run=_prewarm)
    sweep = commands.add_parser("sweep", help="Times other block sizes. It needs a GPU.")
    sweep.add_argument("shape", choices=tuple(GOALS), help="The goal whose launches are timed.")
    sweep.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="Number of timed rounds. The default is %(default)d.",
    )
    sweep.add_argument(
        "--out", type=Path, help="Folder for the CSV file. The default is bench_output."
    )
    sweep.set_defaults(run=_sweep)
    return parser


if __name__ == "__main__":
    sys.exit(main())
