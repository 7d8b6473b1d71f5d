"""Which processor computes: what the choice of a product's library depends on."""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Processor(NamedTuple):
    """A processor, as far as it is known.

    Attributes:
        architecture: "x86" or another, in lower case.
        vendor: "AuthenticAMD", "GenuineIntel" or another; "" where the system does not tell.
        family: the vendor's number, of AMD 25 for Zen 3 and 4, and 26 for Zen 5; 0 if not told.
        capability: the instructions that PyTorch uses, ``torch.backends.cpu.get_cpu_capability()``:
            "AVX2", "AVX512" or another.
    """

    architecture: str
    vendor: str
    family: int
    capability: str


@cache
def processor() -> Processor:
    """This machine's. The capability is PyTorch's own, which environment variables may limit."""
    machine = platform.machine().lower()
    capability = torch.backends.cpu.get_cpu_capability()
    if machine not in ("x86_64", "amd64"):
        return Processor(machine, "", 0, capability)
    vendor, family = _vendor_and_family()
    return Processor("x86", vendor, family, capability)


def _vendor_and_family() -> tuple[str, int]:
    try:  # Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # Windows: "AMD64 Family 25 Model 33 Stepping 2, AuthenticAMD"
        text = platform.processor()
        vendor = re.search(r", (\w+)$", text)
        family = re.search(r"Family (\d+)", text)
    else:
        vendor = re.search(r"^vendor_id\s*: (\w+)", text, re.MULTILINE)
        family = re.search(r"^cpu family\s*: (\d+)", text, re.MULTILINE)
    return vendor[1] if vendor else "", int(family[1]) if family else 0
