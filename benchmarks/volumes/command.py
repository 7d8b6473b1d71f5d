"""Measures memory and time of the 3D network's training step, for patches of several sizes.

The network is the paper's 3D Residual U-Net. It is measured without experts, with experts computed
as in the paper's code (a boolean mask for each expert), and with this layer. This layer is measured
alone, with experts for half of the voxels only, and with gradient checkpointing.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ..arguments import (
    ArgumentError,
    add_device_flag,
    chosen_device,
    chosen_names,
    require_at_least,
    run_command,
)
from ..machine import run_facts
from ..output import ResultsFolder
from .rows import VolumeRow, section, table
from .runner import measure_patch
from .steps import NETWORKS, Patch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATCHES = {
    "cpu": "1x64x64x64,1x96x96x96,1x128x128x128,1x192x192x96,1x384x384x128",
    "cuda": "1x128x128x128,1x192x192x96,1x384x384x128,2x384x384x128,4x384x384x128",
}
QUICK = "1x32x32x64,1x64x64x64"


def main(words: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_command(_parser(), _run, words)


def _run(options: argparse.Namespace) -> None:
    """
    Raises:
        ArgumentError: a word is not what was expected.
        DataError: the folder cannot be written to, or the README has no marks to write between.
    """
    device = chosen_device(options.device)
    on_cpu = device.type == "cpu"
    patches = parse_patches(QUICK if options.quick else options.patches or PATCHES[device.type])
    networks = chosen_names("networks", options.networks, NETWORKS)
    dtypes = [options.dtype] if options.dtype else ["float32"] if on_cpu else list(DTYPES)
    rounds = (3 if on_cpu else 10) if options.rounds is None else options.rounds
    require_at_least(0, "rounds", rounds)
    all_patches = options.patches is None and not options.quick
    whole = all_patches and options.networks == "all" and options.dtype is None and rounds > 0
    out = ResultsFolder.chosen(options.out, whole)

    facts = run_facts(device, DTYPES[dtypes[0]])
    print(facts.one_line())
    name = f"volumes-{facts.device}"
    rows: list[VolumeRow] = []
    for dtype in dtypes:
        measured: list[VolumeRow] = []
        for patch in patches:
            new = measure_patch(
                patch,
                networks,
                device=device,
                dtype=DTYPES[dtype],
                rounds=rounds,
                facts=replace(facts, dtype=dtype),
                smaller=measured,
            )
            measured += new
            rows += new
            print(f"\n### {dtype}, {patch}\n\n{table(new)}", flush=True)
            out.write_part(rows, f"{name}.csv")
    out.finish([out.write(rows, f"{name}.csv")], name, lambda: section(rows))


def parse_patches(text: str) -> list[Patch]:
    """From batch×sides, comma-separated, smallest first.

    Raises:
        ArgumentError: one is not four numbers.

    Example:
        >>> [str(patch) for patch in parse_patches("2x64x64x64,1x96x96x32")]
        ['1×96×96×32', '2×64×64×64']
    """
    patches = []
    for word in text.split(","):
        numbers = word.split("x")
        if len(numbers) != 4 or not all(n.isdigit() and int(n) for n in numbers):
            raise ArgumentError(f"patches: got {word!r}, expected batch x three sides: 1x96x96x64.")
        batch, *sides = map(int, numbers)
        patches.append(Patch(batch, (sides[0], sides[1], sides[2])))
    return sorted(patches, key=lambda patch: patch.voxels)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.volumes", description=__doc__)
    parser.add_argument(
        "--patches",
        help="Patches to measure, separated by commas. Write each one as batch x sides, such as "
        f"1x96x96x64. The default is {PATCHES['cpu']} on a CPU, and {PATCHES['cuda']} on a GPU.",
    )
    parser.add_argument(
        "--networks",
        default="all",
        help=f"Networks to measure, separated by commas: all, or some of {','.join(NETWORKS)}. "
        "The default is all.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="Number of timed rounds. The default is 3 on a CPU and 10 on a GPU.",
    )
    parser.add_argument("--quick", action="store_true", help="Measure two small patches.")
    add_device_flag(parser)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="Number format of the network. The default is float32 on a CPU, and both on a GPU.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="Folder for the CSV file. By default a run of everything writes to benchmarks/results "
        "and renews benchmarks/README.md. Other runs write to bench_output.",
    )
    return parser
