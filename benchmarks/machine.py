"""What a run was made with: machine, versions, date, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dmoe_layer.eager.gemm import road
from reference_models.machine import processor_name

ROOT = Path(__file__).parent.parent
CPUINFO = Path("/proc/cpuinfo")
# By these a library is held to fewer instructions than the processor has. oneDNN has two names.
HELD_BY = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
)
_MODEL = {"family": "cpu family", "model": "model"}


@dataclass(frozen=True)
class RunFacts:
    """The first columns of every row: what all rows of a run share.

    ``machine`` says too by what its libraries are held to fewer instructions than it has.
    ``vendor`` is the processor's, with family and model where the system tells. ``capability``:
    the instruction set that PyTorch uses, or a GPU's compute capability. ``road``: which library
    computed the layer's products. What a file was written without is empty, and vendor and road
    are on a GPU. ``load`` is the load average before the run: near 0, or others took part of the
    machine.
    """

    date: str
    commit: str
    machine: str
    vendor: str
    capability: str
    road: str
    threads: str
    python: str
    torch: str
    triton: str
    load: str
    device: str
    dtype: str

    def one_line(self) -> str:
        """All facts in one line, as a command prints them before it measures."""
        return ", ".join(f"{name} {value or 'none'}" for name, value in asdict(self).items())

    def hardware(self) -> str:
        """Machine, vendor, instruction set and library, as the README shows them."""
        details = "; ".join(text for text in (self.vendor, self.capability) if text)
        return (
            self.machine
            + (f" ({details})" if details else "")
            + (f"; matrix products of this layer by {self.road}" if self.road else "")
        )

    def software(self) -> str:
        """Threads, versions, date and commit, as the README shows them."""
        return (
            f"{self.threads} threads, PyTorch {self.torch}, Python {self.python}, {self.date}, "
            f"commit {self.commit[:12]}"
        )

    def cpu_warning(self) -> str:
        """A warning in the README before numbers that say nothing about a GPU; else empty."""
        return "**CPU only: nothing here was measured on a GPU.** " if self.device == "cpu" else ""


def run_facts(device: torch.device, dtype: torch.dtype) -> RunFacts:
    """The facts of this machine at this moment."""
    on_cpu = device.type == "cpu"
    return RunFacts(
        date=datetime.date.today().isoformat(),
        commit=commit(ROOT),
        machine=machine_name(device) + (held_to(os.environ) if on_cpu else ""),
        vendor=vendor() if on_cpu else "",
        capability=capability(device),
        # Other dtypes have one library each, which PyTorch chooses.
        road=("" if not on_cpu else road() if dtype == torch.float32 else "plain PyTorch"),
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


def capability(device: torch.device) -> str:
    """The instruction set that PyTorch uses on the CPU, or the GPU's compute capability."""
    if device.type == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability(device)))
    return torch.backends.cpu.get_cpu_capability()


def device_kind(device: torch.device) -> str:
    """The kind of device, by which files are named: "cuda", "cpu-avx2", "cpu-avx512", ..."""
    if device.type == "cuda":
        return "cuda"
    return f"cpu-{re.sub('[^a-z0-9]+', '-', capability(device).lower())}"


def vendor() -> str:
    """The processor's, with family and model where Linux lists them; else what the system says."""
    listed: dict[str, str] = {}
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            listed.setdefault(name.strip(), value.strip())
    if "vendor_id" not in listed:
        return platform.processor() or platform.machine()
    words = [listed["vendor_id"]]
    words += [f"{name} {listed[f]}" for name, f in _MODEL.items() if f in listed]
    return " ".join(words)


def held_to(environment: Mapping[str, str]) -> str:
    """Which variables hold which libraries to fewer instructions; empty where none does.

    >>> held_to({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "HOME": "/root"})
    ', held to AVX2 by ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY'
    """
    names: dict[str, list[str]] = {}
    for name in HELD_BY:
        if environment.get(name):
            names.setdefault(environment[name].upper(), []).append(name)
    return "".join(f", held to {isa} by {' and '.join(by)}" for isa, by in names.items())


def free_bytes() -> float:
    """The memory that programs can still have; without end where Linux does not tell."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return float("inf")
    line = next(
        x for x in info.read_text(encoding="utf-8").splitlines() if x.startswith("MemAvailable")
    )
    return 1024 * int(line.split()[1])


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, check=True, encoding="utf-8"
    )
    return done.stdout.strip()
