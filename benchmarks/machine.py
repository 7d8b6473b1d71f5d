"""What a run was made with: machine, versions, date, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from reference_models.machine import processor_name

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class RunFacts:
    """The first columns of every row: what all rows of a run share.

    ``load`` is the load average before the run: near 0, or others took part of the machine.
    """

    date: str
    commit: str
    machine: str
    threads: str
    python: str
    torch: str
    triton: str
    load: str
    device: str
    dtype: str

    def one_line(self) -> str:
        """All of them, as a command prints them before it measures."""
        return ", ".join(f"{name} {value or 'none'}" for name, value in asdict(self).items())

    def software(self) -> str:
        """Threads, versions, date and commit, as the README shows them."""
        return (
            f"{self.threads} threads, PyTorch {self.torch}, Python {self.python}, {self.date}, "
            f"commit {self.commit[:12]}"
        )

    def cpu_warning(self) -> str:
        """What stands in the README before figures that say nothing about a GPU; else empty."""
        return "**CPU only: nothing here was measured on a GPU.** " if self.device == "cpu" else ""


def run_facts(device: torch.device, dtype: torch.dtype) -> RunFacts:
    """Those of this machine, now."""
    return RunFacts(
        date=datetime.date.today().isoformat(),
        commit=commit(ROOT),
        machine=machine_name(device),
        threads=str(torch.get_num_threads()),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=version("triton"),
        load=f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "",
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
    )


def version(package: str | None) -> str:
    """The installed version, or "" where there is none."""
    try:
        return "" if package is None else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit(folder: Path) -> str:
    """The commit checked out in ``folder``, marked where code differs; "unknown" outside git."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        measured = ("src", "benchmarks/*.py", "reference_models/models")
        changed = _git(folder, "status", "--porcelain", "--", *measured)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {os.cpu_count()} cores"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, check=True, encoding="utf-8"
    )
    return done.stdout.strip()
