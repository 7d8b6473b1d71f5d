"""Names the processor, for results that depend on it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Gives the processor's name: on Linux the first one's, elsewhere what the platform reports."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
