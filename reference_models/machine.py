"""Names the processor, for figures that depend on it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """As Linux lists the first one; elsewhere as the platform names it, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
