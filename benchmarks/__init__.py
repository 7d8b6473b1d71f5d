"""Benchmarks: of the layer, how its cost grows, of the 3D network, and a report of the kernels.

``python -m benchmarks``, ``benchmarks.growth``, ``benchmarks.volumes``, ``benchmarks.kernels``.
"""

import os

# The profiler announces each start and stop on stderr; this must be set before torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
