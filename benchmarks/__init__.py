"""Benchmarks: the layer, how its cost grows, the 3D network, exported programs, the kernels.

``python -m benchmarks``, ``benchmarks.growth``, ``.volumes``, ``.export``, ``.kernels``.
"""

import os

# The profiler announces each start and stop on stderr; this must be set before torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
