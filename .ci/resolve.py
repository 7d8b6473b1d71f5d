"""Whether every extra resolves from the package index alone, with the project's constraints.

For each Python that is claimed and each system that torch has wheels for. uv does it, since it can
resolve for systems other than its own and sees no wheel that a machine has by chance. Wheels
alone count: a user's machine may have no compiler. Prints what failed, and uv's reason.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What has no wheel, and needs no compiler either: a helper of nnU-Net's, all Python.
PURE_PYTHON = "acvl-utils"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
SYSTEMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "macos", "windows")
# torch 2.13 has wheels for macOS 14 and newer, uv resolves for 13 unless told.
ENVIRONMENT = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": "14.0"}


def refusal(target: tuple[str, str, str]) -> str:
    """Why uv finds no versions for (extras, system, Python); empty if it finds some."""
    extras, system, python = target
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"]
    command += [f"--extra={extra}" for extra in extras.split(",")]
    command += [f"--python-platform={system}", f"--python-version={python}"]
    command += ["--constraint=constraints.txt", "--only-binary=:all:"]
    command += [f"--no-binary={PURE_PYTHON}", "--output-file", os.devnull]
    # Else uv looks for an interpreter of that version, and downloads one.
    command += [f"--python={sys.executable}", "--no-python-downloads"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=ENVIRONMENT, cwd=ROOT)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def main() -> int:
    extras = metadata("dmoe-layer").get_all("Provides-Extra") or []
    # Each by itself, so that a failure names one, and all in one environment.
    targets = list(itertools.product([*extras, ",".join(extras)], SYSTEMS, PYTHONS))
    with ThreadPoolExecutor(8) as threads:
        refusals = list(threads.map(refusal, targets))
    failed = sorted((why, target) for target, why in zip(targets, refusals, strict=True) if why)
    for why, same in itertools.groupby(failed, key=lambda one: one[0]):
        print("Does not resolve:", *(" / ".join(target) for _, target in same), why, sep="\n")
    print(f"resolve: {len(targets) - len(failed)} of {len(targets)} targets resolve.")
    return 1 if failed or not extras else 0


if __name__ == "__main__":
    sys.exit(main())
