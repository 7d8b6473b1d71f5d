"""``python -m benchmarks.volumes``: memory and time of the 3D network's training step, by patch.

The paper's 3D Residual U-Net without experts, with the paper's code's way of computing them (a
boolean mask for each), and with this layer: alone, with experts for half of the voxels only, and
with gradient checkpointing.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from reference_models.errors import DataError
from reference_models.markdown import replace_section
from reference_models.terminal import print_anything

from ..arguments import ArgumentError, chosen_device, chosen_names, require_at_least
from ..machine import run_facts
from ..output import OTHER_RESULTS, README, RESULTS, check_writable, write_csv
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
    print_anything()
    options = _parser().parse_args(words)
    try:
        _run(_Order.of(options))
    except (ArgumentError, DataError) as error:
        print(f"python -m benchmarks.volumes: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class _Order:
    """What the command line asks for, checked before anything is measured.

    ``whole``: everything that the README shows is measured, as it shows it.
    """

    device: torch.device
    dtypes: list[str]
    patches: list[Patch]
    networks: list[str]
    rounds: int
    whole: bool
    out: Path

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Order:
        """
        Raises:
            ArgumentError: a word is not what was expected.
            DataError: the folder cannot be written to.
        """
        device = chosen_device(options.device)
        on_cpu = device.type == "cpu"
        all_patches = options.patches is None and not options.quick
        patches = parse_patches(QUICK if options.quick else options.patches or PATCHES[device.type])
        networks = chosen_names("networks", options.networks, NETWORKS)
        rounds = (3 if on_cpu else 10) if options.rounds is None else options.rounds
        require_at_least(0, "rounds", rounds)
        whole = all_patches and options.networks == "all" and options.dtype is None and rounds > 0
        out = options.out or (RESULTS if whole else OTHER_RESULTS)
        check_writable(out)
        default = ["float32"] if on_cpu else list(DTYPES)
        return cls(
            device=device,
            dtypes=[options.dtype] if options.dtype else default,
            patches=patches,
            networks=networks,
            rounds=rounds,
            whole=whole,
            out=out,
        )


def _run(order: _Order) -> None:
    """
    Raises:
        DataError: the README has no marks to write between.
    """
    facts = run_facts(order.device, DTYPES[order.dtypes[0]])
    print(facts.one_line())
    path = order.out / f"volumes-{facts.device}.csv"
    rows: list[VolumeRow] = []
    for dtype in order.dtypes:
        measured: list[VolumeRow] = []
        for patch in order.patches:
            new = measure_patch(
                patch,
                order.networks,
                device=order.device,
                dtype=DTYPES[dtype],
                rounds=order.rounds,
                facts=replace(facts, dtype=dtype),
                smaller=measured,
            )
            measured += new
            rows += new
            print(f"\n### {dtype}, {patch}\n\n{table(new)}", flush=True)
            if not order.whole:  # whose results stay as they were until all is there
                write_csv(rows, path)
    write_csv(rows, path)
    written = [path]
    if order.whole and order.out.resolve() == RESULTS:
        replace_section(README, f"volumes-{facts.device}", section(rows))
        written.append(README)
    print("\nWrote " + ", ".join(map(str, written)))


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
    parser.add_argument("--patches", help="batch x sides, comma-separated: 1x96x96x64,2x64x64x64")
    parser.add_argument("--networks", default="all", help=f"all, or some of {','.join(NETWORKS)}")
    parser.add_argument("--rounds", type=int, help="timed ones (default: 3 on a CPU, 10 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="two small patches")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, and both on a GPU")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the CSV (default: benchmarks/results for a run of everything, which also "
        "renews benchmarks/README.md; else bench_output)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
